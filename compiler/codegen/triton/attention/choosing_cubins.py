"""Kernels that choose pages compiled ahead of time as files of an artifact."""

from __future__ import annotations

from collections.abc import Iterator

from ..ahead import Signature
from ..cubins import Cubins, Variant, signature
from .choosing import ChoosingKernel

#: The types of tensors, but for the query's and those of the slots.
_POINTERS = {"used": "i32", "key_scale": "fp32", "uppers": "fp32", "tops": "fp32", "totals": "fp32"}
_POINTERS |= {"orders": "i64", "farthest": "i64", "chosen": "i32"}


def variants(made: ChoosingKernel) -> Iterator[Variant]:
    """What is compiled: each function, as every launch asks for it."""
    for function in made.functions:
        yield Variant(function, function, made.constants(function))


def signature_of(made: ChoosingKernel, variant: Variant) -> Signature:
    """The types of a function's arguments, its constants, and that addresses are multiples of 16, and strides
    where the size of what they are of is."""
    kind, names = made.kind, made.arguments(variant.function)
    pointers = {**_POINTERS, "query": kind.query, "keys": kind.bounds, "bounds": kind.bounds}
    sizes = {"keys": kind.key_size, "bounds": kind.numbers}
    strides = [
        name for name in names if "_" in name and sizes.get(name.split("_")[0], 16) % 16 == 0
    ]
    return signature(names, pointers, variant.constants, strides)


#: What is compiled of choices.
CHOICES = Cubins(variants, signature_of)
