"""The textual form of a policy or storage: `name(field=value,..)`, read back without evaluating anything.

A value may be such a text itself, of the same registry: `lowrank(base=grouped(bits=2,block=32),rank=16)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from ...errors import IRError
from .options import is_stated, text_fields

T = TypeVar("T")

_CALL = re.compile(r"(\w+)(?:\((.*)\))?")
#: Types of fields that are written as they are; a field of any other is a record.
_PLAIN = ("bool", "int", "float", "str")
#: Records within records: more than any that is written.
_DEEPEST = 4


def show(value: Any) -> str:
    """`window(sinks=4,recent=252)`: the fields of a dataclass in order; `name` alone where it has none."""
    shown = ",".join(f"{f.name}={_show(getattr(value, f.name))}" for f in text_fields(value))
    return f"{value.name}({shown})" if shown else str(value.name)


def read(text: str, kinds: Mapping[str, type[T]], what: str, depth: int = 0) -> T:
    """Reads what `show` gives. Raises IRError where the name or a field is unknown, or a value wrong."""
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in kinds or depth > _DEEPEST:
        raise IRError(f"unknown {what} {text[:200]!r}; known: {', '.join(kinds)}")
    kind = kinds[match[1]]
    declared = {f.name: f for f in text_fields(kind)}
    values: dict[str, Any] = {}
    for item in filter(None, _fields(match[2] or "", text, what)):
        name, _, written = item.partition("=")
        if name not in declared or name in values:
            raise IRError(f"the {what} {text!r} has an unknown or repeated field {name!r}")
        kind_of = str(declared[name].type)
        if kind_of in _PLAIN:
            values[name] = _read(written, kind_of, text)
        else:
            values[name] = read(written, kinds, what, depth + 1)
    needed = {
        n for n, f in declared.items() if f.default is f.default_factory is MISSING or is_stated(f)
    }
    missing = [name for name in declared if name in needed - values.keys()]
    if missing:
        later = all(is_stated(declared[name]) for name in missing)
        raise IRError(
            f"the {what} {text!r} lacks {', '.join(missing)}"
            + (", which was no choice when it was made; compile the model again" if later else "")
        )
    return kind(**values)


def _fields(inside: str, text: str, what: str) -> list[str]:
    """What stands between the commas, but for those in parentheses."""
    found, level = [""], 0
    for part in re.split(r"([(),])", inside):
        level += {"(": 1, ")": -1}.get(part, 0)
        if level < 0:
            break
        if part == "," and not level:
            found.append("")
        else:
            found[-1] += part
    if level:
        raise IRError(f"the {what} {text[:200]!r} has parentheses that do not match")
    return found


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
