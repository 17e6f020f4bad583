"""Perplexities of dense models that were measured before, kept for the runs that compare with them.

One small file for each, named after a hash of all that the number depends on: weights, tokens, dtype, device,
versions. ``SPARSESWAPS_CACHE`` says in which folder, an empty value that nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from .whole_files import write_atomically

FOLDER = "SPARSESWAPS_CACHE"


class KnownPerplexities:
    """Perplexities by what they depend on.

    Args:
        folder: where they are kept; by default what ``SPARSESWAPS_CACHE`` says, else the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = _users_folder() if folder is None else folder

    def get(self, facts: Mapping[str, Any]) -> float | None:
        """What was measured with these facts, None for nothing or an unreadable file."""
        path = self._path(facts)
        try:
            found = None if path is None else json.loads(path.read_text(encoding="utf-8"))["perplexity"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, float) else None

    def put(self, facts: Mapping[str, Any], perplexity: float) -> None:
        """Keep what was measured; a folder that cannot be written to keeps nothing."""
        path = self._path(facts)
        if path is not None:
            with suppress(InputError):
                write_atomically(path, json.dumps({**facts, "perplexity": perplexity}))

    def _path(self, facts: Mapping[str, Any]) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps(facts, sort_keys=True)
        return self._folder / "perplexity" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _users_folder() -> Path | None:
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "sparseswaps"
