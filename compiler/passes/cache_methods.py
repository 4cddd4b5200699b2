"""The methods that a recipe may choose for the KV cache, by name: one of each family at most.

A recipe's table gives the method and its options, which are the fields of the pass:

    [cache.prune]
    method = "streaming_llm"
    recent = 508

On the command line, and wherever a text stands for a table, the same is `streaming_llm:recent=508`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .base import Pass
from .kv_prune.ems import EMS
from .kv_prune.h2o import H2O
from .kv_prune.razor_attention import RazorAttention
from .kv_prune.snapkv import SnapKV
from .kv_prune.streaming_llm import StreamingLLM
from .kv_quant.gear import Gear
from .kv_quant.kivi import Kivi
from .kv_quant.mikv import MiKV
from .kv_quant.zipcache import ZipCache
from .kv_share.cross_layer import CrossLayer
from .kv_share.cskv import CSKV
from .kv_share.minicache import MiniCache

PRUNE: Mapping[str, type[Pass]] = {
    kind.name: kind for kind in (StreamingLLM, RazorAttention, SnapKV, H2O, EMS)
}
QUANT: Mapping[str, type[Pass]] = {kind.name: kind for kind in (Kivi, Gear, ZipCache, MiKV)}
SHARE: Mapping[str, type[Pass]] = {kind.name: kind for kind in (CrossLayer, MiniCache, CSKV)}

#: The families in the order in which their passes run, with the reason for it in `pipeline.py`.
FAMILIES: Mapping[str, Mapping[str, type[Pass]]] = {"share": SHARE, "prune": PRUNE, "quant": QUANT}


def read_method(family: str, text: str) -> dict[str, Any]:
    """The table that `METHOD:key=value,..` stands for. Raises ValueError where it is written otherwise."""
    method, colon, listed = text.strip().partition(":")
    table: dict[str, Any] = {"method": method}
    if not colon:
        return table
    for item in listed.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in table:
            raise ValueError(
                f"cache.{family} is written METHOD:key=value,key=value with each key once; "
                f"{item!r} in {text!r} is not"
            )
        table[key] = value
    return table


def method_pass(family: str, table: Mapping[str, Any]) -> Pass:
    """The pass that a recipe's table asks for. Raises ValueError with a sentence for what is wrong in it."""
    known = FAMILIES[family]
    options = dict(table)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in known:
        raise ValueError(f"cache.{family}.method is one of {', '.join(known)}, not {method!r}")
    kind = known[method]
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in fields:
            raise ValueError(
                f"cache.{family} has an unknown key {name!r}; {method} takes {', '.join(fields)}"
            )
    try:
        built: Pass = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("cache", family, *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}, found {first.get('input')!r}") from error
    return built


def resolved(family: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every option spelled out, as the manifest keeps it."""
    step = method_pass(family, table)
    return {"method": step.name, **step.options()}
