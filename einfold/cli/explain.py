"""The verb `explain`."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from ..errors import ModelError, pass_on
from .common import out, print_json
from .options import Debug, Json


def explain(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py::NAME",
            help="A function or module of a Python file, which also gives its `example_inputs()`. "
            "The file is run.",
            show_default=False,
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show each attention of a function: passes before and after, what runs for it, or why it stays."""
    explain_target(function, json)


def explain_target(function: str, as_json: bool) -> None:
    """Prints the report on FILE.py::NAME. Raises ModelError, saying what is missing."""
    path, separator, name = function.rpartition("::")
    if not separator or not name:
        raise ModelError(f"{function!r} names no function; write it like attention.py::forward")
    module = _load(Path(path))
    target = getattr(module, name, None)
    if not callable(target):
        have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ModelError(f"{path} has no function {name!r}; it has {', '.join(have) or 'none'}")
    inputs = getattr(module, "example_inputs", None)
    if not callable(inputs):
        raise ModelError(
            f"{path} has no function example_inputs(), which gives the inputs to call with"
        )
    from ..explaining import explain

    report = explain(target, *_tuple(inputs()))
    if as_json:
        print_json(report.data())
    else:
        out.print(str(report), markup=False)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"{path} is no file")
    spec = util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is no Python file")
    module = util.module_from_spec(spec)
    # The file's neighbours can be imported, as when it is run.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        pass_on(error)
        raise ModelError(f"{path} does not run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
