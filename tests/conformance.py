"""Every solver on every kind of problem: add a solver here, and the contract tests cover it."""

from __future__ import annotations

import torch

import sparseswaps as ss

# (label, solver); each must return a feasible mask on every problem below
SOLVERS: list[ss.Solver] = [
    ss.Random(seed=3),
    ss.Magnitude(),
    ss.Wanda(),
    ss.RIA(),
    ss.RIA(alpha=1.0),
    ss.OneSwap(),
    ss.OneSwap(max_swaps=2),
    ss.OneSwap(search="best"),
    ss.AdditiveSwap(),
    ss.AdditiveSwap(accept="error", max_swaps=3),
    ss.DSnoT(),
    ss.DSnoT(threshold=0.0, same_sign=False),
    ss.Greedy(),
    ss.Tabu(effort=0.2),
    ss.Chain(ss.Greedy(), ss.Tabu(effort=0.2)),
    ss.Chain(ss.Magnitude(), ss.OneSwap()),
    ss.BestOf(ss.RIA(), ss.Wanda()),
    ss.Enumeration(),
    ss.IteratedLocalSearch(kicks=20),
    ss.BranchAndBound(),
    ss.CorrEigenvalue(),
    ss.Naive(steps=60),
    ss.SharedSplit(rounds=1, steps=60),
    ss.RowSplit(),
    ss.Qcr(),
    ss.Dnn(iterations=50),
    ss.SparseGPT(),
    ss.SparseGPT(blocksize=5),
    ss.SparseGPT(mask="fixed"),
    ss.ADMM(),
    ss.ADMM(mask="gradual"),
    ss.Reconstruction(),
    ss.Reconstruction(method="conjugate-gradients"),
    ss.AlternatingReconstruction(),
    ss.Chain(ss.OneSwap(), ss.Reconstruction()),
    ss.BestOf(ss.Reconstruction(), ss.OneSwap()),
]

PATTERNS = ("0.5", "0.25", "2:4", "1:4", "3:4")
FAMILIES = (
    "correlated",
    "weakly-correlated",
    "duplicates",
    "zero-channels",
    "collinear",
    "huge-range",
    "rank-one",
)


def problem(family: str, pattern: str, drift: bool = False, seed: int = 0) -> ss.LayerProblem:
    """Three rows of twelve weights, small enough to enumerate."""
    return with_raw(family, pattern, drift, seed)[0]


def with_raw(
    family: str, pattern: str, drift: bool = False, seed: int = 0, rows: int = 3, cols: int = 12
) -> tuple[ss.LayerProblem, torch.Tensor, torch.Tensor]:
    """A problem with the raw activations that it was made from, each (cols, tokens), float64.

    Returns:
        The problem, the layer's inputs ``X̂`` and the dense inputs ``X`` that set its target.
    """
    inputs = ss.synthetic_activations(family, cols, 40, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    # dead channels stay dead: the pruned network's zeros are what the Gram matrix sees
    dense = inputs + 0.3 * noise * inputs.std(0) if drift else inputs
    weight = torch.randn((rows, cols), generator=generator, dtype=torch.float64).float()
    sums = ss.GramAccumulator(cols, drift=drift)
    sums.update(inputs, dense if drift else None)
    made = ss.LayerProblem(
        weight,
        sums.gram(),
        ss.SparsityPattern.parse(pattern, cols),
        ss.Drift.from_sums(weight, sums, 1.0) if drift else None,
        name=f"{family}-{pattern}-{drift}-{seed}",
    )
    return made, inputs.T, dense.T
