"""Colours, marks and lines of every figure.

The eight colours of Okabe and Ito (*Color Universal Design*, 2008) without black and yellow, which
vanish on a dark or a white page. Colour is never the only sign: every series also has its own mark
and, beyond six series, its own line, so a figure survives a photocopier. Heat maps use ``cividis``
(Nuñez, Anderton, Renslow, PLOS ONE 2018), whose lightness rises steadily for every kind of sight.
"""

from __future__ import annotations

from dataclasses import dataclass

# blue, vermillion, bluish green, reddish purple, orange, sky blue
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
HEAT = "cividis"

# Ink is replaced by the text colour of the page, so that one picture serves light and dark pages;
# a value of its own keeps it apart from every other colour.
INK = "#1b1e23"
GRID = "#8a8f98"
NEUTRAL = "#7d8590"


@dataclass(frozen=True)
class Style:
    """How one series looks."""

    colour: str
    mark: str
    line: str


def style(index: int) -> Style:
    """The look of series number ``index``, different for the first 168 of them."""
    return Style(
        COLOURS[index % len(COLOURS)],
        MARKS[index % len(MARKS)],
        LINES[index // len(COLOURS) % len(LINES)],
    )
