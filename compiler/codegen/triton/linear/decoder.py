"""What a scheme brings to be read by a kernel: the text that makes values of codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....ir.quant.scheme import Piece, Scheme
from ....ir.registry import Registry

#: Bits of the mantissa of a type that kernels multiply in, and the exponent of 1.
MANTISSA = {"fp32": (23, 127), "fp16": (10, 15)}
#: A type as Triton names it.
TRITON = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}


class Decoder:
    """Base of all decoders: codes of 2, 4 or 8 bits whose groups have a scale, `value * scale`.

    `name` is the scheme's; its pieces are "packed" u8 [N, G, block * bits / 8], low bits first, "scales"
    [N, G], and "zeros" u8 [N, ceil(G * bits / 8)] where it has zero points.
    """

    name: ClassVar[str]

    scales: ClassVar[tuple[str, ...]] = ("f32", "f16")
    """The types that scales may be stored in."""

    exact: ClassVar[bool] = True
    """Whether every value has at most 8 significant bits, so that bfloat16 and tf32 hold it."""

    def bits(self, scheme: Any) -> int:
        """Bits of a code."""
        return 4

    def block(self, scheme: Any) -> int:
        """Weights of a row that share a scale; 0: all of them."""
        return int(scheme.block)

    def values(self, scheme: Any, kind: str, place: str) -> list[str]:
        """The lines that make `values` in `kind`, "fp32" or "fp16".

        They find `words`, int32 with a code at bit `place`, the text of a constant, and others around it; and
        `zero`, the rows' zero points, float32 [.., 1].
        """
        raise NotImplementedError

    def integers(self, scheme: Any, place: str) -> list[str]:
        """The lines that make int8 `values` of rows of integers, for a product with activations in 8 bits.

        They find `words`, uint8 with a code at bit `place`; and of schemes with groups `scale` and `zero`,
        int8 [.., 1]. None are given where the scheme's rows are no integers.
        """
        return []

    def scale(self) -> str:
        """The expression that makes a float32 of `scale` as it is stored."""
        return "scale.to(tl.float32)"


DECODERS: Registry[type[Decoder]] = Registry(
    "decoder", "einfold.compiler.codegen.triton.linear.decoders"
)


def decoder_of(scheme: Scheme, integers: bool = False) -> Decoder | None:
    """What decodes a scheme in a kernel, for a product of `integers` or of floats; None where no kernel reads
    it."""
    kind = DECODERS.get(scheme.name)
    if kind is None:
        return None
    found = kind()
    return found if (_fits_integers if integers else _fits)(found, scheme) else None


def _fits(decoder: Decoder, scheme: Scheme) -> bool:
    """Whether the pieces are those that kernels read, and groups and segments divide each other."""
    bits, block = decoder.bits(scheme), decoder.block(scheme)
    if bits not in (2, 4, 8) or 0 < block < 16 or block & (block - 1):
        return False
    size = block or 32
    pieces: Mapping[str, Piece] = scheme.pieces((1, size))
    if scheme.shared or not pieces.keys() <= {"packed", "scales", "zeros"}:
        return False
    known = {"packed": ((1, 1, size * bits // 8), "u8"), "zeros": ((1, 1), "u8")}
    scales = [((1, 1), kind) for kind in decoder.scales]
    return pieces["scales"] in scales and all(
        pieces.get(n, piece) == piece for n, piece in known.items()
    )


def _fits_integers(decoder: Decoder, scheme: Scheme) -> bool:
    """Whether rows are integers, in groups of whole planes where there are some."""
    block = decoder.block(scheme)
    fits = decoder.bits(scheme) in (2, 4, 8) and not block % 64 and not block & (block - 1)
    return scheme.integer_rows and fits and bool(decoder.integers(scheme, "0"))


def plain_codes(bits: int, place: str) -> str:
    """The line that makes integers of the codes at a place."""
    return f"q = (words >> {place}) & {(1 << bits) - 1}"
