"""`run` of an encoder-decoder: texts or arrays in, texts out; and how long a generation took."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from .common import err, print_json
from .encoding import read_inputs

if TYPE_CHECKING:
    from ..encoder_decoder import EncoderDecoder
    from ..runtime.engine import Timings

#: Options of `run` that mean nothing for an encoder-decoder: its template is what it was trained on.
_LEAVES = {"chat", "raw", "system", "output"}


def run_encoder_decoder(
    artifact: Path,
    texts: list[str],
    file: Path | None,
    ids: str | None,
    prefix: str,
    given: Mapping[str, str],
    options: dict[str, Any],
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    """`given` are the options of the command line, with the names of what they set."""
    strange = sorted(option for option, name in given.items() if name in _LEAVES)
    if strange:
        raise PromptError(
            f"{artifact} is an encoder-decoder, which reads its input as it is and writes text: "
            f"{', '.join(strange)} means nothing for it, leave it out"
        )
    from ..model import load
    from ..runtime.sampling import Sampling

    started = time.perf_counter()
    model: EncoderDecoder = load(artifact, **loading)
    load_seconds = time.perf_counter() - started
    inputs = read_inputs(model, texts, file, ids)
    rows = len(next(iter(inputs.values())))
    limits = {name: options.pop(name) for name in ("max_new_tokens", "stop", "ignore_eos")}
    has_text = model.artifact.has("tokenizer.json")
    streams = rows == 1 and has_text and not as_json
    answers = model.generate_batch(
        inputs,
        prefix=prefix,
        sampling=Sampling(**options),
        on_text=(lambda row, piece: write_piece(piece)) if streams else None,
        **limits,
    )
    if as_json:
        timings = seconds_of(model.timings, load_seconds)
        print_json({"rows": [vars(answer) for answer in answers], "timings": timings})
        return
    for answer in answers:
        if not streams:
            sys.stdout.write(answer.text if has_text else " ".join(map(str, answer.tokens)))
        sys.stdout.write("\n")
    written = sum(len(answer.tokens) for answer in answers)
    ends = ", ".join(sorted({answer.finish_reason for answer in answers}))
    told = f"{rows} read, {written} tokens written ({ends})"
    err.print(told + told_seconds(model.timings, load_seconds), style="dim")


def seconds_of(times: Timings, load_seconds: float) -> dict[str, Any]:
    """The times of a generation, as data."""
    return {
        "load_seconds": load_seconds,
        "prefill_seconds": times.prefill_seconds,
        "prefill_tokens": times.prefill_tokens,
        "decode_seconds": times.decode_seconds,
        "decode_tokens": times.decode_tokens,
        "decode_tokens_per_second": times.decode_tokens / times.decode_seconds
        if times.decode_seconds
        else None,
    }


def told_seconds(times: Timings, load_seconds: float) -> str:
    """The same at the end of a line."""
    prefill = times.prefill_tokens / max(times.prefill_seconds, 1e-9)
    told = f"; load {load_seconds:.2f} s, prefill {prefill:.0f} tokens/s"
    if not times.decode_seconds:
        return told
    return f"{told}, decode {times.decode_tokens / times.decode_seconds:.1f} tokens/s"


def write_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
