"""The layer problems of a study: synthetic, from instance files, or extracted from models.

Layers of a model are extracted once, into instance files beside the record, and read from there by
every unit. A unit may take a sample of the rows and a sub-block of the columns: ``cols`` consecutive
input channels with their part of the Gram matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.texts import text_hash
from ..calibration.windows import Windows, calibration_windows, for_model, window_length
from ..errors import InputError, InvalidFileError
from ..evaluation.beginning import AddBos, begun_windows
from ..evaluation.measures import is_causal
from ..models.blocks import find_blocks
from ..models.contents import model_hash
from ..models.loading import LoadedModel, load_model
from ..models.sources import PACKAGE, package_path
from ..problems import Gram, LayerProblem, Pattern, load_instance, save_instance, synthetic_layer
from ..pruning.pipeline import layer_problems

# Sub-blocks start at a multiple of this, so that N:M blocks stay whole.
ALIGN = 16
# Windows of the held-out text, the same for every size of the calibration set.
HELD_OUT_SAMPLES = 64
# Options of whole models that name texts, which records keep without their folders.
TEXTS = ("calibration", "evaluation")
DEMO_MODEL = Path(__file__).parent.parent / "data" / "demo-model"


@dataclass(frozen=True)
class LayerName:
    """A layer that can be extracted."""

    name: str
    block: int
    kind: str
    rows: int
    cols: int


@dataclass(frozen=True, eq=False)
class BuiltProblem:
    """A unit's problem with what is known about it.

    Attributes:
        problem: what to solve; whole: the same with all rows, which some scores look at;
        held_out: the same with the held-out text's Gram matrix, or None.
        identity: hash of weights, Gram matrix and pattern.
        source, layer, block, kind: where it comes from.
        row_indices: index in the layer of each row.
    """

    problem: LayerProblem
    whole: LayerProblem
    held_out: LayerProblem | None
    identity: str
    source: str
    layer: str
    block: int
    kind: str
    row_indices: tuple[int, ...]


def resolve_model(model: str, folder: Path) -> str:
    """Directory or hub name of ``model``: ``demo``, ``package:NAME[/PATH]``, a path, a hub name.

    Raises:
        InvalidModelError: if the package is not installed, or has no such model.
    """
    if model == "demo":
        return str(DEMO_MODEL)
    if model.startswith(PACKAGE):
        return str(package_path(model))
    return resolve_path(model, folder)


def resolve_path(text: str, folder: Path) -> str:
    """``text`` relative to ``folder`` if there is such a file, else unchanged."""
    path = folder / text
    return str(path) if text and path.exists() else text


def resolve_text(text: str, folder: Path) -> str:
    """``text``, with or without a column behind a colon, as ``resolve_path`` does."""
    file, colon, column = text.rpartition(":")
    found = resolve_path(text, folder)
    return found if found != text or not colon else f"{resolve_path(file, folder)}:{column}"


def resolve_files(patterns: Sequence[str], folder: Path) -> list[str]:
    """Instance files that match shell patterns, relative to ``folder``, sorted.

    Raises:
        InputError: if a pattern matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            if Path(pattern).is_absolute():
                matches = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
            else:
                matches = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
        except (
            OSError,
            ValueError,
            IndexError,
            NotImplementedError,
        ) as error:
            raise InputError(
                f"instance files {pattern!r} in {folder}: expected a shell pattern, found {error}"
            ) from error
        if not matches:
            raise InputError(f"instance files {pattern} in {folder}: expected at least one, found none")
        found += [match for match in matches if match not in found]
    return found


def contents_of(model: str, texts: Iterable[str], folder: Path) -> dict[str, str | None]:
    """Hashes of what a model and texts are now, by their names in a study; None for a dataset elsewhere.

    Raises:
        InputError: if one does not exist.
    """
    found: dict[str, str | None] = {f"model {model}": model_hash(resolve_model(model, folder))}
    return found | {f"text {text}": text_hash(resolve_text(text, folder)) for text in texts if text}


