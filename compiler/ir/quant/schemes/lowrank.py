"""A low-rank correction beside any other scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .....errors import IRError
from ...options import settle as derive
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme, Stored
from .grouped import Grouped

if TYPE_CHECKING:
    from torch import Tensor


@SCHEMES.register
@dataclass(frozen=True)
class LowRank(Scheme):
    """The pieces of `base`, and left right = what it missed, as near as `rank` directions come.

    left   f16  [.., N, rank]
    right  f16  [rank, M]         of the weight as a whole: experts in a stack share it

    A linear is the base's own and two small products beside it:
        y = base(x) + (x rightᵀ) leftᵀ
    Other readers get the sum of both. Codes are the base's, in its own groups; a solver fills the base first,
    and the factors are the best for what it misses, on the inputs where the solver knows them.

    Bits of a weight beside the base's: 16 rank (1 / N + 1 / M). What the base misses of Gaussian weights has
    no direction of its own, and correcting it by 16 of 576 saves 7 % of its square; real ones have some.

    Source: LQER (Zhang et al. 2024, section 3.1) and EoRA (Liu et al. 2024); their factors are of 8 bits and
    of 16.
    """

    base: Scheme = field(default_factory=Grouped)
    rank: int = 16

    name = "lowrank"
    by_itself = False
    operators = {  # noqa: RUF012
        "linear": "the base's, and two products",
        "embedding": "stored_embedding",
    }

    def __post_init__(self) -> None:
        if isinstance(self.base, LowRank) or self.base.nearly_exact:
            raise IRError(f"a low-rank correction stands beside codes, not beside {self.base}")
        if not 1 <= self.rank <= 4096:
            raise IRError(f"the rank of a correction is 1 to 4096, not {self.rank}")
        derive(self, shared=self.base.shared | {"right"})

    def describe(self) -> str:
        return f"{self.base.describe()}, corrected in {self.rank} directions"

    def adapted(self, **options: Any) -> LowRank:
        """Options that are not the correction's are the base's."""
        own = {each.name for each in fields(self)}
        mine = replace(self, **{name: value for name, value in options.items() if name in own})
        rest = {name: value for name, value in options.items() if name not in own}
        return replace(mine, base=mine.base.adapted(**rest))

    @property
    def coded(self) -> Scheme:
        return self.base

    def beside(self, missed: Tensor, moment_MM: Tensor | None) -> dict[str, Tensor]:
        from ..low_rank import factors
        from ..pack import halved

        left, right = factors(missed.flatten(0, -2), self.rank, moment_MM)
        return {"left": halved(left.unflatten(0, missed.shape[:-1])), "right": halved(right)}

    @property
    def fewest_rows(self) -> int:
        return max(self.base.fewest_rows, 4 * self.rank)

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        return {
            **self.base.pieces(shape),
            "left": ((*shape[:-1], self.rank), "f16"),
            "right": ((self.rank, shape[-1]), "f16"),
        }

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        from ..low_rank import factors

        groups = self.base.groups(groups_RGB[:, 0])
        grid = self.base.grid(groups)
        settled = self.base.settle(grid)
        meant = self.base.values(self.base.nearest(groups, settled), settled)
        left, right = factors(groups_RGB[:, 0] - self._cut(meant, groups_RGB.shape[-1]), self.rank)
        return {**grid, "left": left, "right": right}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        own = {name: halved(grid[name]).float() for name in ("left", "right")}
        return self.base.settle(self._of_base(grid)) | own

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self.base.nearest(self.base.groups(groups_RGB[:, 0]), self._of_base(grid))

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        meant = self.base.values(codes_RGB, self._of_base(grid))
        right = grid["right"]
        return (self._cut(meant, right.shape[-1]) + grid["left"] @ right)[:, None]

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        pieces = self.base.pack(codes_RGB, self._of_base(grid))
        return pieces | {name: halved(grid[name]) for name in ("left", "right")}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        meant = self.base.dequantize(self._of_base(pieces), width)
        return meant + pieces["left"].float() @ pieces["right"].float()

    def _of_base(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in named.items() if name not in ("left", "right")}

    def _cut(self, groups_RGB: Tensor, width: int) -> Tensor:
        return groups_RGB.flatten(1)[:, :width]

    def call(self, editor: Any, kind: str, given: Mapping[str, Any], stored: Stored) -> Any:
        import torch

        if kind != "linear":
            return super().call(editor, kind, given, stored)
        ((name, (pieces, shape)),) = stored.items()
        narrow = self.base.call(editor, kind, given, {name: (self._of_base(pieces), shape)})
        beside = given["x"]
        for label in ("right", "left"):
            wide = editor.call(torch.ops.aten._to_copy.default, pieces[label], dtype=torch.float32)
            beside = editor.call(torch.ops.einfold.linear.default, beside, wide, None)
        return editor.call(torch.ops.aten.add.Tensor, narrow, beside)


PRESETS.register(Preset("lowrank", LowRank(), 1.0))  # as int4
