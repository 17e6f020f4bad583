"""The report of studies: everything that the rows have to say, on one page.

Sections whose rows do not exist are left out. Text is computed from the rows like the tables.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..records.study import ModelRecord, StudyRows, UnitRecord
from .axes import numbers
from .page import Fact, Section, build_page
from .sections.ablations import calibration_section, convergence_section, warm_start_section
from .sections.interaction import interaction_section
from .sections.model_results import model_sections
from .sections.objectives import objective_sections
from .sections.optimality import bounds_section, optimality_section
from .sections.timing import cost_section, timing_section
from .statistics import compare, gap
from .study_data import PROVEN, StudyData, pattern_name, pattern_order
from .tables import Column, Row, Table, span

# Failures whose reasons are listed.
LISTED_FAILURES = 20


def write_study_report(out_dir: str | os.PathLike[str], records: StudyRows) -> Path:
    """Write the page, its Markdown twin and all data into ``out_dir``; returns ``index.html``."""
    data = StudyData.of(records)
    sections: list[Section | None] = [
        optimality_section(data),
        bounds_section(data),
        comparison_section(data),
        timing_section(data),
        convergence_section(data),
        interaction_section(data, records.models),
        warm_start_section(data),
        calibration_section(data),
        *objective_sections([each for each in records.models if each.option("units") is None]),
        *model_sections(records.models, records.layers, records.bounds, records.sizes),
        cost_section(data),
        instances_section(data),
        solvers_section(records),
        method_section(records),
    ]
    titles = [str(study.get("title", study["name"])) for study in records.studies]
    descriptions = [str(study["description"]) for study in records.studies if study.get("description")]
    return build_page(
        out_dir,
        " · ".join(titles) or "Study",
        [section for section in sections if section is not None],
        " ".join(descriptions),
        _facts(data),
    )


def _facts(data: StudyData) -> list[Fact]:
    facts = []
    if len(data.reference):
        facts.append(Fact("matrix rows compared", f"{len(data.reference):,}"))
        facts.append(Fact("with a proven optimum", f"{int(data.proven.sum()):,}"))
        facts.append(Fact("solvers", str(len({unit.label for unit in data.units}))))
    done = [record for record in data.records.models if not record.failure]
    if done:
        facts.append(Fact("models", str(len({record.model for record in done}))))
        facts.append(Fact("whole-model runs", str(len(done))))
    everything: list[UnitRecord | ModelRecord] = [*data.records.units, *data.records.models]
    failures = sum(bool(record.failure) for record in everything)
    facts.append(Fact("failed units", str(failures)))
    if left := _unfinished(data.records):
        facts.append(Fact("planned units without a result", f"{left:,}"))
    return facts


def _unfinished(records: StudyRows) -> int:
    """Units that the studies planned and the rows do not hold."""
    planned = sum(int(study.get("units", 0)) for study in records.studies)
    return max(0, planned - len(records.units) - len(records.models))


def comparison_section(data: StudyData) -> Section | None:
    """Each solver against the next better one, paired over problems; None for fewer than two."""
    labels = data.main_labels
    rows: list[Row] = []
    text: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {label: {} for label in labels}
    for unit in data.units:
        if unit.label in errors and unit.objective:
            errors[unit.label][unit.problem] = unit.objective
    for worse, better in pairwise(labels):
        common = [problem for problem in errors[worse] if problem in errors[better]]
        if len(common) < 2:
            continue
        found = compare([errors[better][p] for p in common], [errors[worse][p] for p in common])
        low, high = found.change.low, found.change.high
        verdict = "smaller" if found.better else "larger" if found.worse else "no difference shown"
        rows.append(
            (
                better,
                worse,
                found.count,
                found.wins,
                found.ties,
                found.losses,
                found.change.estimate,
                found.change.low,
                found.change.high,
                found.p_value,
                verdict,
            )
        )
        if found.better:
            text[better] = (
                f"{better} leaves {-found.change.estimate:.1%} less error than {worse} "
                f"(95% interval {-high:.1%} to {-low:.1%}, {found.count} problems)."
            )
        else:
            text[better] = (
                f"{better} is not shown to be better than {worse}: its error is {found.change.estimate:+.1%} "
                f"(95% interval {low:+.1%} to {high:+.1%}, {found.count} problems)."
            )
    if not rows:
        return None
    table = Table(
        "comparisons",
        "Each solver against the one before it in the order of mean gaps, paired over problems: wins, "
        "ties and losses, "
        "geometric mean of the change in error with a 95% bootstrap interval, and the p-value of Wilcoxon's "
        "signed-rank test. The verdict needs both, the interval away from 0 and p < 0.05.",
        (
            Column("solver"),
            Column("against"),
            Column("problems"),
            Column("wins"),
            Column("ties"),
            Column("losses"),
            Column("change", "+.2%"),
            Column("from", "+.2%"),
            Column("to", "+.2%"),
            Column("p", ".2g"),
            Column("error is"),
        ),
        tuple(rows),
    )
    # the best that proves nothing first: what others find beyond it is known from their proofs
    best_first = sorted(text, key=lambda each: (each != data.inexact_labels[-1], -labels.index(each)))
    return Section("Which solver is better", tuple(text[label] for label in best_first), (table,))


def instances_section(data: StudyData) -> Section | None:
    """What was solved, with references; None without problems."""
    groups: dict[tuple[str, int, str], set[int]] = {}
    layers: dict[tuple[str, int, str], set[str]] = {}
    for index, unit in enumerate(data.units):
        key = (unit.source, unit.cols, unit.pattern)
        groups.setdefault(key, set()).add(index)
        layers.setdefault(key, set()).add(unit.problem)
    rows: list[Row] = []
    for key in sorted(groups, key=lambda key: (key[0], key[1], pattern_order(key[2]))):
        source, cols, pattern = key
        chosen = np.isin(data.unit, sorted(groups[key]))
        instances = np.unique(data.instance[chosen])
        if not instances.size:
            continue
        proven = data.proven[instances]
        gaps = gap(data.reference[instances], data.best_bound[instances])
        rows.append(
            (
                source,
                cols,
                pattern_name(pattern),
                len(layers[key]),
                int(instances.size),
                int(proven.sum()),
                float(gaps.mean()),
                float(data.reference[instances].sum()),
            )
        )
    if not rows:
        return None
    table = Table(
        "instances",
        f"Problems by origin, width and pattern: matrix rows, how many have a reference that is proven to "
        "be optimal "
        f"(gap at most {PROVEN:g}), the mean gap of the reference to the best bound, and the sum of "
        "references.",
        (
            Column("origin"),
            Column("cols"),
            Column("pattern"),
            Column("problems"),
            Column("rows"),
            Column("proven"),
            Column("gap of the reference", ".2%"),
            Column("reference error", ".6g"),
        ),
        tuple(rows),
    )
    problems, matrix_rows, solved = (f"{sum(map(int, numbers(rows, column))):,}" for column in (3, 4, 5))
    text = (
        f"{solved} of {matrix_rows} matrix rows, of {problems} problems, have a proven reference: it is "
        f"optimal; mean gaps of the references to the best bound: {span(numbers(rows, 6), '.2%')}."
    )
    return Section("Instances and references", (text,), (table,))


def solvers_section(records: StudyRows) -> Section:
    """Every solver with its options, how its units ended, and why some failed."""
    everything: list[UnitRecord | ModelRecord] = [*records.units, *records.models]
    statuses = sorted({record.status for record in everything})
    counts: dict[str, Counter[str]] = {}
    described: dict[str, tuple[str, str]] = {}
    for record in everything:
        counts.setdefault(record.label, Counter())[record.status] += 1
        if not record.failure:
            described[record.label] = (record.solver, record.group)
    rows: list[Row] = [
        (label, *described.get(label, ("", "")), *(counts[label][status] for status in statuses))
        for label in sorted(counts)
    ]
    table = Table(
        "solvers",
        "Every solver, its full description, its group, and how many of its units ended with which status.",
        (
            Column("label"),
            Column("solver"),
            Column("group"),
            *(Column(status.replace("_", " ")) for status in statuses),
        ),
        tuple(rows),
    )
    failures = [record for record in everything if record.failure]
    items = [table]
    text = (f"All {len(everything)} units ended without a failure.",)
    if failures:
        text = (
            f"{len(failures)} of {len(everything)} units failed; the rest of the report is without them.",
        )
        reasons = Counter((record.label, record.status, record.failure) for record in failures)
        items.append(
            Table(
                "failures",
                f"Reasons of failures, the {LISTED_FAILURES} most frequent.",
                (Column("solver"), Column("status"), Column("reason"), Column("units")),
                tuple((*reason, count) for reason, count in _most_common(reasons)),
            )
        )
    return Section("Solvers and statuses", text, tuple(items))


def _most_common(reasons: Counter[tuple[str, str, str]]) -> list[tuple[tuple[str, str, str], int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:LISTED_FAILURES]


def method_section(records: StudyRows) -> Section:
    """Definitions, seeds, texts, hardware and versions."""
    everything: Sequence[UnitRecord | ModelRecord] = [*records.units, *records.models]
    machines = [json.loads(record.machine) for record in everything if not record.failure]
    facts: dict[str, list[str]] = {}
    for machine in machines:
        for key, value in machine.items():
            if str(value) not in facts.setdefault(key, []):
                facts[key].append(str(value))
    rows: list[Row] = [(key, ", ".join(sorted(values))) for key, values in sorted(facts.items())]
    rows.append(("seeds", ", ".join(str(seed) for seed in sorted({record.seed for record in everything}))))
    texts = sorted(
        {
            (r.calibration, r.samples, r.length, r.calibration_hash[:12])
            for r in records.models
            if not r.failure
        }
    )
    rows += [
        (f"calibration text {text}", f"{samples} windows of {length} tokens, SHA-256 {digest}…")
        for text, samples, length, digest in texts
    ]
    evaluations = sorted(
        {(r.evaluation, r.evaluation_windows, r.length) for r in records.models if not r.failure}
    )
    rows += [
        (f"evaluation text {text}", f"{windows} windows of {length} tokens, not overlapping")
        for text, windows, length in evaluations
    ]
    table = Table(
        "setup", "Where and with what this was computed.", (Column("what"), Column("value")), tuple(rows)
    )
    text = (
        "**Error** of a row: rᵀGr with r the pruned part of the row and G the Gram matrix of the "
        "calibration inputs, "
        "recomputed in double precision from every mask. **Relative layer error**: summed over rows, "
        "divided by "
        "the same for the whole weight. **Gap**: (error − bound) / error, 0 where both are 0. "
        "**Reference**: the "
        "smallest error that any mask-only solver found on a row. Solvers that update weights never "
        "enter the "
        "references.",
        "**Perplexity**: exponential of the mean over windows of the mean cross-entropy over the shifted "
        "tokens of a "
        "window, windows of the given length cut from the joined text without overlap, tail dropped.",
        "Confidence intervals over rows treat rows as independent; rows of one layer share its Gram "
        "matrix, so they "
        "are optimistic. Paired comparisons are over problems.",
    )
    return Section("Definitions and setup", text, (table,))
