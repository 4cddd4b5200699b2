"""Keys and values of each layer, averaged over the rows of the text."""

from __future__ import annotations

from typing import Any

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
class KVMeans(Observer):
    """`mean` [S, K, D] of the keys, as they are cached (rotated), and of the values of each layer."""

    name = "kv_means"

    def sites(self, program: Program) -> list[Site]:
        return sites.keys_and_values(program, rotated=True)

    def see(self, site: Site, *values: Any) -> Found:
        return {"mean": values[0].mean(0)}
