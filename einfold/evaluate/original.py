"""What is compiled is compared with the model that was given, as transformers runs it.

First the graph, before any pass that may lose something, by the meaning of its operators; then the finished
artifact (`self_check`). The texts are random tokens, one row of them behind padding, and longer than the
model's windows where that costs little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compiler.calibrate.snapshot import text_inputs
from ..compiler.driver import Input, state_of
from ..compiler.frontend.original import original_logits
from ..compiler.ir.compare import difference
from ..compiler.ir.heap import give_back
from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.program import Program, attention_nodes, call_arguments
from ..errors import EinfoldError, UnsupportedError, first_line, pass_on
from ..runtime.runner import Floats
from .self_check import TOKENS, check_tokens, self_check

#: Largest difference of logits, as a share of the largest: float32 on both sides, summed in another order.
TOLERANCE = 1e-4

#: Tokens of a text, those in front of the second row that are padding, and those behind a window.
_LENGTH, _PADDING, _BEHIND = 24, 5, 8

#: Bounds on reading more tokens, for the sake of a window: tokens times parameters, and logits.
_WORK, _LOGITS = 5e9, 2e7


class OriginalCheck:
    """The checks of one compile."""

    def __init__(self) -> None:
        self._first: Floats | None = None
        """The original's logits of the tokens that the artifact is checked on, once they are known."""

    @property
    def compared(self) -> bool:
        """Whether a graph was compared, and agreed."""
        return self._first is not None

    def graph(self, model: Input, program: Program) -> str:
        """The sentence for the report; raises EinfoldError where the graph differs from the original.

        Where transformers cannot run the original here, the sentence says so.
        """
        length, missed = check_length(program)
        ids, mask = _texts(program.model.vocabulary, length)
        try:
            expected = _original(model, ids, mask)
        except Exception as error:
            pass_on(error)
            return f"not compared with the original, which cannot be run here: {first_line(error)}"
        give_back()  # the original read all of the checkpoint
        real = [expected[0], expected[1, _padding(length) :]]
        found = _graph_logits(program, ids, _padding(length))
        differences = [difference(a, b) for a, b in zip(found, real, strict=True)]
        share = max(each.share for each in differences)
        if share > TOLERANCE:
            again = _original(model, ids, mask)
            if difference(again, expected).share > TOLERANCE:
                raise UnsupportedError(
                    f"{model.source.location}: the model gives other numbers each time it runs, which a "
                    "compiled model cannot follow"
                )
            raise EinfoldError(_refusal(model, found, real, share))
        self._first = real[0][:TOKENS].numpy().copy()  # of the rest nothing stays
        return (
            f"logits as transformers computes them, within {share:.1e} of the largest, on {length} tokens "
            f"and a row behind padding{missed}"
        )

    def files(self, folder: Path) -> dict[str, Any]:
        """The figures of the finished artifact; raises EinfoldError where it is not what it should be."""
        return self_check(folder, self._first)


def _original(model: Input, ids: Tensor, mask: Tensor) -> Tensor:
    assert model.state is not None
    state, module = model.state, model.module
    if model.given is not None:
        state, module = state_of(model.given), model.given
    return original_logits(model.source, model.config, state, module, ids, mask)


def check_length(program: Program) -> tuple[int, str]:
    """(tokens of a text, what to say of windows that it does not pass)."""
    windows = {int(call_arguments(node)["window"]) for node in attention_nodes(program)} - {0}
    parameters = program.weights.nbytes // 4
    most = min(
        int(_WORK / max(1, parameters)),
        int(_LOGITS / max(1, program.model.vocabulary)),
        program.model.context,
    )
    passed = [window for window in windows if window + _BEHIND <= most]
    length = min(program.model.context, max([_LENGTH, *(window + _BEHIND for window in passed)]))
    beyond = sorted(window for window in windows if window >= length)
    if not beyond:
        return length, ""
    return (
        length,
        f"; too short to pass the window of {beyond[0]:,} tokens, which is read off its mask",
    )


def _texts(vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """(tokens [2, S], mask [2, S]): one row whole, which begins as the text of `self_check`, one padded."""
    ids = np.random.default_rng(2).integers(0, vocabulary, (2, length))
    shared = min(TOKENS, length)
    ids[0, :shared] = check_tokens(vocabulary)[0, :shared]
    mask = np.ones_like(ids)
    mask[1, : _padding(length)] = 0
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _padding(length: int) -> int:
    return min(_PADDING, length // 2)


def _graph_logits(program: Program, ids: Tensor, padding: int) -> list[Tensor]:
    """Logits of each row's real tokens. The second row has its padding behind it, where no token sees it."""
    rows = torch.stack((ids[0], ids[1].roll(-padding)))
    inputs = text_inputs(rows, torch.arange(ids.numel())) | program.beside(rows)
    logits = Interpreter(program, keep_weights=False).run(inputs)["logits"]
    first, second = logits.reshape(*ids.shape, -1)
    return [first, second[: ids.shape[1] - padding]]


def _refusal(model: Input, found: list[Tensor], real: list[Tensor], share: float) -> str:
    for name, a, b in zip(("", " of a row behind padding"), found, real, strict=True):
        scale = max(1.0, float(b.abs().max()))
        wrong = ~((a - b).abs().amax(-1) <= TOLERANCE * scale)
        if bool(wrong.any()):
            place = f"from token {int(wrong.nonzero()[0])}{name} on"
            break
    return (
        f"{model.source.location}: what was captured is not the model as transformers runs it: logits "
        f"differ by {share:.1e} of the largest, {place}. Nothing was written. This is a fault of einfold, "
        "unless the model depends on more than its tokens and positions; please report it with the model's "
        "architecture"
    )
