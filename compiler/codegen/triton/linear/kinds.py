"""Which products with stored weights differ, so that equal ones share a kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch

from .....errors import UnsupportedError
from ....ir.quant.scheme import Scheme
from ..dtypes import TYPES
from .decoder import Decoder, decoder_of
from .layout import Layout

#: Types of activations that kernels read, and the type of products of integers.
REAL, INT8 = ("fp32", "fp16", "bf16"), "i8"


@dataclass(frozen=True)
class LinearKind:
    """What a product's kernel depends on: the scheme, the type of activations and results, that of a bias.

    `bias` is "" where there is none. `product` is the type that matrix instructions multiply in, where it is
    another than that of the activations: the interpreter multiplies bfloat16 by its bits. "i8": activations
    are rounded to 8 bits, as `round_to_int8` does, and products are of integers.
    """

    scheme: Scheme
    type: str
    bias: str = ""
    product: str = ""

    @cached_property
    def decoder(self) -> Decoder:
        """Raises UnsupportedError for a scheme that no kernel reads, or such activations."""
        found = decoder_of(self.scheme, self.integers)
        if found is None or self.type not in REAL:
            raise UnsupportedError(no_kernel(self.type, self.scheme, self.integers))
        return found

    @property
    def integers(self) -> bool:
        """Whether its products are of integers."""
        return self.product == INT8

    @property
    def multiplied(self) -> str:
        """The type of operands of matrix instructions."""
        return self.product or self.type

    @cached_property
    def stored(self) -> dict[str, str]:
        """The types of the pieces, as kernels name them."""
        pieces = self.scheme.pieces((1, self.decoder.block(self.scheme) or 1))
        return {
            name: {"f32": "fp32", "f16": "fp16"}.get(kind, kind)
            for name, (_, kind) in pieces.items()
        }

    @property
    def zeros(self) -> bool:
        """Whether groups have zero points of their own."""
        return "zeros" in self.stored

    @property
    def name(self) -> str:
        """A name for files and functions."""
        scheme = re.sub(r"[^a-z0-9]+", "_", str(self.scheme).lower()).strip("_")
        parts = ["linear", scheme, self.type]
        parts += [f"as_{self.product}"] if self.product else []
        return "_".join([*parts, *(["bias"] if self.bias else [])])

    def layout(self, width: int) -> Layout:
        """Where the codes of weights [.., N, width] lie."""
        bits, block = self.decoder.bits(self.scheme), self.decoder.block(self.scheme)
        return Layout(bits, block, width, self.integers)


def type_of(dtype: torch.dtype) -> str:
    """A type as kernels name it; "" for one that products are not taken in."""
    found = TYPES.get(dtype, "")
    return found if found in REAL else ""


def no_kernel(kind: str, scheme: Scheme, integers: bool = False) -> str:
    """What is said of a product that no kernel is for."""
    by = "in 8 bits by integers" if integers else "by weights"
    return f"no kernel multiplies {kind} {by} in {scheme}"
