"""Several processes that prune one model together, on torch.distributed alone.

The calibration windows are split over the ranks (see ``gathering``), and so are the rows of each layer for
solvers that see every row by itself. The masks are those of one process, bit for bit:

- the sums of a Gram matrix are partial sums over fixed groups of batches, added in their order whatever rank
  made them (floating-point addition is not associative: an all-reduce would depend on the ranks);
- a row's search depends on no other row. This holds on CPUs; on CUDA the product that starts a search may be
  rounded differently for another number of rows, so that exact ties may fall differently there.

Everything else (output metric, allocation, refinement, evaluation, solvers of whole layers, records, files)
is the work of the first rank, which sends the others what they need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RankLostError, SparseswapsError

T = TypeVar("T")

# Seconds that a rank waits for the others: the first one may evaluate or refine for long.
PATIENCE = 7200.0


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; one alone by default.

    Attributes:
        number: of this process, from 0.
        count: how many there are.
    """

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    def rows(self, total: int) -> slice:
        """Which of ``total`` rows are this rank's; none where there are fewer rows than ranks."""
        return slice(self.number * total // self.count, (self.number + 1) * total // self.count)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on the first rank, or its error, on every rank."""
        if self.count == 1:
            return compute()
        box: list[Any] = _attempt(compute) if self.first else [None, None]
        with _lost_ranks():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        found: T = _result(box)
        return found

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """What ``compute`` returns on each rank, or the first error among them, on every rank."""
        if self.count == 1:
            return [compute()]
        boxes: list[list[Any]] = [[None, None] for _ in range(self.count)]
        own = _attempt(compute)
        with _lost_ranks():
            dist.all_gather_object(boxes, own)
        return [_result(box) for box in boxes]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """``tensor`` of rank ``source`` in the same tensor of every rank."""
        if self.count > 1 and tensor.numel():
            with _lost_ranks():
                dist.broadcast(tensor, src=source)


@contextmanager
def joined(device: str = "auto", patience: float = PATIENCE) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started together, or this one alone.

    Args:
        device: ``cpu`` keeps to gloo; otherwise each process takes the GPU of its local rank where there are
            any, with NCCL between them.
        patience: seconds after which a rank that does not answer counts as lost.

    Raises:
        RankLostError: if the ranks cannot find each other.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Ranks()
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _lost_ranks():
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # after an error the others may be gone: the end of the process closes the connections then
    dist.destroy_process_group()


def _attempt(compute: Callable[[], Any]) -> list[Any]:
    """[error, None] or [None, result]."""
    try:
        return [None, compute()]
    except SparseswapsError as error:
        return [error, None]


def _result(box: list[Any]) -> Any:
    error, value = box
    if error is not None:
        raise error
    return value


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistError and what gloo and NCCL raise
        message = str(error).strip().splitlines()
        raise RankLostError(
            "processes of this run: expected all of them to answer, found one lost "
            f"({message[0] if message else type(error).__name__}); the same command with --resume goes on"
        ) from error
