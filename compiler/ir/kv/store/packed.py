"""What packed storages share: granules of tokens, and the pieces that a granule becomes.

A *granule* is the number of tokens that are packed together. In memory it is a few *pieces*, small matrices
of codes, scales and so on; the bulk buffer of a piece is [B, heads, granules, rows, width].

Sizes only; what the bytes mean stands in `compiler/ir/kv`, in torch or in NumPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .....errors import IRError
from ...options import missing, settle
from ..keep.policy import check_prefill
from ..sizes import Size, divided_down, most
from ..streams import Stream
from .storage import GroupShape, Piece, Storage

#: Tensors by the names of pieces.
Pieces = dict[str, Any]

#: Bits that a code may have.
BITS = (2, 3, 4, 8)

#: Codes are cut into planes of widths that divide a byte, (bits, how far they stand from the code's lowest):
#: so 3 bits are really 3, 8 codes in 3 bytes, and no code straddles two.
PLANES = {
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    6: ((4, 0), (2, 4)),
    8: ((8, 0),),
}

#: What an option that chooses parts of a token may be, and the parts that it chooses.
CHOSEN: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "keys": ("key",),
    "values": ("value",),
    "both": ("key", "value"),
}

#: Codes are packed along an axis whose length this divides, so that every width fills whole bytes.
CODES = 8

#: Bulk buffers hold a multiple of so many granules where products of integers take them: these go by blocks
#: of some.
GRANULES = 2


class Codec(Protocol):
    """Packs and unpacks a storage. Pieces are [K, G, R, W], or [.., G, R, W] to unpack."""

    def encode(self, storage: Any, keys_KTD: Any, values_KTD: Any, seen: Any) -> Pieces:
        """The pieces of whole granules of tokens; `seen` is what is known of how they were attended to."""

    def decode(self, storage: Any, pieces: Pieces) -> tuple[Any, Any]:
        """Keys and values [.., G, T, D], f32; a granule's tokens may stand in another order."""

    def encode_pair(self, storage: Any, keys: Any, values: Any) -> tuple[Pieces, Pieces]:
        """The pieces of two layers, of a storage that shares; keys and values [K, G, T, D] of both."""


class ArrayCodec(Protocol):
    """Packs a storage in NumPy, where running should not need torch."""

    def encode(self, storage: Any, keys_KTD: Any, values_KTD: Any) -> Pieces:
        """The pieces of whole granules of tokens, [K, G, R, W] each."""


