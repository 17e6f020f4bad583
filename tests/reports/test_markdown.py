"""The Markdown twin of a page says what the page says, whatever things are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseswaps.reports.page import Fact, Section, build_page
from sparseswaps.reports.tables import Column, Table, inline_markdown, markdown

NAMES = {
    "a|b": r"a\|b",
    "a`b`c": r"a\`b\`c",
    "<b>x</b>": "&lt;b&gt;x&lt;/b&gt;",
    "two\nlines\r\nand more": "two lines and more",
    "**x** *y* __z__": r"\*\*x\*\* \*y\* \_\_z\_\_",
    "[x](http://y)": r"\[x](http://y)",
    "back\\slash": r"back\\slash",
    "max_swaps=10": "max_swaps=10",
    "a & b": "a &amp; b",
    "~~x~~": r"\~\~x\~\~",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_markdown(name: str, tmp_path: Path) -> None:
    assert markdown(name) == NAMES[name]
    table = Table("t", "All of them.", (Column(name), Column("number")), ((name, 1), ("other", 2)))
    facts = [Fact(name, name)]
    build_page(tmp_path, name, [Section(name, ("One `x < y` & **more** <i>.",), (table,))], facts=facts)
    (twin,) = tmp_path.glob("*.md")
    text = twin.read_text()
    lines = text.splitlines()
    expected = NAMES[name]
    assert lines[0] == f"# {expected}"
    assert f"- {expected}: **{expected}**" in lines
    assert f"## {expected}" in lines
    assert f"| {expected} | number |" in lines
    assert f"| {expected} | 1 |" in lines
    assert "One `x < y` &amp; **more** &lt;i&gt;." in lines


def test_code_in_texts_stays_code() -> None:
    assert inline_markdown("`a|<b>`\n<c>") == "`a|<b>` &lt;c&gt;"
