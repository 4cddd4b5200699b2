"""`eval` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import out, print_json, progress
from .options import Artifact, Chunk, Debug, Engine, Json, Threads, Trust


def eval_(
    artifact: Artifact,
    against: Annotated[
        str,
        typer.Option(
            help="The original model's folder (it runs in float32), or another artifact of it.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to read; documents end at lines with a form feed. "
            "[default: eval.txt of the original, or a built-in text]",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens read at a stretch. [default: the context, at most 2048]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Where the cache lets tokens go: the share of each window that is read as a prompt and "
            "compressed; measured is the rest. Questions for pass keys are never part of a prompt. With 0 a "
            "method with prefill=exact is measured as if it streamed.",
        ),
    ] = 0.5,
    engine: Engine = None,
    trust: Trust = False,
    threads: Threads = None,
    chunk: Chunk = 512,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, KL, top-1 agreement, pass-key recall and bytes against the original."""
    from ..evaluate.quality import evaluate
    from ..model import language_model, load

    loading: dict[str, Any] = {
        "engine": engine,
        "threads": threads,
        "chunk": chunk,
        "trust": trust,
    }
    with progress(json) as tell:
        quality = evaluate(
            language_model(load(artifact, **loading)), against, text, window, tell, prompt
        )
    if json:
        print_json(quality.data())
        return
    from ..compiler.report import human_bytes

    table = Table(show_header=False, box=None)
    table.add_row(
        "perplexity", f"{quality.perplexity:.4f}  (original {quality.reference_perplexity:.4f})"
    )
    table.add_row("KL to the original", f"{quality.kl:.3e} nats a token")
    table.add_row("same likeliest token", f"{100 * quality.top1:.2f} %")
    if quality.recall is not None and quality.reference_recall is not None:
        table.add_row(
            "pass keys recalled",
            f"{100 * quality.recall:.1f} % of {quality.keys}  "
            f"(original {100 * quality.reference_recall:.1f} %)",
        )
    for part in quality.recall_by_depth:
        where = f"at depths to {100 * part['to']:.0f} %"
        table.add_row(f"  {where}", _recall_row(part))
    for part in quality.recall_by_length:
        table.add_row(f"  after {part['above']:.0f} to {part['to']:.0f} tokens", _recall_row(part))
    table.add_row("measured", f"{quality.tokens:,} tokens in {quality.documents} documents")
    if quality.prompt is not None:
        table.add_row("", f"behind prompts of {100 * quality.prompt:.0f} % of each window")
    if quality.note:
        table.add_row("note", quality.note)
    for name, count in quality.bytes.items():
        table.add_row(f"bytes, {name}", f"{count:,} ({human_bytes(count)})")
    out.print(table)


def _recall_row(part: dict[str, Any]) -> str:
    original = f"(original {100 * part['reference_recall']:.1f} %)"
    return f"{100 * part['recall']:.1f} % of {part['keys']}  {original}"


def bench(
    artifact: Artifact,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt that prefill is timed with.")
    ] = 512,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Tokens of context to decode at; may be given again. [default: 128]",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded at each context.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each; the median is given.")] = 5,
    trust: Trust = False,
    threads: Threads = None,
    chunk: Chunk = 512,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time loading, prefill and decode of an artifact on random tokens."""
    from ..evaluate.speed import measure_speed

    with progress(json) as tell:
        speed = measure_speed(
            artifact,
            prompt_tokens,
            context or [128],
            new_tokens,
            batch,
            repeat,
            threads,
            chunk,
            tell,
            trust,
        )
    if json:
        print_json(speed.data())
        return
    table = Table(show_header=False, box=None)
    table.add_row("load", f"{speed.load_seconds:.2f} s")
    table.add_row(f"prefill of {prompt_tokens}", f"{speed.prefill_tokens_per_second:.1f} tokens/s")
    for tokens, rate in speed.decode_tokens_per_second.items():
        table.add_row(f"decode at {tokens}", f"{rate:.1f} tokens/s")
    out.print(table)
