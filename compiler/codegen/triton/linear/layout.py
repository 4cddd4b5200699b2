"""Stored weights in the order that kernels load them: a permutation of the pieces' bits, made once.

A *segment* is 16 words of 32 bits of one row, whose columns lie in planes of 16: plane p of a word w is its
bits from p * b on, and column 16 p + w of the segment.

    packed u8 [.., N, G, block b / 8]  ->  codes i32 [.., S, N, 16]     S segments of 512 / b columns
    scales [.., N, G]                  ->  [.., G', N]
    zeros u8 [.., N, Z]                ->  [.., Z', N]

Products of integers have words of 8 bits, and 64 of them in a segment: a plane is 64 columns then.

So a tile of rows is one stretch of memory that threads load by 16 bytes, a plane's codes are the neighbours
that a matrix instruction sums over, and scales of a tile are neighbours too. No bit is added but what fills
the last segment: its codes are 0 and so are its scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....ir.quant.pack import pack_bits, unpack_bits

#: Words of a row that a segment has, and the bits of a word: a plane is the fewest summands that a matrix
#: instruction takes of halves, and twice those that it takes of integers.
WORDS, BITS = 16, 32
BYTES = 64
#: What a group of whole rows is padded to.
_WHOLE = 32
#: Codes that are repacked at a time: bounds the memory that it takes.
_SLAB = 1 << 24


@dataclass(frozen=True)
class Layout:
    """Where codes of `bits` bits lie, in groups of `block` along rows of `width` weights; 0: of whole rows.

    `integers`: for products of integers.
    """

    bits: int
    block: int
    width: int
    integers: bool = False

    @property
    def words(self) -> int:
        """Words of a row that a segment has."""
        return BYTES if self.integers else WORDS

    @property
    def dtype(self) -> torch.dtype:
        """The type of a word."""
        return torch.uint8 if self.integers else torch.int32

    @property
    def planes(self) -> int:
        """Codes of a word."""
        return (8 if self.integers else BITS) // self.bits

    @property
    def columns(self) -> int:
        """Weights of a row that a segment holds."""
        return self.words * self.planes

    @property
    def groups(self) -> int:
        """Groups of a row as they are stored."""
        return math.ceil(self.width / self.block) if self.block else 1

    @property
    def stored(self) -> int:
        """Weights of a row as they are stored."""
        return self.groups * (self.block or _WHOLE * math.ceil(self.width / _WHOLE))

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return math.ceil(self.stored / self.columns)

    @property
    def filled(self) -> int:
        """Groups of a row when its last segment is filled."""
        return max(self.groups, self.segments * self.columns // self.block) if self.block else 1

    def shapes(self, lead: tuple[int, ...], rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a weight's pieces in this order, by their names."""
        zeros = math.ceil(self.filled * self.bits / 8)
        return {
            "packed": (*lead, self.segments, rows, self.words),
            "scales": (*lead, self.filled, rows),
            "zeros": (*lead, zeros, rows),
            "units": (*lead, rows),
        }

    def repacked(self, name: str, piece: Tensor) -> Tensor:
        """A piece, by its name, in this order."""
        if name == "units":
            return piece
        if name == "packed":
            return self._codes(piece)
        rows = self.filled if name == "scales" else math.ceil(self.filled * self.bits / 8)
        turned = functional.pad(piece.movedim(-1, -2), (0, 0, 0, rows - piece.shape[-1]))
        return turned.contiguous()

    def restored(self, name: str, piece: Tensor) -> Tensor:
        """The piece that `repacked` made this of."""
        if name == "units":
            return piece
        if name == "packed":
            return self._packed(piece)
        rows = self.groups if name == "scales" else math.ceil(self.groups * self.bits / 8)
        return piece.movedim(-2, -1)[..., :rows].contiguous()

    def _codes(self, packed: Tensor) -> Tensor:
        *lead, rows = packed.shape[:-2]
        flat = packed.reshape(-1, rows, packed.shape[-2] * packed.shape[-1])
        found = packed.new_empty((len(flat), self.segments, rows, self.words), dtype=self.dtype)
        step = max(1, _SLAB // (self.segments * self.columns))
        for one, out in zip(flat, found, strict=True):
            for start in range(0, rows, step):
                chosen = slice(start, start + step)
                out[:, chosen] = self._words(one[chosen]).transpose(0, 1)
        return found.reshape(*lead, *found.shape[1:])

    def _words(self, bytes_NC: Tensor) -> Tensor:
        """The words [N, S, words] of rows of bytes."""
        codes = unpack_bits(bytes_NC, self.bits, self.stored)
        codes = functional.pad(codes, (0, self.segments * self.columns - codes.shape[-1]))
        planes = codes.unflatten(-1, (self.segments, self.planes, self.words))
        words: Tensor = planes[:, :, 0].to(self.dtype)
        for plane in range(1, self.planes):
            words |= planes[:, :, plane].to(self.dtype) << (self.bits * plane)
        return words

    def _packed(self, words: Tensor) -> Tensor:
        """The bytes [.., N, G, block b / 8] of words [.., S, N, words]."""
        mask = (1 << self.bits) - 1
        parts = [(words >> (self.bits * plane)) & mask for plane in range(self.planes)]
        codes = torch.stack(parts, dim=-2).movedim(-4, -3)  # [.., N, S, planes, words]
        rows = codes.flatten(-3)[..., : self.stored]
        return pack_bits(rows.unflatten(-1, (self.groups, -1)), self.bits)
