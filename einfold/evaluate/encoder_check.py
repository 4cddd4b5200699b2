"""An encoder is compared with the model as transformers runs it: its graph, then its artifact.

Texts are random tokens of several lengths, with padding behind the shorter rows; images are random numbers.
What a model gives for padding is nothing, and is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..compiler.codegen.reference.runner import ReferenceCaller
from ..compiler.codegen.target import made_for
from ..compiler.driver import Input, state_of
from ..compiler.frontend.original import original_outputs
from ..compiler.ir.compare import difference
from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.manifest import WHOLE, Part, TensorEntry
from ..compiler.ir.program import Program
from ..compiler.ir.quant.scheme import PRESETS
from ..errors import EinfoldError, UnsupportedError, first_line, pass_on
from ..runtime.artifact import Artifact

#: Largest difference as a share of the largest number of a result, where both sides compute in float32.
_TOLERANCE = 1e-4

#: The same where onnxruntime multiplies by activations that it rounds to int8, beside the same weights.
_INT8_PRODUCTS = 0.03

#: (rows, tokens) of the batches that are compared; and the longest text, where it is no more work than this,
#: in tokens times parameters.
_BATCHES = ((1, 1), (2, 9), (3, 40))
_WORK = 6e10

_Array: TypeAlias = npt.NDArray[Any]
_Arrays: TypeAlias = Mapping[str, _Array]


#: What the report calls how far the artifact is from the original.
_OFF = "share of the original's results that it is off by"


class EncoderCheck:
    """The checks of one compile."""

    part: ClassVar[Part] = WHOLE
    """The part of the artifact that is an encoder."""

    def entries(self, model: Input) -> tuple[TensorEntry, ...]:
        """What a call gives."""
        assert model.encoder is not None
        return model.encoder.inputs(model.config)

    def original(self, model: Input, inputs: _Arrays) -> dict[str, _Array]:
        """What transformers gives."""
        assert model.encoder is not None
        state, module = given_weights(model)
        found = original_outputs(
            model.source, model.config, model.encoder, state, module, tensors(inputs)
        )
        return arrays(found)

    def __init__(self) -> None:
        self._calls: list[tuple[_Arrays, _Arrays | None]] = []
        """Inputs, and what the original gives for them where it can be run here."""

    def graph(self, model: Input, program: Program) -> str:
        """The sentence for the report; raises EinfoldError where the graph differs from the original.

        Where transformers cannot run the original here, the sentence says so.
        """
        interpreter = Interpreter(program, keep_weights=False)
        worst, told = 0.0, []
        batches = _batches(self.entries(model), program)
        for inputs in batches:
            try:
                expected = self.original(model, inputs)
            except Exception as error:
                pass_on(error)
                self._calls = [(each, None) for each in batches]
                return (
                    f"not compared with the original, which cannot be run here: {first_line(error)}"
                )
            found = arrays(interpreter.run(tensors(inputs)))
            share, name = _largest(found, expected, inputs, _share)
            if not share <= _TOLERANCE:
                again, _ = _largest(self.original(model, inputs), expected, inputs, _share)
                if not again <= _TOLERANCE:
                    raise UnsupportedError(
                        f"{model.source.location}: the model gives another {name!r} each time it runs, which "
                        "a compiled model cannot follow"
                    )
                raise EinfoldError(
                    f"{model.source.location}: what was captured is not the model as transformers runs it: "
                    f"{name!r} differs by {share:.1e} of its largest number on {_sizes(inputs)}. Nothing was "
                    "written. This is a fault of einfold, please report it with the model's architecture"
                )
            worst = max(worst, share)
            told.append(_sizes(inputs))
            self._calls.append((inputs, expected))
        return (
            f"as transformers computes it, within {worst:.1e} of the largest, on {', '.join(told)}"
        )

    def files(self, folder: Path) -> dict[str, Any]:
        """The figures of the finished artifact; raises EinfoldError where it is not what it should be."""
        artifact = Artifact.open(folder, verify=False)
        recipe = artifact.manifest.recipe
        made, preset = (
            made_for(artifact.manifest.target, recipe),
            PRESETS.find(recipe["weights"]["format"]),
        )
        exact = made.exact(preset.scheme, recipe["weights"].get("activations", "f32"))
        caller = made.caller(artifact, lean=True, part=self.part)
        reference = ReferenceCaller(artifact, keep_weights=False, part=self.part)
        beside, away = 0.0, 0.0
        for inputs, original in self._calls:
            found = caller.call(inputs)
            graph = reference.call(inputs)
            share, name = _largest(found, graph, inputs, _share)
            if not share <= (_TOLERANCE if exact else _INT8_PRODUCTS):
                raise EinfoldError(
                    f"the compiled model differs from its graph in {name!r} by {share:.1e} of the largest "
                    f"number on {_sizes(inputs)}; this is a fault of einfold, please report it with the "
                    "model's architecture"
                )
            beside = max(beside, share)
            if original is None:
                continue
            off, name = _largest(found, original, inputs, _share if preset.scheme is None else _off)
            if not off <= preset.bound:
                raise EinfoldError(
                    f"the compiled model differs from the original in {name!r} by {off:.1e}, where "
                    f"{preset.name} explains {preset.bound:.0e}; this is a fault of einfold, please report "
                    "it with the model's architecture"
                )
            away = max(away, off)
        return {
            **({} if original is None else {_OFF: away, "bound on that": preset.bound}),
            "largest difference from the graph, as a share": beside,
            "batches": len(self._calls),
            "arithmetic": "float32" if exact else "int8 products (accuracy level 4)",
        }


def _batches(entries: tuple[TensorEntry, ...], program: Program) -> list[dict[str, _Array]]:
    """The inputs of each call. A text's first and longest row has no padding."""
    longest = program.model.context
    if not longest:
        return [_batch(entries, rows, 0, rows) for rows in (1, 3)]
    sizes = [(rows, min(tokens, longest)) for rows, tokens in _BATCHES]
    if longest * program.weights.nbytes // 4 <= _WORK:
        sizes.append((1, longest))
    return [_batch(entries, rows, tokens, rows) for rows, tokens in dict.fromkeys(sizes)]


