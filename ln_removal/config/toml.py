"""Write nested dictionaries as TOML. The standard library reads TOML (tomllib) and does not write it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_toml(document: Mapping[str, object]) -> str:
    """TOML text that `tomllib.loads` reads back as an equal dictionary.

    Values may be strings, booleans, integers, finite floats, sequences of those, and mappings of all of these (written
    as tables). An entry whose value is None is left out: TOML has no null. Tuples come back as lists.
    """
    lines: list[str] = []
    _write_table(document, (), lines)
    return "\n".join(lines) + "\n"


def _write_table(table: Mapping[str, object], path: tuple[str, ...], lines: list[str]) -> None:
    """Append one table: its plain values first, its sub-tables after them, as TOML demands."""
    if path:
        lines.extend(["", "[" + ".".join(map(_key, path)) + "]"])
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, (*path, key), lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML also wants the delete character escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        assert math.isfinite(value), "recipes hold finite numbers only"
        return repr(value)
    assert isinstance(value, Sequence), f"TOML has no form for {type(value).__name__}"
    return "[" + ", ".join(_value(item) for item in value) + "]"
