"""JSON that others wrote: parsed strictly, and read with a check of every type."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

_REQUIRED: Any = object()
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def parse(where: str, text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: for broken JSON, keys that appear twice, and numbers that JSON does not have.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
            raise ValueError(f"the key {twice!r} appears twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def parse_dict(where: str, text: bytes | str) -> dict[str, Any]:
    """The same, of a text that must hold an object."""
    value = parse(where, text)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {_kind(value)}")
    return value


class Section:
    """A JSON object with a name, whose fields are taken by type."""

    def __init__(self, where: str, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"{where} must be an object, got {_kind(fields)}")
        self.where, self.fields = where, fields

    def __contains__(self, key: str) -> bool:
        return self.fields.get(key) is not None

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The field of that type; the default where it is absent or null."""
        value = self.fields.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}.{key} is missing")
            return default
        # In Python, and not in JSON, a bool is an int and an int is no float.
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            wanted = _KINDS.get(kind, kind.__name__)
            raise ValueError(f"{self.where}.{key} must be {wanted}, got {_kind(value)}")
        if kind is float and abs(value) > sys.float_info.max:
            raise ValueError(f"{self.where}.{key} must be finite, got {_kind(value)}")
        return float(value) if kind is float else value

    def section(self, key: str) -> Section:
        """The object under ``key``."""
        return Section(f"{self.where}.{key}", self.get(key, dict))

    def strings(self, key: str) -> list[str]:
        """The list of strings under ``key``; empty where it is absent or null."""
        found: list[str] = self.get(key, list, [])
        for value in found:
            if not isinstance(value, str):
                raise ValueError(f"{self.where}.{key} must hold strings, got {_kind(value)}")
        return found

    def pair(self, key: str) -> tuple[int, int]:
        """The two positive integers under ``key``."""
        found = self.get(key, list)
        integers = [v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0]
        if len(found) != 2 or len(integers) != 2:
            raise ValueError(f"{self.where}.{key} must be two positive integers, got {found!r}")
        return found[0], found[1]


def _kind(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
