"""The model card of a pruned model: ``README.md`` with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from ..evaluation.speed import SpeedReport
from ..models.sources import Source
from .report import PruneReport
from .settings import UnitUpdate

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
    causal = report.perplexity_pruned is not None
    tags = ["sparseswaps", "pruned", *(["smaller"] if report.smaller else [])]
    tags += ["sparse"] if report.layers else []
    front = ModelCardData(
        base_model=base,
        tags=tags,
        **{"library_name": "transformers", **{key: dense[key] for key in _KEPT if key in dense}},
    )
    loader = "AutoModelForCausalLM" if causal else "AutoModel"
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {base or Path(report.model).name}, pruned",
        "",
        *_what_was_done(report),
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        *_quality(report),
        *_size(report),
        f"| layer error, {'warm start' if report.layers else 'old weights'} and result | | "
        f"{report.error_start:.5f}, {report.error:.5f} |",
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
        "The directory is an ordinary checkpoint"
        + (" of a smaller model" if report.smaller else "")
        + (" whose pruned weights are zeros:" if report.layers else ":"),
        "",
        "```python",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("DIRECTORY")',
        "```",
        "",
        "```sh",
        f"sparseswaps verify DIRECTORY   # {_checked(report)}",
        *(["vllm serve DIRECTORY"] if causal else []),
        "```",
        "",
    ]
    return "\n".join(lines)


def _what_was_done(report: PruneReport) -> list[str]:
    """Units that went, then weights that are zero, in sentences."""
    settings, plain = report.settings, report.settings.plain()
    by = (
        f"sparseswaps {report.versions['sparseswaps']}, an independent implementation of "
        "[SparseSwaps](https://arxiv.org/abs/2512.10922)"
    )
    said = []
    if report.smaller:
        weights = _WEIGHTS[settings.unit_update]
        said += [
            f"{'; '.join(_widths(report))}: units `{plain['units']}`, chosen by `{plain['unit_solver']}`, "
            f"weights of the layers that read them {weights}"
            + (", by " + by if not report.layers else "")
            + ". `units.safetensors` says which units stayed.",
        ]
    if report.layers:
        left_dense = sum(layer.left_dense for layer in report.layers)
        layers = f"{len(report.layers)} layers" + (
            f" ({left_dense} of them left dense)" if left_dense else ""
        )
        total = sum(layer.rows * layer.cols for layer in report.layers)
        zeros = sum(layer.sparsity * layer.rows * layer.cols for layer in report.layers) / total
        then = "Then " if report.smaller else ""
        said += [
            f"{then}{zeros:.2%} of the weights of {layers} are zero: pattern `{settings.pattern}`, solver "
            f"`{plain['solver']}` of {by}.",
        ]
    return "\n\n".join(said).split("\n")


def _widths(report: PruneReport) -> list[str]:
    """How many units of how many stay, in how many blocks."""
    counts = Counter((each.kept, each.units, each.kind) for each in report.consumers)
    return [
        f"{kept} of {units} {kind} stay in {blocks} blocks" for (kept, units, kind), blocks in counts.items()
    ]


def _size(report: PruneReport) -> list[str]:
    """Rows of the table for a smaller model."""
    if not report.smaller:
        return []
    return [
        f"| parameters | {report.parameters_dense:,} | {report.parameters:,} |",
        f"| weights, MB | {report.megabytes_dense:.1f} | {report.megabytes:.1f} |",
    ]


def _checked(report: PruneReport) -> str:
    """What ``verify`` looks at."""
    parts = ["every tensor, by units.safetensors"] if report.smaller else []
    parts += ["every zero and every kept weight, by masks.safetensors"] if report.layers else []
    return "; ".join(parts)


# What became of the weights that read the units that stay.
_WEIGHTS = {
    UnitUpdate.LEAST_SQUARES: "by least squares",
    UnitUpdate.BIAS: "the dense ones, with a bias for the means of what is missing",
    UnitUpdate.NONE: "the dense ones",
}
# A card's section with measured speed, which ``bench --card`` writes again.
SPEED = "## Measured speed"


def with_speed(card: str, speed: SpeedReport) -> str:
    """A card with what was measured of its model and of another one, in place of what it said before.

    Args:
        card: text of a model card.
        speed: of the model, and of the dense one in turns with it.
    """
    own, work = speed.speeds[0], speed.workload
    other = speed.speeds[1] if len(speed.speeds) > 1 else None
    threads = f", {speed.threads} threads" if speed.device == "cpu" else ""
    heads = ["", *([_shown(other.model)] if other else []), "this model", *(["ratio"] if other else [])]
    rows = []
    for name, values, others, ratio in (
        ("prefill", own.prefill, other.prefill if other else (), speed.prefill_ratio),
        ("decode", own.decode, other.decode if other else (), speed.decode_ratio),
    ):
        if not values:
            continue
        cells = [f"{name}, tokens/s", *([f"{median(others):.1f}"] if other else []), f"{median(values):.1f}"]
        if other:
            cells.append("" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
        rows.append(cells)
    lines = [
        SPEED,
        "",
        f"On {speed.device}{threads}, {speed.dtype.removeprefix('torch.')}: {work.batch} x {work.prompt} "
        f"tokens and {work.new} behind them, medians of {work.rounds} rounds in turns, ratios with 95 % "
        "intervals (`sparseswaps bench`).",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)),
        "",
    ]
    before, _, rest = card.partition(f"{SPEED}\n")
    _, heading, after = rest.partition("\n## ")
    if not rest:  # in front of how to repeat it, where a card has that
        before, heading, after = card.partition("\n## Repeat")
        before, heading = before + "\n", "\n## Repeat" if heading else ""
    return before + "\n".join(lines) + (heading + after if heading else "")


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
