"""What the head of the model sees."""

from __future__ import annotations

from typing import Any

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
class LastHidden(Observer):
    """`hidden` [B, S, M], at the site of that name."""

    name = "last_hidden"

    def sites(self, program: Program) -> list[Site]:
        return [sites.last_hidden(program)]

    def see(self, site: Site, *values: Any) -> Found:
        return {"hidden": values[0]}
