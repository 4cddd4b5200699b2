"""The kinds of attention that Triton artifacts have kernels for, one of each, for `aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from einfold.compiler.codegen.triton.attention.cubins import Variant, variants
from einfold.compiler.codegen.triton.attention.kernels import (
    SPLITS,
    AttentionKernel,
    Kind,
    attention_kernel,
)
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.attention.low_rank import LowRankKind
from einfold.compiler.codegen.triton.attention.packed import PackedKind
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.ir.kv.store.abq.storage import Abq
from einfold.compiler.ir.kv.store.gear.storage import Gear
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.mikv.storage import MiKV
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache
from einfold.compiler.ir.kv.store.storage import GroupShape
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
from einfold.compiler.ir.kv.store.zipcache.storage import ZipCache
from einfold.compiler.passes.kv_share.cskv import features_of

#: Head sizes; float32 and nothing else at the largest.
HEADS = (64, 128, 256)

#: Packed storages as the passes choose them where nothing else is asked for.
STORAGES = {
    "KIVI, 4 bits": Kivi(residual=128, bits=4),
    "KIVI, 2 bits": Kivi(residual=128),
    "TurboQuant, 4 bits": TurboQuant(),
    "GEAR": Gear(residual=128, bits=4),
    "ZipCache": ZipCache(residual=0),
    "MiKV": MiKV(residual=32),
    "ABQ": Abq(),
    "MiniCache": MiniCache(residual=64),
}


def kinds_of(head: int) -> dict[str, Kind]:
    """The kinds of 8 query heads on 2 KV heads of this size, by the name of their row."""
    scale = head**-0.5
    plain = AttentionKind(2, 4, head, head, scale, 0, 0.0, False, "fp32", "fp32", False)
    if head == HEADS[-1]:
        return {"float32": plain}
    found: dict[str, Kind] = {
        "float32": plain,
        "int8": replace(plain, cache="i8", scaled=True),
        "window": replace(plain, window=1024),
        "softcap": replace(plain, softcap=50.0),
        "sinks in a window": replace(plain, sinks=True, window=128),
        "compensation count": replace(plain, counted=True),
        "slots beside packed tokens": replace(plain, lse=True),
        "chosen pages": replace(plain, page=4),
        "chosen pages, int8": replace(plain, cache="i8", scaled=True, page=4),
    }
    for name, storage in STORAGES.items():
        for part in storage.streams(GroupShape(2, head, head)):
            title = f"{name}, {part} bits" if part else name
            kind = PackedKind(2, 4, head, head, scale, 0.0, "fp32", storage.text, part)
            found[title] = kind
    # A fifth of the channels of 8 KV heads, as the pass rounds it; and so many that values are made in tiles.
    fifth = features_of(0.2, 8 * head)
    features = LowRankKind(8, 4, head, head, fifth, fifth, head // 2, scale, 0.0, "fp32", "fp32")
    found["CSKV"] = features
    found["CSKV, no rotary"] = replace(features, half=0)
    found["CSKV, 816 features"] = replace(features, key_rank=816, value_rank=816)
    return found


def functions_of(
    kind: Kind, context: int, capability: int
) -> Iterator[tuple[AttentionKernel, Variant]]:
    """What `--cubins` compiles of a kind, but for splits in more parts, which differ in a constant alone."""
    made = attention_kernel(kind, "kernel", (0,), context, DEVICES[capability])
    for each in variants(made):
        if each.parts <= SPLITS[1]:
            yield made, each
