"""The textual form of a policy or storage: `name(field=value,..)`, read back without evaluating anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from ...errors import IRError
from .options import text_fields

T = TypeVar("T")

_CALL = re.compile(r"(\w+)(?:\(([^()]*)\))?")


def show(value: Any) -> str:
    """`window(sinks=4,recent=252)`: the fields of a dataclass in order; `name` alone where it has none."""
    shown = ",".join(f"{f.name}={_show(getattr(value, f.name))}" for f in text_fields(value))
    return f"{value.name}({shown})" if shown else str(value.name)


def read(text: str, kinds: Mapping[str, type[T]], what: str) -> T:
    """Reads what `show` gives. Raises IRError where the name or a field is unknown, or a value wrong."""
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in kinds:
        raise IRError(f"unknown {what} {text!r}; known: {', '.join(kinds)}")
    kind = kinds[match[1]]
    declared = {f.name: f for f in text_fields(kind)}
    values: dict[str, Any] = {}
    for item in filter(None, (match[2] or "").split(",")):
        name, _, written = item.partition("=")
        if name not in declared or name in values:
            raise IRError(f"the {what} {text!r} has an unknown or repeated field {name!r}")
        values[name] = _read(written, str(declared[name].type), text)
    missing = [n for n, f in declared.items() if n not in values and f.default is MISSING]
    if missing:
        raise IRError(f"the {what} {text!r} lacks {', '.join(missing)}")
    return kind(**values)


def _show(value: bool | int | float | str) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _read(written: str, kind: str, text: str) -> bool | int | float | str:
    try:
        if kind == "bool":
            return {"0": False, "1": True}[written]
        if kind == "int":
            return -count_of(written[1:]) if written.startswith("-") else count_of(written)
        if kind == "float" and math.isfinite(number := float(written[:40])):
            return number
    except (KeyError, ValueError):
        raise IRError(f"{text[:200]!r}: {written[:40]!r} is no {kind}") from None
    if kind == "float":
        raise IRError(f"{text[:200]!r}: {written[:40]!r} is no number that a cache has")
    return written


def count_of(text: str) -> int:
    """A number of heads, tokens or layers. Raises ValueError for what is none, or has ten digits."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{text[:40]!r} is no count")
    return int(text)