def require_contents(contents: Mapping[str, str | None], model: str, folder: Path) -> None:
    """Refuse a model or a text that was changed since the study was planned.

    Raises:
        InputError: naming it.
    """
    texts = [name.removeprefix("text ") for name in contents if name.startswith("text ")]
    now = contents_of(model, texts, folder)
    for name, planned in contents.items():
        if now.get(name) != planned:
            raise InputError(
                f"{name}: expected its contents of when the study was planned, found others; start the study "
                "again"
            )


def _loaded(model: str) -> LoadedModel:
    return _loaded_once(model, model_hash(model))


@lru_cache(maxsize=2)
def _loaded_once(model: str, _contents: str) -> LoadedModel:
    return load_model(model, torch.device("cpu"))


def layers_of(
    model: str, folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerName]:
    """Layers of ``model`` that match, in forward order.

    Raises:
        InputError: if the model cannot be loaded or nothing matches.
    """
    loaded = _loaded(resolve_model(model, folder))
    blocks = find_blocks(loaded.model, include, exclude)
    return [
        LayerName(layer.name, layer.block, layer.kind, *map(int, layer.weight.shape))
        for block in blocks
        for layer in block.layers
    ]


def extraction_id(problem: Mapping[str, Any], seed: int, held_out: bool) -> str:
    """Which extraction a layer of a model comes from: model, text and windows, names and contents."""
    text = problem["held_out"] if held_out else problem["calibration"]
    samples, seed = (HELD_OUT_SAMPLES, 0) if held_out else (problem["samples"], seed)
    # how windows begin is decided on the calibration text
    names = (f"model {problem['source']}", f"text {problem['calibration']}", f"text {text}")
    contents = [problem["contents"].get(name) for name in names]
    key = [problem["source"], text, samples, problem["length"], problem["add_bos"], seed, contents]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def instance_file(cache: Path, problem: Mapping[str, Any], seed: int, held_out: bool) -> Path:
    """Where the extracted layer lies."""
    return cache / extraction_id(problem, seed, held_out) / f"{problem['layer']}.safetensors"


def extract(problem: Mapping[str, Any], seed: int, folder: Path, cache: Path) -> None:
    """Extract all layers of a model that are not there yet, for calibration and held-out text.

    Args:
        problem: specification of any unit on that model and those texts.
        seed: of the calibration windows.
        folder: where relative paths start.
        cache: folder of extracted instance files.
    """
    for held_out in (False, True):
        text = problem["held_out"] if held_out else problem["calibration"]
        target = cache / extraction_id(problem, seed, held_out)
        if not text or (target / "complete").exists():
            continue
        require_contents(problem["contents"], problem["source"], folder)
        loaded = _loaded(resolve_model(problem["source"], folder))
        windows = _windows(loaded, problem, seed, folder, held_out)
        blocks = find_blocks(loaded.model)
        facts = {layer.name: layer for block in blocks for layer in block.layers}
        for found in layer_problems(loaded.model, blocks, "50%", windows.tokens):
            layer = facts[found.name]
            provenance = {"block": layer.block, "kind": layer.kind, "tokens": windows.hash}
            # several processes may extract at once: each writes its own file, the last one stays
            own = target / f"{found.name}.{os.getpid()}"
            save_instance(found, own, provenance)
            own.replace(target / f"{found.name}.safetensors")
        (target / "complete").touch()


def _windows(
    loaded: LoadedModel, problem: Mapping[str, Any], seed: int, folder: Path, held_out: bool
) -> Windows:
    """Windows of the calibration or the held-out text; how they begin is decided on the former."""
    sources = [resolve_text(problem[key], folder) for key in ("calibration", "held_out") if problem[key]]
    length = window_length(loaded, problem["length"] or None, *sources)
    special = not is_causal(loaded.model)

    def cut(bos: bool, held_out: bool = False) -> Windows:
        text = resolve_text(problem["held_out"] if held_out else problem["calibration"], folder)
        samples, chosen = (HELD_OUT_SAMPLES, 0) if held_out else (problem["samples"], seed)
        found = calibration_windows(text, loaded.tokenizer, samples, length, chosen, special, bos)
        return for_model(found, loaded)

    windows, beginning = begun_windows(loaded, AddBos(problem["add_bos"]), cut)
    if held_out:
        windows = cut(beginning.added, held_out=True)
    return windows


