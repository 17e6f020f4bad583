"""One self-contained page and its Markdown twin, from sections of text, tables and figures.

``index.html`` holds everything it shows: style, figures as inline SVG, no script, no request to any
network. ``README.md`` says the same in Markdown and shows the SVG files beside it. Every figure is
also there as SVG, PNG and CSV (``figures/``), every table as CSV and LaTeX (``tables/``). The same rows
give the same bytes; of a picture, with the same version of matplotlib.
"""

from __future__ import annotations

import html
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .figures import Figure
from .tables import Table, inline_html, inline_markdown, markdown

PAGE_FILE = "index.html"
MARKDOWN_FILE = "README.md"
# Characters that fit in a small card.
SHORT_FACT = 16


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, then tables and figures in order.

    Attributes:
        title: the heading.
        text: paragraphs; ```code``` and ``**bold**`` are understood.
        items: what follows the paragraphs.
    """

    title: str
    text: tuple[str, ...] = ()
    items: tuple[Table | Figure, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A figure for the head of the page, such as ``Fact("proven rows", "672")``."""

    name: str
    value: str


def build_page(
    out_dir: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    facts: Sequence[Fact] = (),
) -> Path:
    """Write the page, its twin and all data files into ``out_dir``.

    Args:
        out_dir: folder, created if needed; files of the same names are replaced.
        title: of the page.
        sections: in order; names of figures and tables must be different.
        subtitle: one sentence under the title.
        facts: key figures under the subtitle.

    Returns:
        Path of ``index.html``.

    Raises:
        ValueError: if two figures or tables share a name.
    """
    out = Path(out_dir)
    items = [item for section in sections for item in section.items]
    names = [(type(item), item.name) for item in items]
    if len(set(names)) < len(names):
        raise ValueError(f"figures and tables of {title}: expected different names, found one twice")
    pictures: dict[str, str] = {}
    for item in items:
        if isinstance(item, Table):
            _write(out / "tables" / f"{item.name}.csv", item.to_csv())
            _write(out / "tables" / f"{item.name}.tex", item.to_latex())
        else:
            pictures[item.name] = item.to_svg()
            _write(out / "figures" / f"{item.name}.csv", item.to_csv())
            _write(out / "figures" / f"{item.name}.svg", _standalone(pictures[item.name]))
            (out / "figures" / f"{item.name}.png").write_bytes(item.to_png())
    _write(out / MARKDOWN_FILE, _markdown(title, subtitle, facts, sections))
    page = out / PAGE_FILE
    _write(page, _html(title, subtitle, facts, sections, pictures))
    return page


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _standalone(svg: str) -> str:
    """The picture with a white ground, for viewers with a dark one."""
    opening = svg.index(">") + 1
    ground = '\n<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:opening]}{ground}{svg[opening:]}'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _html(
    title: str,
    subtitle: str,
    facts: Sequence[Fact],
    sections: Sequence[Section],
    pictures: dict[str, str],
) -> str:
    resources = files(__package__)
    template = string.Template(resources.joinpath("page.html").read_text(encoding="utf-8"))
    contents = "".join(
        f'<li><a href="#{_anchor(section.title)}">{html.escape(section.title)}</a></li>'
        for section in sections
    )
    fact_cells = "".join(map(_fact_html, facts))
    body = []
    for section in sections:
        body.append(f'<section>\n<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>')
        body += [f"<p>{inline_html(paragraph)}</p>" for paragraph in section.text]
        for item in section.items:
            body.append(
                _table_html(item) if isinstance(item, Table) else _figure_html(item, pictures[item.name])
            )
        body.append("</section>")
    return template.substitute(
        title=html.escape(title),
        css=resources.joinpath("page.css").read_text(encoding="utf-8"),
        subtitle=f'<p class="subtitle">{inline_html(subtitle)}</p>' if subtitle else "",
        facts=f'<dl class="facts">{fact_cells}</dl>' if facts else "",
        contents=f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(sections) > 2 else "",
        sections="\n".join(body),
    )


def _fact_html(fact: Fact) -> str:
    kind = ' class="long"' if len(fact.value) > SHORT_FACT else ""
    return f"<div{kind}><dt>{html.escape(fact.name)}</dt><dd>{html.escape(fact.value)}</dd></div>"


def _table_html(table: Table) -> str:
    links = f'<a href="tables/{table.name}.csv">CSV</a> · <a href="tables/{table.name}.tex">LaTeX</a>'
    return (
        f'<div class="table" id="table-{table.name}">\n<div class="scroll" tabindex="0">\n{table.to_html()}\n'
        f'</div>\n<p class="files">{links}</p>\n</div>'
    )


def _figure_html(figure: Figure, svg: str) -> str:
    label = html.escape(figure.title, quote=True)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    links = " · ".join(
        f'<a href="figures/{figure.name}.{kind}">{kind.upper()}</a>' for kind in ("csv", "svg", "png")
    )
    return (
        f'<figure id="figure-{figure.name}">\n{svg}\n'
        f"<figcaption><strong>{html.escape(figure.title)}.</strong> {inline_html(figure.caption)}"
        f'</figcaption>\n<p class="files">{links}</p>\n</figure>'
    )


def _markdown(title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    parts = [f"# {markdown(title)}"]
    if subtitle:
        parts.append(inline_markdown(subtitle))
    if facts:
        parts.append("\n".join(f"- {markdown(fact.name)}: **{markdown(fact.value)}**" for fact in facts))
    for section in sections:
        parts.append(f"## {markdown(section.title)}")
        parts += [inline_markdown(text) for text in section.text]
        for item in section.items:
            if isinstance(item, Table):
                links = f"[CSV](tables/{item.name}.csv), [LaTeX](tables/{item.name}.tex)"
                parts.append(f"{inline_markdown(item.caption)} ({links})")
                parts.append(item.to_markdown())
            else:
                parts.append(f"![{markdown(item.title)}](figures/{item.name}.svg)")
                links = f"[data](figures/{item.name}.csv), [SVG](figures/{item.name}.svg)"
                parts.append(f"**{markdown(item.title)}.** {inline_markdown(item.caption)} ({links})")
    return "\n\n".join(parts) + "\n"
