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

Each message is one sentence that names the thing, what was expected and what was found. What the system and
the libraries of files raise is turned into such a sentence by ``file_errors``.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

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
    "file_errors",
    "found_of",
    "is_full",
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


# What the system says of a disk, a quota or a file that takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same in the words of libraries that hand on no number: SQLite, safetensors, Arrow.
_FULL_WORDS = re.compile(
    r"disk is full|no space left|file too large|quota exceeded|os error (28|122|27)\b", re.IGNORECASE
)


def is_full(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, says that the disk has no room left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if _FULL_WORDS.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def found_of(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    if isinstance(error, OSError) and error.strerror and type(error.strerror) is str:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def file_errors(where: str, expected: str = "to be able to write there") -> Iterator[None]:
    """What goes wrong with files while the block runs becomes one sentence about ``where``.

    Args:
        where: what is written or read, such as ``output FOLDER``.
        expected: what was hoped for where the disk is not full.

    Raises:
        InvalidFileError: for an error of the system, of SQLite or of safetensors.
    """
    import sqlite3

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, sqlite3.Error) as error:
        if is_full(error):
            raise InvalidFileError(f"{where}: expected room on the disk, found it full") from error
        raise InvalidFileError(f"{where}: expected {expected}, found {found_of(error)}") from error
