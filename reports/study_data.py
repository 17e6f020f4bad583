"""The rows of studies as arrays, with the best known objective and bound of every matrix row.

An *instance* is one matrix row of one problem: what several solvers can be compared on. Its reference
is the smallest objective that any mask-only solver found, its bound the largest that any solver
proved; where they meet, the reference is proven to be optimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..records.study import StudyRows, TraceRecord, UnitRecord
from .statistics import Floats, gap

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# A reference is proven when its gap is at most this: exact solvers stop at 1e-6 plus their rounding.
PROVEN = 1e-5
# A mask counts as optimal when its error is this close to the proven optimum, in relative terms.
OPTIMAL = 1e-4
WEIGHT_UPDATE = "weight update"
BOUND = "bound"
EXACT = "exact"


@dataclass(frozen=True, eq=False)
class StudyData:
    """Finished units and their rows; all arrays of rows have one length.

    Attributes:
        records: everything as it was read.
        units: finished units on layer problems.
        unit: position in ``units`` of each row.
        instance: number of the instance of each row.
        objective, bound, seconds: of each row.
        swaps: of each row, -1 where unknown.
        reference, best_bound: of each instance.
    """

    records: StudyRows
    units: tuple[UnitRecord, ...]
    unit: Ints
    instance: Ints
    objective: Floats
    bound: Floats
    seconds: Floats
    swaps: Ints
    reference: Floats
    best_bound: Floats

    @classmethod
    def of(cls, records: StudyRows) -> StudyData:
        """Arrays from rows."""
        units = tuple(unit for unit in records.units if not unit.failure)
        place = {unit.unit: index for index, unit in enumerate(units)}
        rows = [row for row in records.rows if row.unit in place]
        unit = np.array([place[row.unit] for row in rows], dtype=np.int64)
        codes: dict[str, int] = {}
        problem = np.array([codes.setdefault(each.problem, len(codes)) for each in units], dtype=np.int64)
        index = np.array([row.row for row in rows], dtype=np.int64)
        width = int(index.max()) + 1 if len(rows) else 1
        keys = problem[unit] * width + index if len(rows) else unit
        _, instance = np.unique(keys, return_inverse=True)
        objective = np.array([row.objective for row in rows], dtype=float)
        bound = np.array([row.bound for row in rows], dtype=float)
        updates = np.array([each.group == WEIGHT_UPDATE for each in units], dtype=bool)
        mask_only = ~updates[unit] if len(rows) else np.zeros(0, dtype=bool)
        count = int(instance.max()) + 1 if len(rows) else 0
        reference = np.full(count, np.inf)
        np.minimum.at(reference, instance[mask_only], objective[mask_only])
        best_bound = np.zeros(count)
        np.maximum.at(best_bound, instance[mask_only], bound[mask_only])
        return cls(
            records,
            units,
            unit,
            instance.astype(np.int64),
            objective,
            bound,
            np.array([row.seconds for row in rows], dtype=float),
            np.array([-1 if row.swaps is None else row.swaps for row in rows], dtype=np.int64),
            reference,
            np.minimum(best_bound, reference),
        )

    @cached_property
    def proven(self) -> Bools:
        """Instances whose reference is proven to be optimal."""
        result: Bools = gap(self.reference, self.best_bound) <= PROVEN
        return result

    @cached_property
    def gap(self) -> Floats:
        """Reference gap of each row: ``(objective - reference) / objective``."""
        return gap(self.objective, self.reference[self.instance])

    @cached_property
    def certified_gap(self) -> Floats:
        """``(objective - best bound) / objective`` of each row: an upper bound on its true gap."""
        return gap(self.objective, self.best_bound[self.instance])

    @cached_property
    def optimal(self) -> Bools:
        """Rows whose mask is a proven optimum up to ``OPTIMAL``."""
        limit = self.reference[self.instance] * (1 + OPTIMAL)
        result: Bools = self.proven[self.instance] & (self.objective <= limit)
        return result

    @cached_property
    def mask_labels(self) -> tuple[str, ...]:
        """Labels of mask-only solvers that are not mere bounds, best mean gap last."""
        means = {}
        for label in dict.fromkeys(unit.label for unit in self.units):
            rows = self.rows_of(label)
            group = next(unit.group for unit in self.units if unit.label == label)
            if group not in (WEIGHT_UPDATE, BOUND) and rows.any():
                means[label] = float(self.gap[rows].mean())
        return tuple(sorted(means, key=lambda label: (-means[label], label)))

    @cached_property
    def main_labels(self) -> tuple[str, ...]:
        """Of each method with variants, the label with the smallest mean gap; the others as they are."""
        methods = {unit.label: unit.method for unit in self.units}
        best = {methods[label]: label for label in self.mask_labels}  # the last one is the best
        return tuple(label for label in self.mask_labels if best[methods[label]] == label)

    @cached_property
    def inexact_labels(self) -> tuple[str, ...]:
        """Of ``main_labels`` those that prove no optimum, best mean gap last; all if each of them does."""
        exact = {unit.label for unit in self.units if unit.group == EXACT}
        return tuple(label for label in self.main_labels if label not in exact) or self.main_labels

    def rows_of_units(self, chosen: Sequence[bool]) -> Bools:
        """Rows of the units that are chosen, one flag per unit."""
        flags = np.array(chosen, dtype=bool)
        result: Bools = flags[self.unit] if len(self.unit) else np.zeros(0, dtype=bool)
        return result

    def rows_of(self, label: str) -> Bools:
        """Rows of one solver."""
        return self.rows_of_units([unit.label == label for unit in self.units])

    @cached_property
    def cols(self) -> Ints:
        """Width of each row."""
        return np.array([unit.cols for unit in self.units], dtype=np.int64)[self.unit]

    def common_instances(self, labels: Sequence[str]) -> Bools:
        """Instances on which each of ``labels`` has a row."""
        common = np.ones(len(self.reference), dtype=bool)
        for label in labels:
            here = np.zeros(len(self.reference), dtype=bool)
            here[self.instance[self.rows_of(label)]] = True
            common &= here
        return common

    @cached_property
    def unit_reference(self) -> Floats:
        """Sum over its rows of the references, for each unit."""
        sums = np.zeros(len(self.units))
        np.add.at(sums, self.unit, self.reference[self.instance])
        return sums

    @cached_property
    def traces(self) -> dict[int, list[TraceRecord]]:
        """Trace points of each unit that has more than one."""
        place = {unit.unit: index for index, unit in enumerate(self.units)}
        found: dict[int, list[TraceRecord]] = {}
        for point in self.records.traces:
            if point.unit in place:
                found.setdefault(place[point.unit], []).append(point)
        return {index: points for index, points in found.items() if len(points) > 1}


def file_stem(name: str) -> str:
    """A name of a model as part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def is_per_row(pattern: str) -> bool:
    """Whether a pattern is a share of pruned weights rather than N:M."""
    return ":" not in pattern


def pattern_order(pattern: str) -> tuple[int, float, str]:
    """Sort key: shares first, ascending; then N:M."""
    if not is_per_row(pattern) or "=" in pattern:  # of units, maybe with masks behind
        return (1, 0.0, pattern)
    number = float(pattern.strip().rstrip("%"))
    return (0, number / 100 if "%" in pattern else number, pattern)


def pattern_name(pattern: str) -> str:
    """A share as a percentage, N:M as it is."""
    order = pattern_order(pattern)
    return pattern if order[0] else f"{100 * order[1]:g}%"
