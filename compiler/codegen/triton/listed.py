"""Streams that are walked by a list: which pages of the streamed rank a program reads, in what order.

    place = first + off_t                          a place in the list of a program's coordinates of the grid
    at_c  = table[b, k, place // page] * page + place % page      the coordinate that stands there

The plan means what it meant, over the listed coordinates alone: masks see the coordinate, and inputs are read
at it. Bounds on coordinates cut no tiles then, since neighbours in the list are none in the stream; the loop
ends where the list does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....errors import UnsupportedError
from ...ir.cascade.cascade import Rank, Tensor
from ...ir.cascade.plan import Plan
from .block import Block, Function
from .memory import base
from .roles import STREAM, Roles

#: The rank of the table's entries.
ENTRY = "n"


@dataclass(frozen=True)
class Listed:
    """A list of pages, as an argument of `generate`: two more inputs of the kernel, in int32.

    `table` [`ranks`, entries] holds numbers of pages of `page` neighbours in the stream; `count` [`counted`]
    how many of its entries are read. Both are over ranks of the grid.
    """

    page: int
    ranks: tuple[str, ...]
    counted: tuple[str, ...]
    table: str = "pages"
    count: str = "chosen"

    def added(self, plan: Plan) -> Plan:
        """The plan with both inputs. Raises UnsupportedError where a name is taken."""
        if {self.table, self.count} & set(plan.inputs) or ENTRY in plan.ranks:
            raise UnsupportedError(f"the plan has a {self.table}, {self.count} or {ENTRY} already")
        made = {
            self.table: Tensor(self.table, (*self.ranks, ENTRY), "integer"),
            self.count: Tensor(self.count, self.counted, "integer"),
        }
        ranks = {**plan.ranks, ENTRY: Rank(ENTRY, "N")}
        return replace(plan, ranks=ranks, inputs={**plan.inputs, **made})

    def check(self, roles: Roles) -> None:
        """Raises UnsupportedError where a program has more than one list."""
        if not {*self.ranks, *self.counted} <= set(roles.grid):
            raise UnsupportedError(f"a list over {self.ranks} is not one for each program")

    def end(self, head: Block) -> str:
        """Source of the length of a program's list."""
        return f"tl.load({_base(head, self.count, self.counted)}) * {self.page}"

    def coordinates(self, head: Block) -> list[str]:
        """Lines of the loop: which coordinates stand at the places of a tile, and which there are."""
        kernel = head.kernel
        index = kernel.index(kernel.roles.stream).text
        stride, start = kernel.stride(self.table, ENTRY), _base(head, self.table, self.ranks)
        place, page = (kernel.names.of((kind, STREAM), kind) for kind in ("place", "page"))
        live = "real_t" if kernel.virtual else "live_t"
        listed = "tl.where(virtual, 0, end)" if kernel.virtual else "end"
        entry = f"{start} + {place} // {self.page} * {stride}"
        found = f"{page} * {self.page} + {place} % {self.page}"
        lines = [
            f"{place} = first + off_t",
            f"{live} = {place} < {listed}",
            f"{page} = tl.load({entry}, mask={live}, other=0)",
        ]
        if not kernel.virtual:
            return [*lines, f"{index} = {found}"]
        size = kernel.extent(kernel.roles.stream).text
        return [
            *lines,
            f"{index} = tl.where(virtual, {place}, {found})",
            f"live_t = {place} < tl.where(virtual, {size} + {kernel.virtual}, end)",
        ]


def _base(head: Block, tensor: str, ranks: tuple[str, ...]) -> str:
    """The pointer at a program's coordinates of the grid."""
    kernel: Function = head.kernel
    kernel.tensors[tensor] = kernel.plan.inputs[tensor]
    return base(head, tensor, ranks).text