def _batch(
    entries: tuple[TensorEntry, ...], rows: int, tokens: int, seed: int
) -> dict[str, _Array]:
    draw = np.random.default_rng(seed)
    lengths = np.maximum(1, tokens - np.arange(rows) * tokens // (rows + 1))
    given: dict[str, _Array] = {}
    for entry in entries:
        shape = [{"B": rows, "S": tokens}.get(size) or int(size) for size in entry.shape]
        if entry.dtype == "f32":
            given[entry.name] = draw.standard_normal(shape, np.float32)
        elif entry.name == "attention_mask":
            given[entry.name] = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        else:
            given[entry.name] = draw.integers(0, entry.below or 2, shape)
    return given


def given_weights(model: Input) -> tuple[Mapping[str, Tensor], Any]:
    """(weights, module) of a model as it was given, before adapters were merged into it."""
    if model.given is not None:
        return state_of(model.given), model.given
    assert model.tensors is not None
    return model.tensors, model.module


def tensors(given: _Arrays) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in given.items()}


def arrays(given: Mapping[str, Tensor]) -> dict[str, _Array]:
    return {name: tensor.numpy() for name, tensor in given.items()}


def _largest(
    found: _Arrays, expected: _Arrays, inputs: _Arrays, measure: Callable[[_Array, _Array], float]
) -> tuple[float, str]:
    """(the largest difference of all results, the result that it is of); padding is left out."""
    mask = inputs.get("attention_mask")
    worst = (0.0, next(iter(expected)))
    for name, value in expected.items():
        got = found[name]
        if name.startswith("cross_") and value.ndim == 4:  # heads stand before tokens
            got, value = got.swapaxes(1, 2), value.swapaxes(1, 2)
        if mask is not None and value.shape[:2] == mask.shape == got.shape[:2]:
            got, value = got[mask > 0], value[mask > 0]
        share = measure(got, value)
        if not share <= worst[0]:
            worst = (share, name)
    return worst


def _share(found: _Array, expected: _Array) -> float:
    return difference(found, expected).share


def _off(found: _Array, expected: _Array) -> float:
    """The difference beside what there is, both by root mean square: single numbers may be off by more."""
    if difference(found, expected).largest == float("inf"):
        return float("inf")
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / max(scale, 1e-30)


def _sizes(inputs: _Arrays) -> str:
    rows, tokens = (*next(iter(inputs.values())).shape, 0)[:2]
    return (
        f"{rows} x {tokens} tokens" if "input_ids" in inputs else f"{rows} x {next(iter(inputs))}"
    )
