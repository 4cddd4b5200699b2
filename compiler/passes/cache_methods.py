"""The methods that a recipe may choose for the KV cache, by name: one of each family at most.

A method is a policy, a storage or a reader that says so (`method`), given to all heads alike, or a pass of
its own. A recipe's table gives the method and its options, which are the fields of that or of the pass:

    [cache.prune]
    method = "streaming_llm"
    recent = 508

On the command line, and wherever a text stands for a table, the same is `streaming_llm:recent=508`
(`method_text.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.kv.keep.policy import POLICIES
from ..ir.kv.read.reader import READERS
from ..ir.kv.store.storage import STORAGES
from .base import Pass
from .kv_prune.keep import KeepByPolicy
from .kv_quant.pack import PackByStorage
from .kv_read.by_reader import ReadByReader
from .method_text import Family, Method, built
from .methods import PRUNE, SHARE

#: The families in the order in which their passes run, with the reason for it in `pipeline.py`.
FAMILIES: Mapping[str, Mapping[str, Method]] = {
    "share": Family(("cross_layer", "minicache", "cskv", "matryoshka_kv"), SHARE),
    "prune": Family(
        (
            *("streaming_llm", "razor_attention", "duo_attention", "snapkv", "h2o", "ems"),
            *(
                "scissorhands",
                "d2o",
                "kvmerger",
                "kvcrush",
                "elastic_cache",
                "expected_attention",
                "locret",
                "pyramid_kv",
                "ada_kv",
                "zipvl",
                "kvzip",
            ),
        ),
        PRUNE,
        (POLICIES, KeepByPolicy),
    ),
    "quant": Family(
        ("kivi", "turboquant", "gear", "zipcache", "mikv", "abq", "mustafar"),
        None,
        (STORAGES, PackByStorage),
    ),
    "read": Family((), None, (READERS, ReadByReader)),
}


def method_pass(family: str, table: Mapping[str, Any]) -> Pass:
    """The pass that a recipe's table asks for; `built` says what is raised."""
    made: Pass = built(f"cache.{family}", FAMILIES[family], table)
    return made


def resolved(family: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every option spelled out, as the manifest keeps it."""
    step = method_pass(family, table)
    return {"method": step.name, **step.options()}
