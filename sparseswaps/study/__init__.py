"""Studies: problems × solvers × patterns × seeds × budgets, resumable, on one SQLite record.

run_study("study.toml", "study.sqlite")
build_report("study.sqlite", "report")
"""

from ..records.study_database import StudyDatabase
from .export import build_report, export, merge
from .plan import CostEstimate, plan_units
from .runner import StudyOutcome, StudyPlan, StudyProgress, plan_study, run_study
from .schema import Study, load_study, parse_study

__all__ = [
    "CostEstimate",
    "Study",
    "StudyDatabase",
    "StudyOutcome",
    "StudyPlan",
    "StudyProgress",
    "build_report",
    "export",
    "load_study",
    "merge",
    "parse_study",
    "plan_study",
    "plan_units",
    "run_study",
]
