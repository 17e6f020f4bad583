"""A real browser: pictures of a page, and what it measures of one as narrow as a telephone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# A window cannot be as narrow as a telephone, a frame in it can.
FRAME = """<iframe width="{width}" height="800" style="border: 0" srcdoc="{page}"></iframe><output></output>
<script>
onload = () => {{
  const frame = document.querySelector("iframe");
  const page = frame.contentDocument;
  const pictures = [...page.querySelectorAll("figure svg")];
  document.querySelector("output").textContent = JSON.stringify({{
    viewport: frame.contentWindow.innerWidth,
    document: page.documentElement.scrollWidth,
    pictures: pictures.map((each) => each.getBoundingClientRect().right),
    letters: pictures.flatMap((each) =>
      [...each.querySelectorAll("text")].map((text) => {{
        const scale = each.getBoundingClientRect().width / each.viewBox.baseVal.width;
        return scale * parseFloat(getComputedStyle(text).fontSize);
      }})),
    tables: [...page.querySelectorAll("table")].map((each) =>
      each.parentElement.getBoundingClientRect().right),
  }});
}};
</script>"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A browser without a window, with a profile in ``folder``; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser found: expected chromium on the path")
    command = [
        found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--enable-logging=stderr", "--v=0", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check_fits(page: Path, folder: Path, width: int) -> None:
    """Nothing of a page is beside a screen of ``width`` pixels, and letters in its figures can be read."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))))
    result = run(folder, "--dump-dom", frame.as_uri())
    found = json.loads(html.unescape(re.search(r"<output>(.*?)</output>", result.stdout, re.DOTALL)[1]))
    assert found["viewport"] == width
    assert found["document"] <= width
    assert found["pictures"]
    assert max(found["pictures"] + found["tables"]) <= width
    # the smallest letters of books have 8 points at 72 per inch; a telephone's pixels are about as large
    assert min(found["letters"]) >= 8
