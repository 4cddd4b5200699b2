"""`compile` and `estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import err, out, parse_bytes, print_json, progress
from .options import (
    CacheOption,
    Chunk,
    Debug,
    Json,
    ModelName,
    Portable,
    PruneOption,
    QuantOption,
    ReadOption,
    RecipeFile,
    ShareOption,
    TargetOption,
    WeightsOption,
    recipe_options,
)


def compile_(
    model: ModelName,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The artifact folder to write.", show_default=False)
    ],
    target: TargetOption = None,
    cubins: Annotated[
        str | None,
        typer.Option(
            help="With --target triton: also compile the kernels for these GPUs, such as sm_80,sm_90 "
            "(sm_100 is known too). Needs Triton and no GPU; takes seconds a kernel and GPU. Loading uses "
            "them only with --trust.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsOption = None,
    cache: CacheOption = None,
    prune: PruneOption = None,
    quant: QuantOption = None,
    share: ShareOption = None,
    read: ReadOption = None,
    recipe: RecipeFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of context to compile for. [default: the model's own limit]",
            show_default=False,
        ),
    ] = None,
    portable: Portable = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact that exists.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Run the captured graph beside the model as transformers runs it, and the finished artifact "
            "beside both, on a few tokens; and beside the reference behind a prompt of "
            "which tokens have left the cache where that is quick."
        ),
    ] = True,
    dump: Annotated[
        Path | None, typer.Option(help="Folder for the graph's text after each pass.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a model into an artifact folder."""
    options = {
        **recipe_options(target, weights, cache, prune, quant, share, read),
        "cubins": None if cubins is None else [part.strip() for part in cubins.split(",")],
        "recipe": recipe,
        "context": context,
        "portable": portable or None,
    }
    compile_model(model, out, options, force, check, dump, json)


def compile_model(
    model: str,
    output: Path,
    options: dict[str, Any],
    force: bool,
    check: bool,
    dump: Path | None,
    as_json: bool,
) -> None:
    from ..compiler.artifact import check_output

    check_output(output, force)  # before the slow imports: most mistakes are found here
    from ..api import compile

    with progress(as_json) as tell:
        report = compile(
            model, output, force=force, check=check, dump=dump, progress=tell, **options
        )
    data = report.data()
    if as_json:
        print_json({"artifact": str(output), **data})
        return
    from ..compiler.report import human_bytes, summary_lines

    for line in summary_lines(data["passes"]):
        err.print(f"  {line}", style="dim")
    seconds = sum(report.seconds.values())
    parameters = report.manifest.model.parameters
    out.print(
        f"{output}: {human_bytes(report.manifest.weight_bytes)} of weights "
        f"({human_bytes(4 * parameters)} in float32), "
        + (f"context {context:,}, " if (context := report.manifest.model.context) else "")
        + f"{seconds:.1f} s, peak memory {human_bytes(report.peak_rss)}"
    )
    for note in report.notes:
        err.print(note)
    if report.tokenizer.startswith("none"):
        reason = report.tokenizer.removeprefix("none: ")
        err.print(f"the artifact takes token ids, not text: no tokenizer, {reason}")
    if "check" in report.check:
        err.print(f"check against the reference {report.check['check']}")
    if "not checked" in report.check.get("compressed cache", ""):
        err.print(f"check of the compressed cache: {report.check['compressed cache']}")
    out.print(f"report: {output / 'report.html'}")


def estimate(
    model: ModelName,
    target: TargetOption = None,
    weights: WeightsOption = None,
    cache: CacheOption = None,
    prune: PruneOption = None,
    quant: QuantOption = None,
    share: ShareOption = None,
    read: ReadOption = None,
    recipe: RecipeFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of context to compile for, and to fill. [default: the model's own limit]",
            show_default=False,
        ),
    ] = None,
    portable: Portable = False,
    batch: Annotated[int, typer.Option(min=1, help="Rows that run together.")] = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory at hand, such as 4GB or 800MiB: gives the longest run, prompt and answer, that fits "
            "it, up to the context.",
            show_default=False,
        ),
    ] = None,
    chunk: Chunk = 512,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell weights, cache and activation bytes from a model's config, before any weight is read."""
    options = {
        **recipe_options(target, weights, cache, prune, quant, share, read),
        "recipe": recipe,
        "context": context,
        "portable": portable or None,
        "batch": batch,
        "chunk": chunk,
    }
    estimate_model(model, options, budget, json)


def estimate_model(model: str, options: dict[str, Any], budget: str | None, as_json: bool) -> None:
    limit = None if budget is None else parse_bytes(budget)
    from ..api import estimate
    from ..compiler.report import human_bytes

    with progress(as_json) as tell:
        found = estimate(model, budget=limit, progress=tell, **options)
    if as_json:
        print_json({**vars(found), "total": found.total, "resident": found.resident})
        return
    table = Table(show_header=False, box=None)
    table.add_row("weights", human_bytes(found.weights))
    rows = f"{found.batch} x {found.context:,} tokens" if found.context else f"{found.batch} images"
    if found.cache:
        table.add_row(f"KV cache, {rows}", human_bytes(found.cache))
    if found.cache_peak != found.cache:
        table.add_row("  while a prompt as long is read", human_bytes(found.cache_peak))
    if found.cache_read != found.cache:
        table.add_row("  read by a step behind it", human_bytes(found.cache_read))
    if found.given:
        table.add_row("what the encoder gives the decoder", human_bytes(found.given))
    step = f"{found.chunk} tokens a step" if found.cache else rows
    table.add_row(f"activations, {step}", human_bytes(found.activations))
    if found.runtime:
        table.add_row("weights that the runtime packs, its arena", human_bytes(found.runtime))
    table.add_row("the process itself", human_bytes(found.process))
    table.add_row("in all", human_bytes(found.resident))
    if found.largest_context is not None:
        fits = (
            f"{found.largest_context:,} tokens"
            if found.largest_context
            else "none: the weights and the process alone do not fit; compiled for the target onnx it runs "
            "with weights from the disk, see `einfold plan`"
        )
        table.add_row(f"largest context in {human_bytes(limit or 0)}", fits)
    out.print(table)
