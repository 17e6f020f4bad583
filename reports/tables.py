"""Tables of plain cells, written as HTML, Markdown, LaTeX (booktabs) and CSV.

The first two and LaTeX show formatted cells, CSV the values themselves.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cell = str | int | float | None
Row = tuple[Cell, ...]

ABSENT = "–"
# Characters from which on a cell is given several words' width.
LONG_TEXT = 32


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: what its cells are, with the unit.
        format: a format specification for numbers, such as ``.2f`` or ``.1%``; "" is ``str``.
        best: whether the smallest or largest number of the column is printed bold.
    """

    title: str
    format: str = ""
    best: Literal["", "min", "max"] = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption that says what to see.

    Attributes:
        name: stem of its files.
        caption: one or two sentences.
        columns: as many as each row has cells.
        rows: the cells; None is shown as a dash.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.name}: expected {len(self.columns)} cells in a row, found {len(row)}"
                )

    def _bold(self) -> set[tuple[int, int]]:
        """Places (row, column) of the best cells; none where all cells of a column are equal."""
        places: set[tuple[int, int]] = set()
        for position, column in enumerate(self.columns):
            cells = [
                (row[position], index)
                for index, row in enumerate(self.rows)
                if isinstance(row[position], int | float)
            ]
            numbers = [float(cell) for cell, _ in cells if isinstance(cell, int | float)]
            if not column.best or not numbers or min(numbers) == max(numbers):
                continue
            best = min(numbers) if column.best == "min" else max(numbers)
            shown = show(best, column.format)
            places |= {(index, position) for cell, index in cells if show(cell, column.format) == shown}
        return places

    def _is_number(self, position: int) -> bool:
        cells = [row[position] for row in self.rows if row[position] is not None]
        return bool(cells) and all(isinstance(cell, int | float) for cell in cells)

    def _class(self, position: int) -> str:
        """How a page lays a column out: numbers at the right, long texts with room for some words."""
        if self._is_number(position):
            return ' class="number"'
        return ' class="text"' if any(len(str(row[position])) > LONG_TEXT for row in self.rows) else ""

    def to_html(self) -> str:
        """A ``<table>`` with its caption; numbers are aligned right."""
        classes = [self._class(i) for i in range(len(self.columns))]
        bold = self._bold()
        lines = ["<table>", f"<caption>{inline_html(self.caption)}</caption>", "<thead><tr>"]
        for column, kind in zip(self.columns, classes, strict=True):
            lines.append(f'<th scope="col"{kind}>{html.escape(column.title)}</th>')
        lines.append("</tr></thead>\n<tbody>")
        for index, row in enumerate(self.rows):
            cells = []
            for position, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
                text = html.escape(show(cell, column.format))
                text = f"<strong>{text}</strong>" if (index, position) in bold else text
                cells.append(f"<td{classes[position]}>{text}</td>")
            lines.append(f"<tr>{''.join(cells)}</tr>")
        lines.append("</tbody></table>")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """A pipe table."""
        bold = self._bold()
        lines = [
            "| " + " | ".join(markdown(column.title) for column in self.columns) + " |",
            "|"
            + "|".join(" ---: " if self._is_number(i) else " --- " for i in range(len(self.columns)))
            + "|",
        ]
        for index, row in enumerate(self.rows):
            cells = []
            for position, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
                text = markdown(show(cell, column.format))
                cells.append(f"**{text}**" if (index, position) in bold else text)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_latex(self) -> str:
        """A ``table`` environment for the booktabs package."""
        bold = self._bold()
        layout = "".join("r" if self._is_number(i) else "l" for i in range(len(self.columns)))
        head = " & ".join(latex(column.title) for column in self.columns)
        lines = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{latex(self.caption)}}}",
            f"  \\label{{tab:{self.name}}}",
            f"  \\begin{{tabular}}{{{layout}}}",
            "    \\toprule",
            f"    {head} \\\\",
            "    \\midrule",
        ]
        for index, row in enumerate(self.rows):
            cells = []
            for position, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
                text = latex(show(cell, column.format))
                cells.append(f"\\textbf{{{text}}}" if (index, position) in bold else text)
            lines.append(f"    {' & '.join(cells)} \\\\")
        lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}"]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The cells themselves."""
        return write_csv([column.title for column in self.columns], self.rows)


def write_csv(header: Sequence[str], rows: Sequence[Row]) -> str:
    """Comma-separated values with a header line; None is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return buffer.getvalue()


def show(cell: Cell, specification: str = "") -> str:
    """A cell as text: ``specification`` applies to numbers, a dash stands for None and NaN."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ABSENT
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and math.isinf(cell):
        return "∞" if cell > 0 else "-∞"
    return format(cell, specification)


def span(values: Sequence[float], specification: str) -> str:
    """From the smallest to the largest of some numbers; one of them where they look the same."""
    low, high = format(min(values), specification), format(max(values), specification)
    return low if low == high else f"{low} to {high}"


def inline_html(text: str) -> str:
    """Plain text with ```code``` and ``**bold**`` as HTML."""
    parts = html.escape(text, quote=False).split("`")
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"<code>{part}</code>"
        else:
            pieces = part.split("**")
            for bold in range(1, len(pieces) - 1, 2):
                pieces[bold] = f"<strong>{pieces[bold]}</strong>"
            parts[index] = "".join(pieces)
    return "".join(parts)


_LATEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{",
    "}": "\\}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "≤": "$\\leq$", "≥": "$\\geq$",
    "→": "$\\to$", "∞": "$\\infty$", "×": "$\\times$", "α": "$\\alpha$", "β": "$\\beta$", "ρ": "$\\rho$",
    "τ": "$\\tau$", "–": "--", "·": "$\\cdot$", "−": "$-$", "√": "$\\surd$", "²": "$^2$", "…": "\\dots{}",
}  # fmt: skip


def latex(text: str) -> str:
    """Text for LaTeX: special characters escaped, ```code``` and ``**bold**`` as commands."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        escaped = "".join(_LATEX.get(character, character) for character in part)
        if index % 2:
            parts[index] = f"\\texttt{{{escaped}}}"
        else:
            pieces = escaped.split("**")
            for bold in range(1, len(pieces) - 1, 2):
                pieces[bold] = f"\\textbf{{{pieces[bold]}}}"
            parts[index] = "".join(pieces)
    return "".join(parts)


# What Markdown would read as more than text: marks of code, emphasis, links and cells, HTML, and underscores
# at the ends of words.
_MARKS = re.compile(r"[\\`*|\[~]|(?<![^\W_])_|_(?![^\W_])")


def markdown(text: str) -> str:
    """Plain text, such as a name, for Markdown on one line."""
    escaped = html.escape(" ".join(text.splitlines()), quote=False)
    return _MARKS.sub(r"\\\g<0>", escaped)


def inline_markdown(text: str) -> str:
    """Text with ```code``` and ``**bold**`` for Markdown, HTML in it as text."""
    parts = " ".join(text.splitlines()).split("`")
    return "`".join(part if index % 2 else html.escape(part, quote=False) for index, part in enumerate(parts))
