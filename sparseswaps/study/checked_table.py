"""Tables of plain values that are read key by key; every error names the key."""

from __future__ import annotations

import difflib
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import InputError

REQUIRED: Any = object()


class CheckedTable:
    """A table that is read key by key.

    Args:
        values: the table; name: what messages call the whole; path: of the table in it.
        below: tables whose keys hold where it says nothing, the first that has one.

    Attributes:
        values: its own and what it has from ``below``.

    Every reader takes a key and a default and raises ``InputError`` if the value has another type.
    """

    def __init__(
        self, values: Mapping[str, Any], name: str, path: str, below: Sequence[CheckedTable] = ()
    ) -> None:
        self._own, self._name, self._path, self._below = values, name, path, below
        self.values: Mapping[str, Any] = ChainMap(dict(values), *(dict(table.values) for table in below))
        self._known: set[str] = set()

    def over(self, below: Sequence[CheckedTable], **changed: Any) -> CheckedTable:
        """The same table with keys changed, and with what it has from the tables ``below``."""
        return CheckedTable({**self._own, **changed}, self._name, self._path, below)

    def wrong(self, key: str, expected: str, found: str) -> NoReturn:
        """Raise the error of one key."""
        raise InputError(f"{self._place(key)}: expected {expected}, found {found}")

    def refuse(self, key: str, error: Exception) -> NoReturn:
        """Raise ``error`` as that of one key."""
        raise InputError(f"{self._place(key)}: {error}") from error

    def _place(self, key: str) -> str:
        """Where a key stands: in the table itself unless it is from one below."""
        holder = next((table for table in (self, *self._below) if key in table._own), self)
        return f"{self._name}, key {holder._path}{key}"

    def _get(self, key: str, default: Any) -> Any:
        for table in (self, *self._below):
            table._known.add(key)
        if key not in self.values and default is REQUIRED:
            self.wrong(key, "a value", "none")
        return self.values.get(key, default)

    def text(self, key: str, default: str = REQUIRED) -> str:
        """One text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.wrong(key, "text", repr(value))
        return str(value)

    def texts(self, key: str, default: Sequence[str] = REQUIRED) -> tuple[str, ...]:
        """Texts, or one of them."""
        return self._list(key, default, str, "text or a list of texts")

    def integer(self, key: str, default: int = REQUIRED, least: int = 0) -> int:
        """One whole number."""
        values = self._list(key, REQUIRED if default is REQUIRED else [default], int, "a whole number")
        if len(values) != 1 or isinstance(self.values.get(key), list) or values[0] < least:
            self.wrong(key, f"one whole number of at least {least}", repr(self.values.get(key)))
        return int(values[0])

    def integers(self, key: str, default: Sequence[int] = REQUIRED, least: int = 0) -> tuple[int, ...]:
        """Whole numbers, or one of them."""
        values = self._list(key, default, int, "whole numbers")
        if any(value < least for value in values):
            self.wrong(key, f"whole numbers of at least {least}", repr(list(values)))
        return values

    def number(self, key: str, default: float = REQUIRED, least: float = 0.0) -> float:
        """One number."""
        values = self.numbers(key, [default], least)
        if len(values) != 1:
            self.wrong(key, "one number", repr(self.values.get(key)))
        return values[0]

    def numbers(self, key: str, default: Sequence[float] = REQUIRED, least: float = 0.0) -> tuple[float, ...]:
        """Numbers, or one of them."""
        values = tuple(float(value) for value in self._list(key, default, (int, float), "numbers"))
        if any(not least <= value < math.inf for value in values):
            self.wrong(key, f"numbers of at least {least:g}", repr(list(values)))
        return values

    def any_list(self, key: str) -> list[Any]:
        """Values of any type, or one of them."""
        value = self._get(key, [])
        return value if isinstance(value, list) else [value]

    def option(self, key: str) -> Any:
        """A value of any type, None if there is none."""
        return self._get(key, None)

    def table(self, key: str) -> CheckedTable:
        """A table, empty if there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            self.wrong(key, "a table", repr(value))
        return CheckedTable(value, self._name, f"{self._path}{key}.")

    def tables(self, key: str) -> list[CheckedTable]:
        """A list of tables, empty if there is none."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self.wrong(key, f"tables [[{key}]]", repr(value))
        return [
            CheckedTable(each, self._name, f"{self._path}{key}[{index}].") for index, each in enumerate(value)
        ]

    def named_tables(self, key: str) -> dict[str, CheckedTable]:
        """Tables by name, none if there is no table ``key``."""
        named = self.table(key)
        return {name: named.table(name) for name in named.values}

    def _list(self, key: str, default: Any, kind: Any, expected: str) -> tuple[Any, ...]:
        value = self._get(key, default)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(each, kind) and not isinstance(each, bool) for each in values):
            self.wrong(key, expected, repr(value))
        if any(isinstance(each, int) and abs(each) >= 2**63 for each in values):
            self.wrong(key, "numbers of 64 bits", repr(value)[:60])
        return tuple(values)

    def finish(self) -> None:
        """Refuse keys that were never asked for, here or in a table above it."""
        for key in self._own:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, 1)
                hint = f"{near[0]} perhaps" if near else f"one of {', '.join(sorted(self._known))}"
                self.wrong(key, hint, "an unknown key")
