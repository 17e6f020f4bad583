"""What came out: tables, figures and report pages, pure functions of plain rows."""

from .demo import DemoLayer, DemoMethod, DemoText, write_demo_report
from .figures import Figure
from .page import Fact, Section, build_page
from .tables import Column, Table

__all__ = [
    "Column",
    "DemoLayer",
    "DemoMethod",
    "DemoText",
    "Fact",
    "Figure",
    "Section",
    "Table",
    "build_page",
    "write_demo_report",
]
