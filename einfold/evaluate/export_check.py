"""An exported module is run beside the module itself before it is kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..compiler.frontend.example import Example
from ..compiler.frontend.modules import Captured
from ..compiler.ir.compare import Difference, difference
from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.manifest import MODEL
from ..compiler.recipe import Recipe
from ..errors import ArtifactWarning, EinfoldError, UnsupportedError, first_line, pass_on

#: Largest difference as a share of the largest number of an output, by the type in which it is given. For the
#: short types it is 16 of their own steps: torch rounds to them after each operator, onnxruntime after some.
_TOLERANCES = {torch.float16: 16 * 2.0**-10, torch.bfloat16: 16 * 2.0**-7}
_TOLERANCE = 1e-4

#: The same where onnxruntime multiplies quantized weights by activations that it rounds to int8: five times
#: what networks of four to eight matrices were seen to differ by.
_INT8_PRODUCTS = 0.03

_Outputs = Mapping[str, Tensor]


class ModuleCheck:
    """The check of one export; raises EinfoldError where the export differs from the module."""

    def __init__(self) -> None:
        self._expected: list[tuple[Example, _Outputs]] = []

    def graph(self, captured: Captured) -> None:
        """The graph, by the reference, beside the module."""
        self._expected = _expected(captured)
        interpreter = Interpreter(captured.program)
        for example, expected in self._expected:
            found = interpreter.run(captured.inputs(example))
            _compare("the graph of the module", found, expected)

    def files(self, folder: Path, captured: Captured, recipe: Recipe) -> None:
        """What was written, on onnxruntime, beside the module; beside the graph where weights were rounded.

        Raises UnsupportedError where onnxruntime cannot load or run it.
        """
        session = _session(folder / MODEL)
        scheme = recipe.weights.preset.scheme
        exact = scheme is None
        activations = recipe.weights.activations or "f32"
        tolerance = None if recipe.made_for.exact(scheme, activations) else _INT8_PRODUCTS
        interpreter = Interpreter(captured.program)
        for example, expected in self._expected:
            inputs = captured.inputs(example)
            beside = expected if exact else interpreter.run(inputs)
            _compare("the exported model", _run(session, inputs), beside, tolerance)


def _expected(captured: Captured) -> list[tuple[Example, _Outputs]]:
    """Each example with what the module gives; without those of other sizes that the module refuses."""
    first, *others = captured.examples
    expected, again = captured.outputs(first), captured.outputs(first)
    for name, value in expected.items():
        if difference(_array(again[name]), _array(value)).share > 0:
            raise UnsupportedError(
                f"{type(captured.module).__name__} gives another {name!r} for the same inputs each time (it "
                "draws random numbers, or keeps a state), so the export cannot be compared with it; export "
                "it with check=False if that is meant"
            )
    checked: list[tuple[Example, _Outputs]] = [(first, expected)]
    for example in others:
        try:
            checked.append((example, captured.outputs(example)))
        except Exception as error:
            pass_on(error)
            shapes = [list(value.shape) for value in captured.inputs(example).values()]
            warnings.warn(
                f"the export was compared on the example inputs alone: on inputs of the sizes {shapes} "
                f"the module itself fails: {first_line(error)}",
                ArtifactWarning,
                stacklevel=2,
            )
    return checked


def _compare(
    what: str, found: _Outputs, expected: _Outputs, tolerance: float | None = None
) -> None:
    for name, value in expected.items():
        bound = tolerance or _TOLERANCES.get(value.dtype, _TOLERANCE)
        if found[name].dtype != value.dtype:
            raise EinfoldError(
                f"{what} gives {name!r} as {found[name].dtype}, the module as {value.dtype}; {_FAULT}"
            )
        away: Difference = difference(_array(found[name]), _array(value))
        if not away.share <= bound:
            raise EinfoldError(
                f"{what} differs from what is right in {name!r} by {away.largest:.2e} (numbers up to "
                f"{away.scale:.3g}, {list(value.shape)}), more than {bound:.0e} of the largest; {_FAULT}"
            )


_FAULT = "nothing was kept; this is a fault of einfold, please report it with the module"


def _array(value: Tensor) -> Any:
    wide = value.detach().cpu()
    return (wide.float() if wide.dtype == torch.bfloat16 else wide).resolve_conj().numpy()


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "an export is compared with its module on onnxruntime, which is not installed; install "
            "'einfold[onnx]', or export with check=False"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        pass_on(error)
        raise UnsupportedError(
            f"onnxruntime cannot load the exported model, so it was not kept: {_short(error)}"
        ) from error


def _run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wanted = {node.name for node in session.get_inputs()}
    feeds = {name: _value(tensor) for name, tensor in inputs.items() if name in wanted}
    names = [node.name for node in session.get_outputs()]
    try:
        results = session.run_with_ort_values(names, feeds)
    except Exception as error:
        pass_on(error)
        raise UnsupportedError(
            f"onnxruntime cannot run the exported model, so it was not kept: {_short(error)}"
        ) from error
    return {name: _tensor(value) for name, value in zip(names, results, strict=True)}


def _value(tensor: Tensor) -> Any:
    import onnxruntime

    array = tensor.detach().cpu().contiguous()
    make = onnxruntime.OrtValue
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return make.ortvalue_from_numpy_with_onnx_type(array.view(torch.int16).numpy(), 16)
    return make.ortvalue_from_numpy(array.numpy())


def _tensor(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(np.array(value.numpy()))


def _short(error: Exception) -> str:
    """What onnxruntime says, without the places in its own sources."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].split("failed:")[-1].strip()
    return text[-300:]
