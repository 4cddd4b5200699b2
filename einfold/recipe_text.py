"""A recipe as TOML with every key, its value and its meaning: `einfold recipe` and docs/recipe.md."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .compiler.codegen.target import TARGETS
from .compiler.ir.quant.scheme import PRESETS
from .compiler.passes.cache_methods import FAMILIES
from .compiler.passes.method_text import Method
from .compiler.passes.weight_methods import SOLVER_METHODS, format_options
from .compiler.recipe import Choices, Recipe, WeightsSection


def recipe_text(recipe: Recipe) -> str:
    """TOML that `Recipe.read` reads as `recipe` again. Keys that are not set stand there in comments."""
    return "\n".join(_lines(recipe, "")) + "\n"


def _lines(section: BaseModel, where: str) -> Iterator[str]:
    kind = type(section)
    meanings, inner = field_docs(kind), []
    for name, info in kind.model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            inner.append((name, value))
            continue
        if name == "solver" and where == "weights":
            yield from _comment(
                f"[weights.solver]: {meanings[name]} Solvers: {', '.join(SOLVER_METHODS)}."
            )
            continue
        if name in FAMILIES and where == "cache":
            if not FAMILIES[name]:
                continue  # a family whose methods others may register
            yield from _comment(
                f"[cache.{name}]: {meanings[name]} Methods: {', '.join(FAMILIES[name])}."
            )
            continue
        yield from _comment(" ".join(filter(None, (meanings.get(name, ""), _choices(name, info)))))
        if value is None:
            yield f"# {name} ="
        else:
            yield f"{name} = {_toml(value)}"
    if isinstance(section, WeightsSection):
        yield from _of_weights(section)
        return
    if where == "cache":
        for name, known in FAMILIES.items():
            yield from _method(f"cache.{name}", known, getattr(section, name))
    inner += [(name, table) for name, table in (section.model_extra or {}).items()]
    for name, value in inner:
        yield f"\n[{name}]"
        yield from _comment(inspect.getdoc(type(value)) or "")
        yield from _lines(value, name)


def _of_weights(section: WeightsSection) -> Iterator[str]:
    """The options of the format, or in comments those of each; and the solver."""
    if section.scheme is not None:
        yield from _comment(f"Options of {section.format}.")
        yield from (f"{k} = {_toml(v)}" for k, v in section.options.items())
    else:
        for name in PRESETS:
            if options := format_options(name):
                shown = ", ".join(f"{k} = {_toml(v)}" for k, v in options.items())
                yield from _comment(f"Options of {name}: {shown}.")
    if isinstance(section.solver, str):
        yield f"solver = {_toml(section.solver)}"
    else:
        yield from _method("weights.solver", SOLVER_METHODS, section.solver)


def _method(place: str, known: Mapping[str, Method], table: dict[str, Any] | None) -> Iterator[str]:
    """A method's table, or in comments those that there are, with their defaults."""
    if table is not None:
        yield f"\n[{place}]"
        yield from (f"{k} = {_toml(v)}" for k, v in table.items() if v is not None)
        return
    for name, kind in known.items():
        options = {"method": name, **kind.defaults()}
        yield f"\n# [{place}]"
        yield from (f"# {k} = {'' if v is None else _toml(v)}".rstrip() for k, v in options.items())


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), 96):
        yield f"# {line}"


def _choices(name: str, info: FieldInfo) -> str:
    """The values that a key takes, where they are few."""
    if name == "target":
        return "; ".join(f"{known}: {target.title}" for known, target in TARGETS.items())
    kinds = [info.annotation, *get_args(info.annotation)]
    found = [_toml(v) for kind in kinds if get_origin(kind) is Literal for v in get_args(kind)]
    found += [_toml(v) for c in info.metadata if isinstance(c, Choices) for v in c.names()]
    if not found:
        return ""
    if bool in kinds:
        found = ["true", "false", *found]
    if get_origin(info.annotation) is tuple:
        return f"A list of: {', '.join(found)}."
    return f"One of {', '.join(found)}."


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value)  # booleans, numbers and basic strings are the same in both


def field_docs(kind: type[BaseModel]) -> dict[str, str]:
    """The text that stands under each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, after in pairwise(body.body):
        if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[before.target.id] = str(after.value.value)
    return found
