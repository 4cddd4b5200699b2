"""Compiles a model whose cache keeps every token in a quarter of the KV heads and a window in the rest.

Which heads those are decides about quality, not about speed or memory, so that random weights are
spared the search for them: `python -m benchmarks.quarter_heads MODEL FOLDER --recipe RECIPE`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from einfold.api import resolve_recipe
from einfold.compiler.driver import compile_to, open_model
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup
from einfold.compiler.ir.program import Program
from einfold.compiler.passes.base import Pass, PassResult
from einfold.compiler.recipe import Recipe

#: As RazorAttention caches heads that do not retrieve: 1 + 4 + 255 tokens, and up to 64 until they move.
WINDOW = Window(sinks=4, recent=255, slack=64, compensation=True)


@dataclass(frozen=True)
class QuarterHeads(Pass):
    """Every fourth KV head of the model, counted through the layers, keeps all; the others a window."""

    prefill: str = "exact"

    name = "quarter_heads"
    requires = frozenset({"cache planned"})

    def run(self, program: Program) -> PassResult:
        result, layers, seen = PassResult(), [], 0
        assert program.layout is not None
        for layer in program.layout.layers:
            heads = range(layer.kv_heads)
            full = tuple(head for head in heads if (seen + head) % 4 == 0)
            rest = tuple(head for head in heads if head not in full)
            groups = (
                HeadGroup(full, Full()),
                HeadGroup(rest, replace(WINDOW, prefill=self.prefill)),
            )
            kept = tuple(group for group in groups if group.heads)
            layers.append(replace(layer, groups=kept))
            seen += layer.kv_heads
            result.applied(
                f"layer {layer.layer}", f"{len(full)} of {layer.kv_heads} KV heads keep all"
            )
        program.layout = CacheLayout(tuple(layers))
        return result


class QuarteredRecipe(Recipe):
    """A recipe whose other cache passes follow."""

    def cache_passes(self) -> list[Pass]:
        return [QuarterHeads(), *super().cache_passes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", required=True)
    arguments = parser.parse_args()
    recipe = resolve_recipe(arguments.recipe)
    chosen = QuarteredRecipe.model_validate(recipe.model_dump())
    compile_to(open_model(arguments.model), arguments.out, chosen)


if __name__ == "__main__":
    main()
