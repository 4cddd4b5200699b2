"""Kernels of products compiled ahead of time as files of an artifact."""

from __future__ import annotations

from collections.abc import Iterator

from ..ahead import Signature
from ..cubins import Cubins, Variant, signature
from .kernels import MERGED, LinearKernel, tiles_of


def variants(kernel: LinearKernel) -> Iterator[Variant]:
    """What is compiled: each tile, for results and for the sums of a part, and the merge of these."""
    if kernel.kind.integers:
        yield Variant("quantize", "quantize", MERGED)
    for most, tile in tiles_of(kernel.kind).items():
        function = "matvec" if most == 1 else "matmul"
        for whole in (True, False):
            name = f"{function}{'' if most == 1 else most}{'' if whole else '_part'}"
            yield Variant(name, function, {**tile.constants, "WHOLE": whole})
    yield Variant("merge", "merge", MERGED)


def signature_of(kernel: LinearKernel, variant: Variant) -> Signature:
    """The types of a function's arguments, its constants, and that addresses and rows are multiples of 16."""
    kind = kernel.kind
    sums, codes = ("i32", "u8") if kind.integers else ("fp32", "i32")
    result = kind.type if variant.constants.get("WHOLE", True) else sums
    pointers = {
        "units": kind.stored["scales"],
        **kind.stored,
        "x": kind.type,
        "inputs": "i8",
        "sizes": "fp32",
        "codes": codes,
        "bias": kind.bias,
        "y": result,
        "sums": sums,
    }
    names = kernel.arguments(variant.function)
    return signature(names, pointers, variant.constants, ("outs", "width", "columns"))


#: What is compiled of products.
PRODUCTS = Cubins(variants, signature_of)
