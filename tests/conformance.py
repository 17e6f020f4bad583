"""Every solver on every kind of problem: add a solver here, and the contract tests cover it."""

from __future__ import annotations

import sparseswaps as ss
from sparseswaps.testing import CASES, FAMILIES, PATTERNS, all_masks, problem, raw_error, tolerance, with_raw

__all__ = [
    "CASES",
    "FAMILIES",
    "PATTERNS",
    "SOLVERS",
    "all_masks",
    "problem",
    "raw_error",
    "tolerance",
    "with_raw",
]

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
    ss.SparseFW(steps=60),
    ss.SparseFW(steps=20, alpha=0.0, saliency="ria", dtype="float32"),
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
    ss.FrankWolfe(steps=60),
    ss.SharedSplit(rounds=1, steps=60),
    ss.RowSplit(),
    ss.Qcr(),
    ss.Dnn(iterations=50),
    ss.SparseGPT(),
    ss.SparseGPT(blocksize=5),
    ss.SparseGPT(mask="fixed"),
    ss.ADMM(),
    ss.ADMM(mask="gradual"),
    ss.ALPS(),
    ss.ALPS(iterations=5, refine_steps=0, dtype="float64"),
    ss.Thanos(),
    ss.Thanos(blocksize=5),
    ss.Reconstruction(),
    ss.Reconstruction(method="conjugate-gradients"),
    ss.AlternatingReconstruction(),
    ss.Chain(ss.OneSwap(), ss.Reconstruction()),
    ss.BestOf(ss.Reconstruction(), ss.OneSwap()),
]
