"""How a kernel reads packed tokens: inputs that lie in pieces, and keys and values as expressions of them.

Bytes of several codes and scales of groups are inputs whose neighbours share an element; so keys and values
are never widened in memory. A storage whose tokens are of two kinds is two streams, each over its own tokens.

Ranks of an element: b row, k KV head, t packed token, d channel of the key and f of the value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Ranks of an element of the keys and of the values.
AT = {"key": ("b", "k", "t", "d"), "value": ("b", "k", "t", "f")}


@dataclass(frozen=True)
class Source:
    """An input of the cascade: how it is read from a piece [B, K, G, R, W].

    `view` is "matrix" (all rows of all granules), "token" (column `at` of these), "row" (row `at` of each
    granule), "column" (column `at` of each granule, its rows along channels) or "entry" (row `at` of each
    granule where rows are one number). `shared` are ranks along which so many neighbours share an element.
    """

    name: str
    piece: str
    ranks: tuple[str, ...]
    shared: tuple[tuple[str, int], ...] = ()
    view: str = "matrix"
    at: int = 0

    def of(self, piece_BKGRW: Any) -> Any:
        """The view of a piece, a tensor; no number is copied."""
        if self.view == "row":
            return piece_BKGRW[:, :, :, self.at]
        if self.view == "column":
            return piece_BKGRW[..., self.at]
        if self.view == "entry":
            return piece_BKGRW[:, :, :, self.at, 0]
        matrix = piece_BKGRW.flatten(2, 3)
        return matrix if self.view == "matrix" else matrix[..., self.at]

    @property
    def read(self) -> str:
        """The input at its ranks, as a cascade writes it."""
        return f"{self.name}[{', '.join(self.ranks)}]"


@dataclass
class Stream:
    """What a stream reads, what its keys and values are made of, and how many tokens of a granule it has."""

    tokens: int
    sources: list[Source] = field(default_factory=list)
    key: str = ""
    value: str = ""

    def add(self, source: Source) -> str:
        """One more input; gives how it is read."""
        self.sources.append(source)
        return source.read
