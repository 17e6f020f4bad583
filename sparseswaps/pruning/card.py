"""The model card of a pruned model: ``README.md`` with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..models.sources import Source
from .report import PruneReport

CARD_FILE = "README.md"
# Front matter of the dense model that is true of the pruned one.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(report: PruneReport, origin: Source | None) -> str:
    """What was done to a model, what it is worth, how to load, verify and serve it.

    Args:
        report: of the run.
        origin: where the dense model came from, None if from no files.
    """
    from huggingface_hub import ModelCardData

    base, dense = _hub_name(report.model, origin), _front_matter(origin)
    front = ModelCardData(
        base_model=base,
        tags=["sparseswaps", "pruned", "sparse"],
        **{"library_name": "transformers", **{key: dense[key] for key in _KEPT if key in dense}},
    )
    settings, causal = report.settings, report.perplexity_pruned is not None
    left_dense = sum(layer.left_dense for layer in report.layers)
    layers = f"{len(report.layers)} layers" + (f" ({left_dense} of them left dense)" if left_dense else "")
    loader = "AutoModelForCausalLM" if causal else "AutoModel"
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {base or Path(report.model).name}, pruned",
        "",
        f"{report.sparsity:.2%} of the weights of {layers} are zero: pattern `{settings.pattern}`, solver "
        f"`{settings.plain()['solver']}` of sparseswaps {report.versions['sparseswaps']}, an independent "
        "implementation of [SparseSwaps](https://arxiv.org/abs/2512.10922).",
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        *_quality(report),
        f"| layer error, warm start and result | | {report.error_start:.5f}, {report.error:.5f} |",
        "",
        "## Repeat",
        "",
        "```sh",
        f"sparseswaps prune {_shown(report.model)} --settings settings.toml --out pruned",
        "```",
        "",
        "`settings.toml` holds every option; `record.sqlite` what was found for each layer. Texts, by the "
        "SHA-256 of their tokens:",
        "",
        f"- calibration: `{report.calibration_hash}`",
        *([f"- evaluation: `{report.evaluation_hash}`"] if report.evaluation_hash else []),
        "",
        "## Use",
        "",
        "The directory is an ordinary checkpoint whose pruned weights are zeros:",
        "",
        "```python",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("DIRECTORY")',
        "```",
        "",
        "```sh",
        "sparseswaps verify DIRECTORY   # every zero and every kept weight, by masks.safetensors",
        *(["vllm serve DIRECTORY"] if causal else []),
        "```",
        "",
    ]
    return "\n".join(lines)


def _quality(report: PruneReport) -> list[str]:
    if report.perplexity_dense is not None and report.perplexity_pruned is not None:
        length = f"{report.evaluation_windows} windows of {report.settings.length} tokens"
        return [f"| perplexity, {length} | {report.perplexity_dense:.4f} | {report.perplexity_pruned:.4f} |"]
    if report.cosine is not None:
        return [f"| cosine of {report.compared} to the dense model's | 1 | {report.cosine:.5f} |"]
    return []


def _shown(model: str) -> str:
    """A model as a reader may know it: the last part of a path of somebody's machine."""
    return Path(model).name if Path(model).is_absolute() else model


def _hub_name(model: str, origin: Source | None) -> str | None:
    """The dense model's name on the hub, None if it came from elsewhere."""
    local = origin is None or Path(origin.place).exists()
    return model if not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else None


def _front_matter(origin: Source | None) -> dict[str, Any]:
    """That of the dense model's card, empty without one."""
    from huggingface_hub import ModelCard

    folder = None if origin is None else origin.folder
    if folder is None or not (folder / CARD_FILE).is_file():
        return {}
    try:
        return dict(ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever a damaged card makes it raise: the model is pruned all the same
        return {}