@dataclass(frozen=True)
class Packed(Storage):
    """A storage whose older tokens leave the slots for bulk buffers.

    The first `sinks` tokens, which most attention goes to, and the newest `residual` stay in full precision
    in slots, and up to `slack` more (and what is left of a granule) wait there. `prefill` is as for
    policies: `exact` packs once the prompt has been read.
    """

    residual: int = 128
    slack: int = 64
    prefill: str = "exact"
    sinks: int = 4

    @property
    def codec(self) -> Codec:
        """What packs and unpacks it, in torch."""
        return self._beside("codec")  # type: ignore[no-any-return]

    @property
    def in_arrays(self) -> bool:
        """Whether arrays of NumPy are packed without torch, by the module `arrays` beside the codec."""
        return False

    @property
    def arrays(self) -> ArrayCodec:
        """What packs arrays of NumPy."""
        return self._beside("arrays")  # type: ignore[no-any-return]

    def streams(self, shape: GroupShape) -> Mapping[str, Stream]:
        """How a kernel reads it: the streams of its packed tokens, by the name of what part they are.

        Raises UnsupportedError for one that no kernel reads.
        """
        return self._beside("stream").streams(self, shape)  # type: ignore[no-any-return]

    def _beside(self, name: str) -> Any:
        """A module that stands beside the storage's own: its other halves load more than sizes need."""
        return importlib.import_module(f"{type(self).__module__.rpartition('.')[0]}.{name}")

    @property
    def lead(self) -> int:
        return self.sinks

    @property
    def newest(self) -> int:
        return self.residual

    @property
    def waiting(self) -> int:
        return self.slack + self.granule - 1

    @property
    def apart(self) -> str:
        """What is not packed, for reports."""
        first = f"the first {self.sinks}, " if self.sinks else ""
        return f"{first}the newest {self.residual} tokens and up to {self.waiting} more"

    @property
    def exact(self) -> bool:
        return self.prefill == "exact"

    @property
    def tile(self) -> int:
        """Granules that are decoded at a time, so that no step widens all of a cache."""
        return max(1, 1024 // self.granule)

    def blocks(self, shape: GroupShape) -> int:
        """Blocks of a token's channels, of keys as of values, that have scales of their own, where it is
        integral."""
        return 1

    def check(self, shape: GroupShape) -> None:
        """Raises IRError where heads of this shape cannot be stored so."""
        for part in ("key", "value"):
            if shape.size(part) % CODES:
                raise IRError(
                    f"{self.name} packs {CODES} codes together, which does not divide the "
                    f"{part} size {shape.size(part)} of a head"
                )

    def granules(self, tokens: Size) -> Size:
        return divided_down(most(tokens - self.sinks - self.residual, 0), self.granule)

    def bulk(
        self, shape: GroupShape, batch: Size, tokens: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        self.check(shape)
        granules = self.granules(tokens)
        for piece in self.pieces(shape):
            size = (batch, shape.heads, granules, piece.rows, piece.width)
            yield piece.name, size, piece.dtype

    def granule_bytes(self, shape: GroupShape) -> int:
        """Bytes of a granule, all heads."""
        self.check(shape)
        return shape.heads * sum(piece.nbytes for piece in self.pieces(shape))

    def check_waiting(self) -> None:
        """Raises IRError for sinks, a residual, slack or prefill that there cannot be."""
        if self.sinks < 0 or self.residual < 0 or self.slack < 1:
            raise IRError(
                f"{self.name} keeps 0 or more first and newest tokens as they are and 1 or more of slack, "
                f"not {self.sinks}, {self.residual} and {self.slack}"
            )
        check_prefill(self.prefill)


def check_bits(name: str, *bits: int, known: Sequence[int] = BITS) -> None:
    """Raises IRError for codes of a width that is none of the known ones."""
    for width in bits:
        if width not in known:
            raise IRError(f"{name} has codes of {', '.join(map(str, known))} bits, not {width}")


def settle_bits(storage: Any, known: Sequence[int] = BITS) -> None:
    """Settles `key_bits` and `value_bits`, which are `bits` where nothing else is said. Raises IRError for a
    width that is none of the known ones."""
    for part in ("key_bits", "value_bits"):
        if missing(getattr(storage, part)):
            settle(storage, **{part: storage.bits})
    check_bits(storage.name, storage.key_bits, storage.value_bits, known=known)


def check_divides(name: str, what: str, part: int, whole_name: str, whole: int) -> None:
    """Raises IRError where `part` does not divide `whole`."""
    if part < 1 or whole % part:
        raise IRError(f"{name}: a {what} of {part} does not divide the {whole_name} {whole}")


def planes(prefix: str, bits: int) -> list[tuple[str, int]]:
    """(name, bits) of the pieces that codes stand in."""
    names = [f"{prefix}_codes", f"{prefix}_codes_high"]
    return [(name, width) for name, (width, _) in zip(names, PLANES[bits], strict=False)]


def by_channel(prefix: str, bits: int, tokens: int, group: int, size: int) -> Iterator[Piece]:
    """Codes whose scales are by channel, one for each `group` tokens: packed along time."""
    for name, width in planes(prefix, bits):
        yield Piece(name, tokens * width // 8, size, "u8")
    yield Piece(f"{prefix}_scale", tokens // group, size, "f16")
    yield Piece(f"{prefix}_zero", tokens // group, size, "f16")


def codes_by_token(prefix: str, bits: int, tokens: int, size: int) -> Iterator[Piece]:
    """The planes of each token's codes: packed along channels."""
    for name, width in planes(prefix, bits):
        yield Piece(name, tokens, size * width // 8, "u8")


def by_token(prefix: str, bits: int, tokens: int, group: int, size: int) -> Iterator[Piece]:
    """Codes whose scales are by token, one for each `group` channels: packed along channels."""
    yield from codes_by_token(prefix, bits, tokens, size)
    yield Piece(f"{prefix}_scale", tokens, size // group, "f16")
    yield Piece(f"{prefix}_zero", tokens, size // group, "f16")
