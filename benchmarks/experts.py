"""How far from optimal selections of experts are, and what it costs the model.

On a mixture, by default that of ``examples/train_demo_moe.py``, some experts of every layer go: those of the
proven best choice, those that the diagonal of its quadratic ranks lowest, those that REAP ranks lowest, and
random ones. Prints for each the error of its contributions and the error that the router leaves, of the first
mixture (whose inputs are the same for all) relative to the optimum and of all relative to their outputs, and
the held-out perplexity of the smaller model, means over draws of the calibration windows with their range.

    python examples/train_demo_moe.py --out demo-moe
    python benchmarks/experts.py demo-moe [--seeds 3] [--windows 64] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import sparseswaps as ss
from sparseswaps.calibration.corpus import standard_library_text
from sparseswaps.calibration.expert_groups import find_experts
from sparseswaps.evaluation.measures import perplexity
from sparseswaps.models.blocks import find_blocks
from sparseswaps.models.loading import LoadedModel, load_model
from sparseswaps.models.shrinking import shrunk_model
from sparseswaps.problems.units import UnitProblem
from sparseswaps.pruning.expert_pruning import ChosenExperts, prune_experts
from sparseswaps.solvers.units import Reap, UnitMasks, UnitSolver, WandaSp
from sparseswaps.solvers.units.base import UnitOutcome

LENGTH = 256
EVALUATION = 64
SHARES = (0.5, 0.25)
HEAD = """# Selections of experts against the proven optimum

`python benchmarks/experts.py demo-moe --windows 32` on the mixture of `examples/train_demo_moe.py` (1,345
steps): four layers of sixteen experts, two for a token. Errors are shares of the experts' squared output.

"""


@dataclass(frozen=True)
class RandomExperts(UnitSolver):
    """Any experts."""

    name: ClassVar[str] = "random-experts"

    seed: int = 0

    def run(self, problem: UnitProblem, init: Tensor | None, budget: ss.Budget) -> UnitOutcome:
        """The pattern's largest of random numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand((1, problem.units), generator=generator, dtype=torch.float64)
        return UnitOutcome(problem.pattern.top_k(scores)[0], ss.Status.FINISHED)


def solvers(seed: int) -> dict[str, UnitSolver]:
    """What is compared, by its name in the table."""
    return {
        "proven optimum": UnitMasks(ss.BranchAndBound()),
        "diagonal of Q": WandaSp(),
        "REAP": Reap(),
        "random": RandomExperts(seed),
    }


def windows_of(tokens: Tensor, count: int, seed: int) -> Tensor:
    """Random windows (count, LENGTH) of a text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (count,), generator=generator).tolist()
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


def shown(values: Sequence[float], digits: int) -> str:
    """Mean and range."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measured(
    loaded: LoadedModel, windows: Tensor, held_out: Tensor, share: float, solver: UnitSolver
) -> tuple[list[ChosenExperts], float]:
    """What is chosen, and the perplexity of the smaller model."""
    blocks = find_blocks(loaded.model)
    groups = find_experts(loaded.model, blocks, windows).groups
    keep = [ss.SparsityPattern(round((1 - share) * x.exchangeable), x.exchangeable) for x in groups]
    chosen = prune_experts(loaded.model, blocks, groups, keep, windows, solver=solver, update=False)
    small = shrunk_model(loaded, groups, [each.solution.kept for each in chosen])
    return chosen, perplexity(small.model, held_out)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, torch.device("cpu"), "float32")
    assert loaded.tokenizer is not None
    train, held_out = (
        torch.tensor(loaded.tokenizer(standard_library_text(part))["input_ids"])
        for part in ("train", "held-out")
    )
    test = held_out[: EVALUATION * LENGTH].view(EVALUATION, LENGTH)
    lines = [
        f"Dense perplexity {perplexity(loaded.model, test):.2f}; {arguments.seeds} draws of "
        f"{arguments.windows} windows of {LENGTH} tokens, {EVALUATION} held-out windows; mean (range).",
        "",
        "| experts that go | selection | first layer, error / optimum | all layers, contributions | "
        "all layers, as routed | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    dense = copy.deepcopy(loaded.model.state_dict())
    for share in SHARES:
        results: dict[str, list[tuple[float, float, float, float]]] = {}
        for seed in range(arguments.seeds):
            best = 0.0
            windows = windows_of(train, arguments.windows, seed)
            for name, solver in solvers(seed).items():
                loaded.model.load_state_dict(dense)
                chosen, value = measured(loaded, windows, test, share, solver)
                best = best or chosen[0].solution.error_masked
                norm = sum(each.output_norm for each in chosen)
                results.setdefault(name, []).append(
                    (
                        chosen[0].solution.error_masked / best,
                        sum(each.solution.error_masked for each in chosen) / norm,
                        sum(each.routed_error for each in chosen) / norm,
                        value,
                    )
                )
        for name, rows in results.items():
            columns = [
                shown([row[place] for row in rows], digits) for place, digits in enumerate((3, 4, 4, 2))
            ]
            lines.append(f"| {share:.0%} | {name} | {' | '.join(columns)} |")
            print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "experts.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
