"""The verb `explain`."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from ..errors import ModelError, first_line, pass_on
from .common import out, print_json
from .options import Debug, Json, Portable


def explain(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py::NAME|FOLDER|FILE.gguf",
            help="A function or module of a Python file, which also gives its `example_inputs()`. "
            "The file is run. Or the folder or GGUF of a model.",
            show_default=False,
        ),
    ],
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="What an export to ONNX makes of a module, in place of torch.compile's backend; of a folder "
            "it is always that.",
        ),
    ] = False,
    portable: Portable = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show each attention of a function or model: passes before and after, what it becomes or why not."""
    if Path(function).is_dir() or Path(function).suffix == ".gguf":
        from ..explaining import explain_export

        _print(explain_export(function, portable=portable), json)
        return
    target, inputs = _target(function)
    if not (onnx or portable):
        from ..explaining import explain

        _print(explain(target, *inputs), json)
        return
    from torch import nn

    from ..explaining import explain_export

    if not isinstance(target, nn.Module):
        raise ModelError(f"{function} is no module, which is what is exported to ONNX")
    _print(explain_export(target, inputs, portable=portable), json)


def _print(report: Any, as_json: bool) -> None:
    if as_json:
        print_json(report.data())
    else:
        out.print(str(report), markup=False)


def _target(function: str) -> tuple[Any, tuple[Any, ...]]:
    """FILE.py::NAME and the inputs to call it with. Raises ModelError, saying what is missing."""
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
    try:
        given = inputs()
    except Exception as error:
        pass_on(error)
        raise ModelError(
            f"{path}: example_inputs() fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    return target, _tuple(given)


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
