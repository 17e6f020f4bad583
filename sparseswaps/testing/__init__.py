"""The contract of a solver, for those who write one: ``check_solver(MySearch())`` in a test of your own."""

from .contract import check_claims, check_objectives, check_repeats, check_rows_alone, check_solver
from .problems import CASES, FAMILIES, PATTERNS, all_masks, problem, raw_error, tolerance, with_raw

__all__ = [
    "CASES",
    "FAMILIES",
    "PATTERNS",
    "all_masks",
    "check_claims",
    "check_objectives",
    "check_repeats",
    "check_rows_alone",
    "check_solver",
    "problem",
    "raw_error",
    "tolerance",
    "with_raw",
]
