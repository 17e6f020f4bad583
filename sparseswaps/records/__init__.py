"""What runs and studies leave behind: plain frozen rows in SQLite databases (standard library only)."""

from .run import LayerRecord, RefinementStep, known_mean
from .run_database import RunDatabase
from .study_database import StudyDatabase

__all__ = ["LayerRecord", "RefinementStep", "RunDatabase", "StudyDatabase", "known_mean"]
