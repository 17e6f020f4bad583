"""Figures: data, caption and the drawing of exactly that data.

A figure is drawn from the rows that are written beside it as CSV and from nothing else. SVG text
stays text, and its ink takes the colour of the page, so one picture serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from .palette import GRID, INK
from .tables import Row, write_csv

Draw = Callable[[Canvas, tuple[Row, ...]], None]

# Inches: as wide as a telephone's screen, where text of this size can still be read.
WIDTH = 4.6
DPI = 200
_LOOK: Any = {  # matplotlib's type of its own settings is a list of 300 literals
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.alpha": 0.3,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


@dataclass(frozen=True)
class Figure:
    """A picture of some rows.

    Attributes:
        name: stem of its files.
        title: a few words, for the table of contents and screen readers.
        caption: says what to see.
        header: names of the data's columns.
        rows: the data.
        draw: puts the rows on an empty canvas.
        height: in inches, without a legend below the plot, for which the canvas grows.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    draw: Draw = field(repr=False, compare=False)
    height: float = 3.2

    def to_csv(self) -> str:
        """The data of the picture."""
        return write_csv(self.header, self.rows)

    def to_svg(self) -> str:
        """The picture as SVG, the same bytes for the same data."""
        buffer = io.BytesIO()
        with mpl.rc_context({**_LOOK, "svg.hashsalt": self.name}):
            canvas = self._canvas()
            FigureCanvasSVG(canvas)
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue().decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # groups are numbered from 1 in every picture, and nothing refers to their numbers
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
        text = text.replace(INK, "currentColor")
        text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
        return re.sub(r"\n\s*", "\n", text)

    def to_png(self) -> bytes:
        """The picture on white, for places that show no SVG."""
        buffer = io.BytesIO()
        with mpl.rc_context({**_LOOK, "savefig.facecolor": "white"}):
            canvas = self._canvas()
            canvas.set_facecolor("white")
            FigureCanvasAgg(canvas)
            canvas.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()

    def _canvas(self) -> Canvas:
        canvas = Canvas(figsize=(WIDTH, self.height))
        self.draw(canvas, self.rows)
        return canvas
