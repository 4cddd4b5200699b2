"""`inspect`, `diff`, `passes` and `methods`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import ArtifactError, pass_on
from .common import out, print_json, printable
from .options import (
    Artifact,
    CacheOption,
    Debug,
    Json,
    PruneOption,
    QuantOption,
    ReadOption,
    RecipeFile,
    ShareOption,
    TargetOption,
    WeightsOption,
    recipe_options,
)

if TYPE_CHECKING:
    from ..compiler.ir.quant.scheme import Scheme
    from ..compiler.passes.method_text import Method


class MethodsOf(StrEnum):
    """What methods are for."""

    cache = "cache"
    weights = "weights"


def inspect(
    artifact: Artifact,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's text.")] = False,
    notes: Annotated[bool, typer.Option("--notes", help="Print every note of every pass.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact holds and what each pass did."""
    inspect_artifact(artifact, graph, notes, json)


def inspect_artifact(artifact: Path, graph: bool, notes: bool, as_json: bool) -> None:
    from ..compiler.ir.manifest import READER, WHOLE
    from ..runtime.artifact import Artifact

    found = Artifact.open(artifact)
    if graph:
        for part in (READER, WHOLE):  # an encoder stands before what reads its results
            if found.has(part.graph) or part == WHOLE:
                sys.stdout.write(printable(_text(found, part.graph)))
        return
    report = _report(found)
    if as_json:
        print_json(
            {
                "manifest": found.manifest.model_dump(mode="json"),
                "passes": report["passes"],
                "check": report["check"],
                "memory": report["memory"],
            }
        )
        return
    from ..compiler.ir.manifest import ENCODER, ENCODER_DECODER
    from ..compiler.report import arena_bytes, context_text, human_bytes, summary_lines

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
            f"{_recipe(found, 'weights').get('format')}, {human_bytes(manifest.weight_bytes)}",
        ),
        ("context", context_text(model.context)),
        *(_call(manifest) if manifest.kind in (ENCODER, ENCODER_DECODER) else ()),
        *(_cache(found) if manifest.kind != ENCODER else ()),
        *(("arena", arena_bytes(plan)) for plan in report["memory"]),
        ("made by", f"einfold {manifest.einfold}, {manifest.created}"),
    ):
        table.add_row(label, printable(value))
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


def _cache(artifact: Any) -> list[tuple[str, str]]:
    from ..compiler.report import cache_bytes

    manifest = artifact.manifest
    methods = _cache_methods(_recipe(artifact, "cache"))
    read = ", T that were read" if "T" in manifest.cache_bytes else ""
    return [
        ("KV cache", f"{methods}, {manifest.cache_bytes} bytes for B rows of C tokens{read}"),
        ("", cache_bytes(manifest.layout(), manifest.model.context)),
    ]


def _call(manifest: Any) -> list[tuple[str, str]]:
    """What an encoder takes and gives."""
    return [
        *(("takes", f"{entry.name} {entry}") for entry in manifest.inputs),
        *(("gives", f"{entry.name} {entry}") for entry in manifest.outputs),
    ]


def _text(artifact: Any, name: str) -> str:
    try:
        return str(artifact.read(name), "utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{artifact.folder}/{name} is no text: {error}") from error


def _recipe(artifact: Any, name: str) -> dict[str, Any]:
    part = artifact.manifest.recipe.get(name)
    if not isinstance(part, dict):
        raise ArtifactError(f"the manifest of {artifact.folder} has a recipe without {name!r}")
    return part


