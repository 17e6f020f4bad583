"""What the stages have in common: where they run and at what size, their clocks, and what they found."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Verdict(StrEnum):
    """Whether a finding is as it has to be; ``INFO`` is measured only."""

    PASS = "PASS"
    FAIL = "FAIL"
    INFO = "INFO"


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        stage: where it was found.
        verdict: what to think of it.
        name: what was looked at.
        value: what was measured, a number where it is one.
        unit: of the number.
        expected: what it has to be, or what was predicted.
    """

    stage: str
    verdict: Verdict
    name: str
    value: float | str
    unit: str
    expected: str

    @property
    def measured(self) -> str:
        """Value and unit for people."""
        shown = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        return f"{shown} {self.unit}".rstrip()


class Stage(NamedTuple):
    """A part of the acceptance that fails by itself.

    Attributes:
        name: what the command line calls it.
        seconds: its time limit.
        work: what it does, told on the bench.
    """

    name: str
    seconds: float
    work: Callable[[Bench], None]


class OverTimeError(Exception):
    """The stage has used up its time."""


class Bench:
    """Runs stages one after another and keeps what they find.

    Args:
        device: where the work is done.
        shrink: what all widths are divided by.
    """

    def __init__(self, device: torch.device, shrink: int) -> None:
        self.device = device
        self.shrink = shrink
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._end = float("inf")

    @property
    def on_card(self) -> bool:
        """Whether the device is one for which speed is promised."""
        return self.device.type == "cuda"

    @property
    def full_size(self) -> bool:
        """Whether goals in seconds mean anything: a card and the model's own widths."""
        return self.on_card and self.shrink == 1

    def size(self, full: int, least: int = 8) -> int:
        """A width of the model, divided."""
        return max(full // self.shrink, least)

    def run(self, stage: Stage) -> None:
        """Run a stage; whatever goes wrong in it is a finding."""
        begin = time.perf_counter()
        self._stage, self._end = stage.name, begin + stage.seconds
        try:
            stage.work(self)
        except OverTimeError as error:
            self.check("time limit of the stage", False, str(error), f"at most {stage.seconds:g} s")
        except Exception as error:
            traceback.print_exc()
            self.check("runs", False, f"{type(error).__name__}: {str(error)[:200]}", "no error")
        if self.on_card:
            torch.cuda.empty_cache()
        self.seconds[stage.name] = time.perf_counter() - begin
        self._end = float("inf")

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self._end - time.perf_counter()

    def in_time(self, what: str, seconds: float = 0.0) -> None:
        """Go on with ``what``, which needs so many seconds, or end the stage."""
        if self.left() < seconds:
            raise OverTimeError(f"stopped before: {what}")

    def check(self, name: str, passed: bool, value: float | str, expected: str, unit: str = "") -> None:
        """Something that has to be as expected."""
        self._add(Verdict.PASS if passed else Verdict.FAIL, name, value, unit, expected)

    def goal(self, name: str, reached: bool, value: float | str, expected: str, unit: str = "") -> None:
        """A goal of speed; elsewhere than on a card at full size it is measured only."""
        if self.full_size:
            self.check(name, reached, value, expected, unit)
        else:
            self.info(name, value, f"{expected} on a card at full size", unit)

    def info(self, name: str, value: float | str, expected: str = "", unit: str = "") -> None:
        """Something that is measured."""
        self._add(Verdict.INFO, name, value, unit, expected)

    def timed(self, work: Callable[[], T], repeats: int = 1) -> tuple[T, float]:
        """Result of ``work`` and its seconds, the mean of some calls."""
        self.synchronize()
        begin = time.perf_counter()
        result = work()
        for _ in range(repeats - 1):
            result = work()
        self.synchronize()
        return result, (time.perf_counter() - begin) / repeats

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_card:
            torch.cuda.synchronize(self.device)

    @property
    def failed(self) -> list[Row]:
        """What is not as it has to be."""
        return [row for row in self.rows if row.verdict is Verdict.FAIL]

    def _add(self, verdict: Verdict, name: str, value: float | str, unit: str, expected: str) -> None:
        row = Row(self._stage, verdict, name, value, unit, expected)
        self.rows.append(row)
        note = f"  [{expected}]" if expected else ""
        print(f"{verdict}  {row.stage:13s} {name}: {row.measured}{note}", flush=True)
