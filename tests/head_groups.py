"""A layout of unequal head groups by hand, for tests of what comes after the passes that choose them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup
from einfold.compiler.ir.program import Program
from einfold.compiler.passes.base import Pass, PassResult
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.compiler.recipe import Recipe


@dataclass(frozen=True)
class KeepLast(Pass):
    """The last KV head of each layer keeps all, the others a window, in this order of groups."""

    window: Window

    name = "keep_last"

    def run(self, program: Program) -> PassResult:
        assert program.layout is not None
        layers = []
        for layer in program.layout.layers:
            others = tuple(range(layer.kv_heads - 1))
            full = HeadGroup((layer.kv_heads - 1,), Full())
            layers.append(replace(layer, groups=(full, HeadGroup(others, self.window))))
        program.layout = CacheLayout(tuple(layers))
        return PassResult(changed=True)


def use(monkeypatch: pytest.MonkeyPatch, window: Window, int8: bool = False) -> None:
    """Every compile from here on, in this test, has such a cache."""
    passes = [KeepLast(window), *([StaticInt8()] if int8 else [])]
    monkeypatch.setattr(Recipe, "cache_passes", lambda recipe: passes)
