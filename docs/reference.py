"""Writes what can be looked up: `cli.md`, `recipe.md` and `api.md`, from the code.

python docs/reference.py           writes the files
python docs/reference.py --check   ends with 1 where one is not current
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

import einfold
from einfold import errors
from einfold.cli.app import app
from einfold.compiler.recipe import Recipe
from einfold.completion import Completion
from einfold.encoder import Encoder
from einfold.encoder_decoder import EncoderDecoder
from einfold.model import Model
from einfold.planning import Plan
from einfold.recipe_text import recipe_text

HERE = Path(__file__).parent

_WRITTEN = "Written by `make docs` (`docs/reference.py`); do not edit."


def cli() -> str:
    """Every verb with its arguments and options, as `--help` tells them."""
    parts = [
        f"# The command line\n\n{_WRITTEN} `einfold COMMAND --help` says the same.\n\n"
        "Results go to stdout, everything said on the way to stderr; `--json` prints one JSON document. "
        "Errors are one sentence and an exit code ([README](../README.md#what-it-does)). "
        "`einfold --install-completion` completes verbs, options, methods and recipes in the shell.\n"
    ]
    for name, command in _commands(typer.main.get_command(app)):
        context = typer.Context(command)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(p.name if p.required else f"[{p.name}]" for p in arguments)
        said = inspect.cleandoc(command.help)
        parts.append(f"## einfold {name}\n\n`einfold {name} {usage} [OPTIONS]`\n\n{said}\n")
        for parameter in command.params:
            spelled, text = parameter.get_help_record(context)
            parts.append(f"- `{spelled}`: {' '.join(text.split())}")
        parts.append("")
    return "\n".join(parts)


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Verbs by what is typed, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def recipe() -> str:
    """Every key of a recipe with its default."""
    return (
        f"# Recipes\n\n{_WRITTEN} `einfold recipe` prints the same, and `einfold recipe NAME` a recipe with "
        "every key spelled out.\n\nA recipe is a TOML file that sets every knob of a compile "
        "(`--recipe FILE`). All keys may be left out; these are the defaults. `[cache.share]`, "
        "`[cache.prune]` and `[cache.quant]` each take one method with its options; all methods are listed. "
        "Unknown keys are refused. What the methods do is in [methods.md](methods.md).\n\n"
        f"```toml\n{recipe_text(Recipe())}```\n"
    )


def api() -> str:
    """The public functions and classes."""
    parts = [
        f"# The Python API\n\n{_WRITTEN}\n\n`import einfold` loads neither torch nor transformers; each "
        'function loads what it needs. `torch.compile(backend="einfold")` has '
        "[a page of its own](torch-compile.md), and so have caches for transformers "
        "([cache.md](cache.md#in-transformers)).\n"
    ]
    functions = [
        getattr(einfold, name)
        for name in einfold.__all__
        if name not in ("Encoder", "EncoderDecoder", "Model", "Plan", "errors", "__version__")
    ]
    parts += [_entry(f"einfold.{function.__name__}", function) for function in functions]
    for kind in (Model, Plan, Encoder, EncoderDecoder):
        parts.append(_entry(f"einfold.{kind.__name__}", kind, signature=False))
        for name, member in inspect.getmembers(kind):
            if not name.startswith("_") and name in vars(kind) and member is not None:
                parts.append(_member(f"{kind.__name__}.{name}", member))
    parts.append(_entry("Completion", Completion))
    parts.append("## einfold.errors\n")
    for error in _errors():
        said = " ".join((inspect.getdoc(error) or "").split())
        code = f"; exit code {error.exit_code}" if hasattr(error, "exit_code") else ""
        parts.append(
            f"- `{error.__name__}`({error.__bases__[0].__name__}): {said.rstrip('.')}{code}."
        )
    return "\n".join(parts) + "\n"


def _errors() -> Iterator[Any]:
    for value in vars(errors).values():
        if (
            isinstance(value, type)
            and issubclass(value, (Exception, Warning))
            and value.__module__ == errors.__name__
        ):
            yield value


def _member(name: str, member: Any) -> str:
    if isinstance(member, (property, cached_property)):
        return f"### {name}\n\n{inspect.getdoc(member)}\n"
    return _entry(name, member, "###")


def _entry(name: str, value: Any, heading: str = "##", signature: bool = True) -> str:
    said = inspect.getdoc(value) or ""
    if not signature:
        return f"{heading} {name}\n\n{said}\n"
    return f"{heading} {name}\n\n```python\n{name}{_signature(value)}\n```\n\n{said}\n"


def _signature(value: Any) -> str:
    found = inspect.signature(value)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=parameters)).replace("'", "")
    if len(text) < 90:
        return text
    lines, keyword = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        lines.append(str(parameter).replace("'", ""))
    end = text.rpartition(" -> ")[2]
    return "(\n    " + ",\n    ".join(lines) + f",\n) -> {end}"


PAGES = {"cli.md": cli, "recipe.md": recipe, "api.md": api}


def main() -> int:
    """Writes the files, or checks them."""
    stale = [name for name, page in PAGES.items() if _read(HERE / name) != page()]
    if "--check" in sys.argv[1:]:
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_text(PAGES[name](), encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
