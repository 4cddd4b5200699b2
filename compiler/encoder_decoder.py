"""A decoder with its encoder: what the one gives the other beside a text, and the bytes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .calibrate.snapshot import copied
from .frontend.encoder_decoders import EncoderDecoder
from .frontend.huggingface import ModelSource
from .frontend.two_programs import READ, capture_encoder_decoder, cross_shapes
from .ir.interpreter import Interpreter
from .ir.manifest import MASK, TensorEntry
from .ir.program import Program
from .recipe import Recipe


def capture_pair(
    source: ModelSource,
    config: Any,
    kind: EncoderDecoder,
    recipe: Recipe,
    state: Mapping[str, Tensor] | None,
    module: Any,
) -> Program:
    """A decoder with its encoder, and what goes with a text. Raises UnsupportedError for a target that has no
    encoders, and otherwise as `capture_encoder_decoder`."""
    if reason := recipe.made_for.no_encoders():
        raise UnsupportedError(f"{source.location} is an encoder-decoder: {reason}")
    context = kind.context(source, config, recipe.context)
    program = capture_encoder_decoder(source, config, kind, context, state, module)
    if state is not None and program.encoder is not None:
        program.beside = beside_text(program.encoder, kind.inputs(config))
    return program


def account(program: Program) -> str:
    """Bytes of the cache, and of what an encoder gives, as an expression for people."""
    assert program.layout is not None
    own = str(program.layout.account())
    return own if program.encoder is None else f"{own} + {cross_account(program.encoder)}"


def cross_account(encoder: Program) -> str:
    """Bytes of what an encoder gives its decoder, as an expression in B (rows) and T (tokens read)."""
    by_token, fixed = 0, 0
    for dtype, sizes in cross_shapes(encoder).values():
        each = dtype.itemsize * math.prod(size for size in sizes if isinstance(size, int))
        by_token, fixed = (by_token + each, fixed) if READ in sizes else (by_token, fixed + each)
    return f"{by_token}*B*T" if by_token else f"{fixed}*B"


def cross_bytes(encoder: Program, rows: int, tokens: int) -> int:
    """The same as a number."""
    known = {"B": rows, READ: tokens}
    return sum(
        dtype.itemsize * math.prod(known.get(size, size) for size in sizes)  # type: ignore[arg-type, misc]
        for dtype, sizes in cross_shapes(encoder).values()
    )


def beside_text(
    encoder: Program, entries: tuple[TensorEntry, ...]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Gives what a decoder is given beside rows of a calibration text: what the encoder, as it is now, makes
    of the same text, or of noise where it reads no text."""
    kept = copied(encoder)

    def given(tokens_BS: Tensor) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for entry in entries:
            if entry.dtype == "i64":
                inputs[entry.name] = torch.ones_like(tokens_BS) if entry.name == MASK else tokens_BS
                continue
            sizes = [len(tokens_BS), *(int(size) for size in entry.shape[1:])]
            inputs[entry.name] = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return Interpreter(kept, keep_weights=False).run(inputs)

    return given