def build_problem(
    problem: Mapping[str, Any], pattern: str, seed: int, folder: Path, cache: Path
) -> BuiltProblem:
    """The problem of a unit.

    Raises:
        InputError: if it does not exist or the pattern does not fit.
    """
    block, kind, held_out = -1, "", None
    if problem["kind"] == "family":
        full = synthetic_layer(problem["source"], problem["rows"], problem["cols"], pattern, seed)
        rows, columns = np.arange(full.rows), slice(0, full.cols)
        layer = f"{full.rows} × {full.cols}"
    else:
        if problem["kind"] == "files":
            full = load_instance(folder / problem["source"])
            layer = full.name or Path(problem["source"]).stem
        else:
            path = instance_file(cache, problem, seed, held_out=False)
            if not path.exists():
                raise InvalidFileError(
                    f"layer {problem['layer']}: expected tokens that reach it, found no instance {path.name}"
                )
            full = load_instance(path)
            layer = full.name
            kind = next(part for part in reversed(layer.split(".")) if not part.isdigit())
            block = next((int(part) for part in layer.split(".") if part.isdigit()), -1)
            other = instance_file(cache, problem, seed, held_out=True)
            held_out = load_instance(other) if problem["held_out"] and other.exists() else None
        rows, columns = _sample(full, problem["rows"], problem["cols"], seed)
    chosen = sub_problem(full, rows, columns, pattern)
    return BuiltProblem(
        chosen,
        sub_problem(full, np.arange(full.rows), columns, pattern),
        None if held_out is None else sub_problem(held_out, rows, columns, pattern),
        _identity(chosen),
        problem["name"],
        layer,
        block,
        kind,
        tuple(int(row) for row in rows),
    )


def _sample(problem: LayerProblem, rows: int, cols: int, seed: int) -> tuple[np.ndarray, slice]:
    """Sorted indices of a sample of rows, and a random aligned block of columns; 0 is all."""
    generator = np.random.default_rng([seed, problem.rows, problem.cols])
    chosen = np.arange(problem.rows)
    if 0 < rows < problem.rows:
        chosen = np.sort(generator.choice(problem.rows, rows, replace=False))
    if not 0 < cols < problem.cols:
        return chosen, slice(0, problem.cols)
    start = ALIGN * int(generator.integers((problem.cols - cols) // ALIGN + 1))
    return chosen, slice(start, start + cols)


def sub_problem(problem: LayerProblem, rows: np.ndarray, columns: slice, pattern: str) -> LayerProblem:
    """Some rows and consecutive columns of a layer, with a pattern of its own."""
    index = torch.from_numpy(rows)
    weight = problem.weight[index][:, columns]
    gram = problem.gram
    if weight.shape[1] < problem.cols:
        mean = None if gram.mean is None else gram.mean[columns].clone()
        gram = Gram(gram.matrix[columns, columns].clone(), gram.tokens, mean)
        if problem.drift is not None:
            raise InputError(f"layer {problem.name}: expected no drift where columns are chosen, found some")
    chosen = problem.slice_rows(index)
    parsed = Pattern.parse(pattern, weight.shape[1])
    return replace(chosen, weight=weight.contiguous(), gram=gram, pattern=parsed)


def _identity(problem: LayerProblem) -> str:
    digest = hashlib.sha256(str(problem.pattern).encode())
    tensors = [problem.weight, problem.gram.matrix]
    if problem.drift is not None:
        tensors += [problem.drift.linear, problem.drift.constant]
    if problem.metric is not None:
        tensors.append(problem.metric)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
