"""Which attentions of a program differ, so that equal layers share one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .....errors import UnsupportedError
from ....ir.ops.attention import numbers_of
from ....ir.program import call_arguments
from ..dtypes import TYPES


@dataclass(frozen=True)
class AttentionKind:
    """What a cached attention's kernel depends on: shapes, options and types; everything but the layer.

    `group` query heads share a KV head. `query` and `cache` are types as kernels name them; `scaled` says
    that cached numbers are multiplied by a scale a channel when they are read, `counted` that slot 0 stands
    for a number of tokens. A cache of type u8 holds the codes of two channels a byte.
    """

    kv_heads: int
    group: int
    key_size: int
    value_size: int
    scale: float
    window: int
    softcap: float
    sinks: bool
    query: str
    cache: str
    scaled: bool
    counted: bool = False
    lse: bool = False
    """Whether the log-sum-exp is a result too, to merge with other parts of the keys by."""
    page: int = 0
    """Slots of a page where a table lists the pages that are read; 0 where all slots are."""

    @property
    def halved(self) -> bool:
        """Whether a byte of the cache holds two codes."""
        return self.cache == "u8"

    @property
    def name(self) -> str:
        """A name for files and functions; kinds that differ in the scale alone have the same."""
        parts = [f"attention_h{self.kv_heads * self.group}_kv{self.kv_heads}_d{self.key_size}"]
        parts += [f"v{self.value_size}"] if self.value_size != self.key_size else []
        parts += [f"window{self.window}"] if self.window else []
        parts += ["softcap"] if self.softcap else []
        parts += ["sinks"] if self.sinks else []
        parts += ["counted"] if self.counted else []
        parts += ["lse"] if self.lse else []
        parts += [f"pages{self.page}"] if self.page else []
        return "_".join([*parts, self.cache])


def kind_of(node: fx.Node, merged: bool = False, page: int = 0) -> AttentionKind:
    """The kind of a call over its slots. `merged` says that it reads other keys too, to be merged with;
    `page` that it reads pages of so many slots, which a table lists.

    Raises UnsupportedError for types that kernels do not read.
    """
    found = call_arguments(node)
    query, keys = found["q_BSHD"].meta["val"], found["key_cache_BKCD"].meta["val"]
    values = found["value_cache_BKCD"].meta["val"]
    kv_heads = int(keys.shape[1])
    layer = int(found["layer"])
    heads = int(query.shape[2])
    if not kv_heads or heads % kv_heads:
        raise UnsupportedError(
            f"layer {layer}: {heads} query heads cannot share {kv_heads} KV heads"
        )
    if keys.dtype != values.dtype:
        raise UnsupportedError(
            f"layer {layer} caches keys as {keys.dtype} and values as {values.dtype}; "
            "kernels read one type"
        )
    return AttentionKind(
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_size=numbers_of(keys),
        value_size=numbers_of(values),
        scale=float(found["scale"]),
        window=int(found.get("window", 0)),
        softcap=float(found["softcap"]),
        sinks=found["sinks_H"] is not None,
        query=type_name(query.dtype, layer),
        cache=type_name(keys.dtype, layer),
        scaled=found.get("key_scale_KD") is not None,
        counted=found.get("count_BK") is not None,
        lse=merged,
        page=page,
    )


def type_name(dtype: torch.dtype, layer: int) -> str:
    """A type as kernels name it. Raises UnsupportedError for one that they do not read."""
    if dtype not in TYPES:
        raise UnsupportedError(f"layer {layer}: no kernel reads {dtype}")
    return TYPES[dtype]
