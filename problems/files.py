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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InvalidFileError
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
    try:
        return json.loads(found[_HEADER]) if _HEADER in found else found
    except ValueError:
        return {}


def save_instance(
    problem: LayerProblem, path: str | os.PathLike[str], provenance: Mapping[str, object] | None = None
) -> None:
    """Write ``problem`` to ``path``; the file appears complete or not at all.

    Args:
        problem: what to save.
        path: target, usually ``*.safetensors``.
        provenance: where the layer comes from (model, calibration, versions), kept as JSON.
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
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
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
    try:
        with safe_open(source, framework="pt") as file:
            metadata = from_metadata(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise InvalidFileError(f"instance file {source}: expected safetensors, found {error}") from error
    if metadata.get("format") != FORMAT or not {"weight", "gram"} <= tensors.keys():
        raise InvalidFileError(
            f"instance file {source}: expected format {FORMAT}, found {metadata.get('format', 'none')}"
        )
    drift = None
    if "drift_linear" in tensors:
        drift = Drift(tensors["drift_linear"], tensors["drift_constant"], tensors.get("drift_covariance"))
    pattern = json.loads(metadata["pattern"])
    problem = LayerProblem(
        tensors["weight"],
        Gram(tensors["gram"], int(metadata["tokens"]), tensors.get("mean")),
        pattern_of(**pattern),
        drift,
        tensors.get("metric"),
        metadata["name"],
    )
    return problem, json.loads(metadata["provenance"])
