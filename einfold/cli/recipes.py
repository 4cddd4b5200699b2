"""The verb `recipe`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import out, print_json
from .options import Debug, Json, recipe_names, starting


def recipe(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe that comes with einfold, or a TOML file, to print with every key spelled out.",
            show_default=False,
            autocompletion=starting(recipe_names()),
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe with all keys, their values and what they mean; without a name, the defaults."""
    print_recipe(name, json)


def print_recipe(name: str | None, as_json: bool) -> None:
    from ..api import resolve_recipe
    from ..recipe_text import recipe_text

    chosen = resolve_recipe(name)
    if as_json:
        print_json(chosen.model_dump(mode="json"))
        return
    if name is None:
        out.print(f"# Recipes that come with einfold: {', '.join(recipe_names())}.\n")
    out.print(recipe_text(chosen), end="")
