"""Instance files: a layer problem as one safetensors file.

Tensors ``weight`` (rows, cols), ``gram`` (cols, cols), where known the channels' means ``mean`` (cols,) and,
with drift, ``drift_linear`` (rows, cols), ``drift_constant`` (rows,) and perhaps ``drift_covariance``
(rows, rows), with an output metric ``metric`` (rows, rows); the metadata holds pattern, name and provenance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, InvalidFileError, file_errors, found_of
from .gram import Gram
from .layer import Drift, LayerProblem
from .pattern import pattern_of

FORMAT = "sparseswaps-instance-1"
# Several keys of metadata are written in an order that changes; with one, equal files have equal bytes.
_HEADER = "sparseswaps"


def as_metadata(header: Mapping[str, str]) -> dict[str, str]:
    """Facts of a file as the metadata of safetensors, one key that is always written the same."""
    return {_HEADER: json.dumps(dict(header), sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The facts in a file's metadata; in files of earlier versions each has a key of its own."""
    found = dict(metadata or {})
    return found if _HEADER not in found else json_object(found[_HEADER]) or {}


def json_object(text: str) -> dict[str, Any] | None:
    """The object in a JSON text, None where there is another thing."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def save_instance(
    problem: LayerProblem, path: str | os.PathLike[str], provenance: Mapping[str, object] | None = None
) -> None:
    """Write ``problem`` to ``path``; the file appears complete or not at all.

    Args:
        problem: what to save.
        path: target, usually ``*.safetensors``.
        provenance: where the layer comes from (model, calibration, versions), kept as JSON.

    Raises:
        InvalidFileError: if it cannot be written.
    """
    target = Path(path)
    tensors = {"weight": problem.weight.cpu().contiguous(), "gram": problem.gram.matrix.cpu().contiguous()}
    if problem.gram.mean is not None:
        tensors["mean"] = problem.gram.mean.cpu().contiguous()
    if problem.drift is not None:
        tensors["drift_linear"] = problem.drift.linear.cpu().contiguous()
        tensors["drift_constant"] = problem.drift.constant.cpu().contiguous()
        if problem.drift.covariance is not None:
            tensors["drift_covariance"] = problem.drift.covariance.cpu().contiguous()
    if problem.metric is not None:
        tensors["metric"] = problem.metric.cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "pattern": json.dumps(
            {
                "keep": problem.pattern.keep,
                "block": problem.pattern.block,
                "scope": problem.pattern.couples.value,
            }
        ),
        "name": problem.name,
        "tokens": str(problem.gram.tokens),
        "provenance": json.dumps(dict(provenance or {}), sort_keys=True),
    }
    partial = target.with_name(target.name + ".partial")
    with file_errors(f"instance file {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, as_metadata(metadata))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def load_instance(path: str | os.PathLike[str]) -> LayerProblem:
    """Read an instance file.

    Raises:
        InvalidFileError: if the file is missing, damaged or not an instance file.
    """
    problem, _ = load_instance_with_provenance(path)
    return problem


def load_instance_with_provenance(path: str | os.PathLike[str]) -> tuple[LayerProblem, dict[str, object]]:
    """Read an instance file and what is known of its origin.

    Raises:
        InvalidFileError: if the file is missing, damaged or not an instance file.
    """
    source = Path(path)
    if not source.is_file():
        raise InvalidFileError(f"instance file {source}: expected an existing file, found none")
    with file_errors(f"instance file {source}", "safetensors"), safe_open(source, framework="pt") as file:
        metadata = from_metadata(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    if metadata.get("format") != FORMAT:
        raise InvalidFileError(
            f"instance file {source}: expected format {FORMAT}, found {metadata.get('format', 'none')}"
        )
    if not {"weight", "gram"} <= tensors.keys():
        raise InvalidFileError(
            f"instance file {source}: expected tensors weight and gram, found "
            f"{', '.join(sorted(tensors)) or 'none'}"
        )
    try:
        return _problem(tensors, metadata), _object(metadata, "provenance")
    except InputError as error:
        raise InvalidFileError(f"instance file {source}: {error}") from error
    except (
        RuntimeError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # torch on dtypes it does not compute in
        raise InvalidFileError(
            f"instance file {source}: expected a layer problem, found {found_of(error)[:120]}"
        ) from error


def _problem(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LayerProblem:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidFileError(f"tensor {name}: expected floats, found {tensor.dtype}")
    drift = None
    if "drift_linear" in tensors:
        if "drift_constant" not in tensors:
            raise InvalidFileError("drift: expected drift_linear and drift_constant, found the former alone")
        drift = Drift(tensors["drift_linear"], tensors["drift_constant"], tensors.get("drift_covariance"))
    fields = _object(metadata, "pattern")
    if set(fields) != {"keep", "block", "scope"}:
        raise InvalidFileError(
            f"metadata pattern: expected keep, block and scope, found {', '.join(map(str, fields)) or 'none'}"
        )
    tokens = metadata.get("tokens", "")
    if not tokens.isascii() or not tokens.isdigit():
        raise InvalidFileError(f"metadata tokens: expected a number of tokens, found {tokens[:60]!r}")
    if "name" not in metadata:
        raise InvalidFileError("metadata name: expected the name of the layer, found none")
    return LayerProblem(
        tensors["weight"],
        Gram(tensors["gram"], int(tokens), tensors.get("mean")),
        pattern_of(**fields),
        drift,
        tensors.get("metric"),
        metadata["name"],
    )


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object in one entry of the metadata."""
    text = metadata.get(key, "")
    found = json_object(text)
    if found is None:
        raise InvalidFileError(f"metadata {key}: expected an object of JSON, found {text[:60]!r}")
    return found
