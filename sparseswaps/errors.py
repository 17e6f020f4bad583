"""Everything that sparseswaps raises on purpose.

    SparseswapsError
    ├── InputError (ValueError)            the caller gave something that cannot be used
    │   ├── InvalidPatternError            a sparsity pattern that does not exist or does not fit
    │   ├── InvalidProblemError            weights, Gram matrix, drift or mask that do not fit
    │   ├── InvalidModelError              a checkpoint or model that cannot be pruned
    │   ├── InvalidTextError               a text or inputs that cannot be used
    │   └── InvalidFileError               a mask, instance or record file that cannot be used
    ├── SolverNotInstalledError            the library behind a solver is missing
    ├── UnsupportedProblemError            the solver does not cover this kind of problem
    ├── NoIncumbentError                   a limit was reached before any mask was found
    ├── InvalidOutcomeError                a solver's mask or bound does not hold what it claims
    ├── RankLostError                      a process of a run on several was lost
    └── VerificationError                  a model is not what its mask file says

Each message is one sentence that names the thing, what was expected and what was found.
"""

from __future__ import annotations

__all__ = [
    "InputError",
    "InvalidFileError",
    "InvalidModelError",
    "InvalidOutcomeError",
    "InvalidPatternError",
    "InvalidProblemError",
    "InvalidTextError",
    "NoIncumbentError",
    "RankLostError",
    "SolverNotInstalledError",
    "SparseswapsError",
    "UnsupportedProblemError",
    "VerificationError",
]


class SparseswapsError(Exception):
    """Base of all deliberate errors."""


class InputError(SparseswapsError, ValueError):
    """The caller gave something that cannot be used."""


class InvalidPatternError(InputError):
    """A sparsity pattern that does not exist or does not fit the layer."""


class InvalidProblemError(InputError):
    """Weights, Gram matrix, drift or mask that do not form a layer problem."""


class InvalidModelError(InputError):
    """A checkpoint or model that cannot be loaded or pruned."""


class InvalidTextError(InputError):
    """A text, or inputs of calibration or evaluation, that cannot be used."""


class InvalidFileError(InputError):
    """A mask, instance or record file that cannot be used."""


class SolverNotInstalledError(SparseswapsError):
    """The library behind a solver is missing; the message says what to install."""


class UnsupportedProblemError(SparseswapsError):
    """The solver does not cover this kind of problem."""


class NoIncumbentError(SparseswapsError):
    """A limit was reached before any mask was found."""


class InvalidOutcomeError(SparseswapsError):
    """A solver's mask or bound does not hold what it claims."""


class RankLostError(SparseswapsError):
    """A process of a run on several was lost."""


class VerificationError(SparseswapsError):
    """A model is not what its mask file says."""
