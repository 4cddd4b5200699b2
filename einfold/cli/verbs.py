"""What the verbs do. Each imports what it needs, so that a light verb stays light."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from ..errors import ArtifactError, PromptError
from .common import err, out, parse_bytes, print_json, progress


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
        f"({human_bytes(4 * parameters)} in float32), context {report.manifest.model.context:,}, "
        f"{seconds:.1f} s, peak memory {human_bytes(report.peak_rss)}"
    )
    if report.tokenizer.startswith("none"):
        reason = report.tokenizer.removeprefix("none: ")
        err.print(f"the artifact takes token ids, not text: no tokenizer, {reason}")
    if "check" in report.check:
        err.print(f"check against the reference {report.check['check']}")
    if "not checked" in report.check.get("compressed cache", ""):
        err.print(f"check of the compressed cache: {report.check['compressed cache']}")
    out.print(f"report: {output / 'report.html'}")


def run_artifact(
    artifact: Path,
    prompt: str | None,
    file: Path | None,
    ids: str | None,
    chat: bool,
    system: str | None,
    options: dict[str, Any],
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    from ..model import load

    text = _read_prompt(prompt, file, ids)
    if chat and ids is not None:
        raise PromptError("--chat needs a prompt of text, not --ids")
    if system is not None and not chat:
        raise PromptError("--system needs --chat")
    started = time.perf_counter()
    model = load(artifact, **loading)
    load_seconds = time.perf_counter() - started
    tokens: Any = text
    if ids is not None:
        tokens = _parse_ids(ids)
    elif chat:
        messages = [{"role": "system", "content": system}] if system else []
        tokens = model.chat([*messages, {"role": "user", "content": str(text)}])
    show = None if as_json else _write_piece
    result = model.generate(tokens, on_text=show, **options)
    times = model.timings
    timings = {
        "load_seconds": load_seconds,
        "prefill_seconds": times.prefill_seconds,
        "prefill_tokens": times.prefill_tokens,
        "decode_seconds": times.decode_seconds,
        "decode_tokens": times.decode_tokens,
        "decode_tokens_per_second": times.decode_tokens / times.decode_seconds
        if times.decode_seconds
        else None,
    }
    if as_json:
        print_json(
            {
                "text": result.text,
                "tokens": result.tokens,
                "prompt_tokens": result.prompt_tokens,
                "finish_reason": result.finish_reason,
                "timings": timings,
            }
        )
        return
    if not model.artifact.has("tokenizer.json"):
        out.print(" ".join(map(str, result.tokens)), end="")
    sys.stdout.write("\n")
    rate = timings["decode_tokens_per_second"]
    prefill = times.prefill_tokens / max(times.prefill_seconds, 1e-9)
    err.print(
        f"{result.prompt_tokens} + {len(result.tokens)} tokens ({result.finish_reason}); "
        f"load {load_seconds:.2f} s, prefill {prefill:.0f} tokens/s"
        + (f", decode {rate:.1f} tokens/s" if rate else ""),
        style="dim",
    )


def _write_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _read_prompt(prompt: str | None, file: Path | None, ids: str | None) -> str | None:
    given = [value for value in (prompt, file, ids) if value is not None]
    if len(given) != 1:
        raise PromptError("give one prompt: -p TEXT, -f FILE (- is stdin), or --ids")
    if file is None:
        return prompt
    try:
        # Bytes, so that neither the locale's encoding nor its line ends change a prompt.
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompt {file}: {error}") from error


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(f"--ids takes numbers, such as '1 15 27'; found {text!r}") from None


def evaluate_artifact(
    artifact: Path,
    against: str,
    text: Path | None,
    window: int | None,
    prompt: float,
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    from ..evaluate.quality import evaluate
    from ..model import load

    with progress(as_json) as tell:
        quality = evaluate(load(artifact, **loading), against, text, window, tell, prompt)
    if as_json:
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


def bench_artifact(
    artifact: Path,
    prompt_tokens: int,
    contexts: list[int],
    new_tokens: int,
    batch: int,
    repeat: int,
    threads: int | None,
    chunk: int,
    trust: bool,
    as_json: bool,
) -> None:
    from ..evaluate.speed import measure_speed

    with progress(as_json) as tell:
        speed = measure_speed(
            artifact,
            prompt_tokens,
            contexts,
            new_tokens,
            batch,
            repeat,
            threads,
            chunk,
            tell,
            trust,
        )
    if as_json:
        print_json(speed.data())
        return
    table = Table(show_header=False, box=None)
    table.add_row("load", f"{speed.load_seconds:.2f} s")
    table.add_row(f"prefill of {prompt_tokens}", f"{speed.prefill_tokens_per_second:.1f} tokens/s")
    for context, rate in speed.decode_tokens_per_second.items():
        table.add_row(f"decode at {context}", f"{rate:.1f} tokens/s")
    out.print(table)


def estimate_model(model: str, options: dict[str, Any], budget: str | None, as_json: bool) -> None:
    limit = None if budget is None else parse_bytes(budget)
    from ..api import estimate
    from ..compiler.report import human_bytes

    found = estimate(model, budget=limit, **options)
    if as_json:
        print_json({**vars(found), "total": found.total})
        return
    table = Table(show_header=False, box=None)
    table.add_row("weights", human_bytes(found.weights))
    table.add_row(f"KV cache, {found.batch} x {found.context:,} tokens", human_bytes(found.cache))
    if found.cache_peak != found.cache:
        table.add_row("  while a prompt as long is read", human_bytes(found.cache_peak))
    table.add_row(f"activations, {found.chunk} tokens a step", human_bytes(found.activations))
    table.add_row("in all", human_bytes(found.total))
    if found.largest_context is not None:
        fits = (
            f"{found.largest_context:,} tokens"
            if found.largest_context
            else "none: the weights alone do not fit"
        )
        table.add_row(f"largest context in {human_bytes(limit or 0)}", fits)
    out.print(table)


def inspect_artifact(artifact: Path, graph: bool, notes: bool, as_json: bool) -> None:
    import json

    from ..compiler.ir.manifest import GRAPH
    from ..runtime.artifact import Artifact

    found = Artifact.open(artifact)
    if graph:
        sys.stdout.write(found.file(GRAPH).read_text(encoding="utf-8"))
        return
    report = json.loads(found.file("report.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(
            {
                "manifest": found.manifest.model_dump(mode="json"),
                "passes": report["passes"],
                "check": report["check"],
            }
        )
        return
    from ..compiler.report import cache_bytes, human_bytes, summary_lines

    manifest, model = found.manifest, found.manifest.model
    table = Table(show_header=False, box=None)
    for label, value in (
        ("model", f"{model.source} ({model.architecture}), {model.parameters:,} parameters"),
        ("target", f"{manifest.target}, flavour {manifest.flavour}"),
        *(
            ("kernel", name)
            for name in manifest.files
            if name.startswith("kernels/") and name.endswith(".py")
        ),
        (
            "weights",
            f"{manifest.recipe['weights']['format']}, {human_bytes(manifest.weight_bytes)}",
        ),
        ("context", f"{model.context:,} tokens"),
        (
            "KV cache",
            f"{_cache_methods(manifest.recipe['cache'])}, "
            f"{manifest.cache_bytes} bytes for B rows of C tokens",
        ),
        ("", cache_bytes(manifest.layout(), model.context)),
        ("made by", f"einfold {manifest.einfold}, {manifest.created}"),
    ):
        table.add_row(label, value)
    out.print(table)
    out.print("passes")
    for line, record in zip(summary_lines(report["passes"]), report["passes"], strict=True):
        out.print(f"  {line}")
        for note in record["notes"]:
            if notes or note["action"] == "skipped":
                out.print(
                    f"    {note['action']} {note['where']}: {note['what']}",
                    style="dim",
                )


def _cache_methods(recipe: dict[str, Any]) -> str:
    """`f32, prune streaming_llm`: how a recipe has the KV cache stored."""
    chosen = {name: value["method"] for name, value in recipe.items() if isinstance(value, dict)}
    return ", ".join([recipe["storage"], *(f"{name} {method}" for name, method in chosen.items())])


def diff_graphs(before: Path, after: Path, context: int, as_json: bool) -> None:
    from ..compiler.ir.diff import diff_text

    found = diff_text(_graph_text(before), _graph_text(after), (str(before), str(after)), context)
    if as_json:
        print_json({"same": found.same, "counts": found.counts, "lines": list(found.lines)})
    else:
        for op, (old, new) in found.counts.items():
            out.print(f"{op}: {old} -> {new}")
        for line in found.lines:
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
            out.print(line, style=style)
    raise typer.Exit(0 if found.same else 1)


def _graph_text(path: Path) -> str:
    from ..compiler.ir.manifest import GRAPH

    file = path / GRAPH if path.is_dir() else path
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read the graph {file}: {error}") from error


def list_passes(recipe: Path | None, options: dict[str, Any], as_json: bool) -> None:
    from ..api import resolve_recipe
    from ..compiler.pipeline import language_model_passes

    chosen = resolve_recipe(recipe, **options)
    pipeline = language_model_passes(chosen.weight_passes(), chosen.cache_passes())
    rows: list[dict[str, Any]] = [
        {
            "name": step.name,
            "what": _first_lines(type(step)),
            "options": step.options(),
            "requires": sorted(step.requires),
            "ensures": sorted(step.ensures),
        }
        for step in pipeline
    ]
    if as_json:
        print_json(rows)
        return
    for number, row in enumerate(rows, start=1):
        shown = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        out.print(f"{number:2d} {row['name']}" + (f" ({shown})" if shown else ""))
        out.print(f"   {row['what']}", style="dim")


def list_methods(as_json: bool) -> None:
    from ..compiler.passes.cache_methods import FAMILIES

    rows: list[dict[str, Any]] = [
        {
            "family": family,
            "name": name,
            "what": _first_lines(kind),
            "options": kind().options(),
        }
        for family, known in FAMILIES.items()
        for name, kind in known.items()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        out.print(f"--{row['family']} {row['name']}")
        out.print(f"   {row['what']}", style="dim")
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        out.print(f"   {options or 'no options'}", style="dim")


def _first_lines(kind: type[Any]) -> str:
    """The first paragraph of a docstring, on one line."""
    import inspect

    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
