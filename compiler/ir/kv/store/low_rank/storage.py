"""CSKV: a few features of every token, and the newest tokens as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ...sizes import Size
from ..storage import STORAGES, GroupShape, Storage


@STORAGES.register
@dataclass(frozen=True)
class LowRank(Storage):
    """Every token's keys and values of a group as `key_rank` and `value_rank` features (Wang et al. 2024).

    The features stand at the token's index in the text, whatever leaves the slots; the slots hold the tokens
    of a window. Keys' features are of before their rotary embedding. The bases [rank, heads * size] are
    weights of the program.
    """

    key_rank: int
    value_rank: int
    dtype: str = "f32"

    name = "low_rank"

    def __post_init__(self) -> None:
        if self.key_rank < 1 or self.value_rank < 1:
            raise IRError(
                f"{self.name}: a token has 1 or more features of its key and of its value, "
                f"not {self.key_rank} and {self.value_rank}"
            )
        if self.dtype not in ("f32", "f16"):
            raise IRError(f"{self.name}: features are stored as f32 or f16, not {self.dtype!r}")

    @property
    def windowed(self) -> bool:
        return True

    def rank(self, part: str) -> int:
        """Features of the "key" or the "value" of a token."""
        return self.key_rank if part == "key" else self.value_rank

    def whole(
        self, shape: GroupShape, batch: Size, capacity: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        for part in ("key", "value"):
            if self.rank(part) > shape.heads * shape.size(part):
                raise IRError(
                    f"{self.name}: {self.rank(part)} features are more than the "
                    f"{shape.heads * shape.size(part)} channels of the {part}s"
                )
            yield f"{part}_low", (batch, capacity, self.rank(part)), self.dtype
