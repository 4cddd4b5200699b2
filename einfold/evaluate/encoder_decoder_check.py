"""An encoder-decoder is compared with the model as transformers runs it, each of its programs by itself.

The encoder as any encoder (`encoder_check`): what it gives are the keys and values of cross-attention. The
decoder beside what transformers' encoder gives, as a language model (`original`, `self_check`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..compiler.calibrate.snapshot import text_inputs
from ..compiler.driver import Input
from ..compiler.frontend.original import original_answer
from ..compiler.ir.compare import difference
from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.manifest import READER, Part, TensorEntry
from ..compiler.ir.program import Program
from ..errors import EinfoldError, UnsupportedError, first_line, pass_on
from ..runtime.buffers import Array
from ..runtime.runner import Floats
from .encoder_check import EncoderCheck, arrays, given_weights, tensors
from .original import TOLERANCE, check_length
from .self_check import TOKENS, check_tokens, self_check

#: Tokens of the text that the encoder reads, of which the second row has fewer.
_READ, _PADDING = 9, 3


class _Reader(EncoderCheck):
    """The encoder's checks."""

    part: ClassVar[Part] = READER

    def entries(self, model: Input) -> tuple[TensorEntry, ...]:
        assert model.pair is not None
        return model.pair.inputs(model.config)

    def original(self, model: Input, inputs: Any) -> Any:
        rows = len(next(iter(inputs.values())))
        return arrays(_answer(model, inputs, torch.zeros(rows, 1, dtype=torch.long))[0])


class EncoderDecoderCheck:
    """The checks of one compile."""

    def __init__(self) -> None:
        self._reader = _Reader()
        self._first: Floats | None = None
        self._given: dict[str, Array] = {}
        """What the decoder is given for one row, as transformers computes it; and what it makes of it."""

    def graph(self, model: Input, program: Program) -> str:
        """The sentence for the report on one of the two programs; raises EinfoldError where it differs from
        the original. Where transformers cannot run the original here, the sentence says so."""
        if program.output_names() != ["logits"]:
            return self._reader.graph(model, program)
        length, missed = check_length(program)
        inputs = _inputs(self._reader.entries(model), program.model.context)
        ids = _ids(program.model.vocabulary, length)
        try:
            given, expected = _answer(model, inputs, ids)
        except Exception as error:
            pass_on(error)
            return f"not compared with the original, which cannot be run here: {first_line(error)}"
        rows = torch.arange(ids.numel())
        interpreter = Interpreter(program, keep_weights=False)
        found = interpreter.run(text_inputs(ids, rows) | given)["logits"].reshape(expected.shape)
        share = difference(found, expected).share
        if not share <= TOLERANCE:
            again = _answer(model, inputs, ids)[1]
            if difference(again, expected).share > TOLERANCE:
                raise UnsupportedError(
                    f"{model.source.location}: the model gives other numbers each time it runs, which a "
                    "compiled model cannot follow"
                )
            raise EinfoldError(
                f"{model.source.location}: the decoder that was captured is not the model's as transformers "
                f"runs it: logits differ by {share:.1e} of the largest. Nothing was written. This is a fault "
                "of einfold, please report it with the model's architecture"
            )
        self._first = expected[0, :TOKENS].numpy()
        self._given = {name: value[:1] for name, value in arrays(given).items()}
        return (
            f"logits as transformers computes them, within {share:.1e} of the largest, on {length} tokens "
            f"behind two inputs{missed}"
        )

    def files(self, folder: Path) -> dict[str, Any]:
        """The figures of the finished artifact; raises EinfoldError where it is not what it should be."""
        read = self._reader.files(folder)
        if self._first is None:
            return {f"encoder: {name}": value for name, value in read.items()}
        written = self_check(folder, self._first, self._given)
        return {f"encoder: {name}": value for name, value in read.items()} | written


def _answer(model: Input, inputs: Any, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    assert model.pair is not None
    state, module = given_weights(model)
    return original_answer(
        model.source, model.config, model.pair, state, module, tensors(inputs), ids
    )


def _inputs(entries: tuple[TensorEntry, ...], context: int) -> dict[str, Array]:
    """Two inputs, of texts the second with padding behind it."""
    draw, read = np.random.default_rng(3), min(_READ, context)
    given: dict[str, Array] = {}
    for entry in entries:
        shape = [{"B": 2, "S": read}.get(size) or int(size) for size in entry.shape]
        if entry.dtype == "f32":
            given[entry.name] = draw.standard_normal(shape, np.float32)
            continue
        array = draw.integers(0, entry.below, shape)
        if entry.below == 2:
            array[:] = 1
            array[1, max(1, read - _PADDING) :] = 0
        given[entry.name] = array
    return given


def _ids(vocabulary: int, length: int) -> Tensor:
    """Two answers [2, S], the first of which begins as the text of `self_check`."""
    ids = np.random.default_rng(2).integers(0, vocabulary, (2, length))
    shared = min(TOKENS, length)
    ids[0, :shared] = check_tokens(vocabulary)[0, :shared]
    return torch.from_numpy(ids)
