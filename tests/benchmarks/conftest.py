"""Scripts import each other by their bare names, as when they are run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import bare_checkout
import pytest


@pytest.fixture(scope="package", autouse=True)
def _folder_of_scripts() -> Iterator[None]:
    folder = str(bare_checkout.ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