def _report(artifact: Any) -> dict[str, Any]:
    """The report's passes, check, arenas; raises ArtifactError where they are not as einfold writes them."""
    import json

    where = f"{artifact.folder}/report.json"
    try:
        report = json.loads(_text(artifact, "report.json"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: {str(error)[:200]}") from error
    try:
        for record in report["passes"]:
            numbers = [note["bytes_saved"] for note in record["notes"]]
            notes = [[note["action"], note["where"], note["what"]] for note in record["notes"]]
            if not all(isinstance(text, str) for note in notes for text in [*note, record["name"]]):
                raise TypeError("a note is no text")
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise TypeError("a number is none")
        memory = report.get("memory", [])  # older artifacts have none
        sizes = [size for plan in memory for size in (plan["arena"], plan["bound"])]
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError("a size is none")
        if not all(isinstance(plan["step"], str) for plan in memory):
            raise TypeError("a step has no name")
        return {"passes": report["passes"], "check": report["check"], "memory": memory}
    except (LookupError, TypeError) as error:
        raise ArtifactError(
            f"{where} is damaged: it lacks or misplaces {str(error)[:200]}"
        ) from error


def _cache_methods(recipe: dict[str, Any]) -> str:
    """`f32, prune streaming_llm`: how a recipe has the KV cache stored."""
    chosen = {
        name: value.get("method") for name, value in recipe.items() if isinstance(value, dict)
    }
    return ", ".join(
        [str(recipe.get("storage")), *(f"{name} {method}" for name, method in chosen.items())]
    )


def diff(
    before: Annotated[
        Path,
        typer.Argument(help="A graph's text (.eir) or an artifact folder.", show_default=False),
    ],
    after: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    context: Annotated[int, typer.Option(min=0, help="Lines shown around a change.")] = 2,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two graphs: counts of operators, and the lines. Exits with 1 where they differ."""
    diff_graphs(before, after, context, json)


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
        pass_on(error)
        raise ArtifactError(f"cannot read the graph {file}: {error}") from error


def passes(
    target: TargetOption = None,
    weights: WeightsOption = None,
    cache: CacheOption = None,
    prune: PruneOption = None,
    quant: QuantOption = None,
    share: ShareOption = None,
    read: ReadOption = None,
    recipe: RecipeFile = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="The pipeline of the portable flavour.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the pipeline: each pass, in order, with its options and what it does."""
    options = {
        **recipe_options(target, weights, cache, prune, quant, share, read),
        "portable": portable or None,
    }
    list_passes(recipe, options, json)


def list_passes(recipe: Path | None, options: dict[str, Any], as_json: bool) -> None:
    from ..api import resolve_recipe
    from ..compiler.pipeline import language_model_passes

    chosen = resolve_recipe(recipe, **options).settled(reads=True)
    pipeline = language_model_passes(chosen.weight_passes(), chosen.cache_passes())
    rows: list[dict[str, Any]] = [
        {
            "name": step.name,
            "what": _first_lines(step.what),
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


def methods(
    what: Annotated[
        MethodsOf, typer.Argument(help="What they are for.", show_default=True)
    ] = MethodsOf.cache,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods that --prune, --quant, --share and --read take, or the formats and solvers that
    --weights takes, each with its options."""
    list_methods(json, what)


def list_methods(as_json: bool, what: MethodsOf = MethodsOf.cache) -> None:
    rows = _of_weights() if what is MethodsOf.weights else _of_cache()
    if as_json:
        print_json([{key: row[key] for key in row if key != "shown"} for row in rows])
        return
    for row in rows:
        bits = f", {row['bits']:.3f} bits a weight" if "bits" in row else ""
        out.print(f"{row['shown']}{bits}")
        out.print(f"   {row['what']}", style="dim")
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        out.print(f"   {options or 'no options'}", style="dim")
        if row["measured"]:
            out.print(f"   {row['measured']}", style="dim")


def _of_cache() -> list[dict[str, Any]]:
    from ..compiler.passes.cache_methods import FAMILIES

    return [
        _row(family, kind, kind.defaults(), f"--{family} {name}")
        for family, known in FAMILIES.items()
        for name, kind in known.items()
    ]


def _of_weights() -> list[dict[str, Any]]:
    from ..compiler.ir.quant.scheme import PRESETS
    from ..compiler.passes.method_text import Method
    from ..compiler.passes.weight_methods import SOLVER_METHODS, format_options

    found = []
    for name, preset in PRESETS.items():
        if preset.scheme is not None:
            row = _row(
                "format", Method(type(preset.scheme)), format_options(name), f"--weights {name}"
            )
            found.append(row | {"name": name, "bits": _bits(preset.scheme)})
    solvers = SOLVER_METHODS.items()
    return found + [_row("solver", m, m.defaults(), f"--weights {name}") for name, m in solvers]


def _row(family: str, kind: Method, options: dict[str, Any], shown: str) -> dict[str, Any]:
    return {
        "family": family,
        "name": kind.name,
        "what": _first_lines(kind.what),
        "options": options,
        "measured": kind.paragraph("Measured"),
        "shown": shown,
    }


def _bits(scheme: Scheme) -> float:
    """Bits of a weight in a matrix of 4,096 by 4,096, with scales and whatever else is stored."""
    return 8 * scheme.nbytes((4096, 4096)) / 4096**2


def _first_lines(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return text.split("\n\n")[0].replace("\n", " ")
