"""Options that several verbs take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..compiler.ir.quant.scheme import PRESETS


class CacheStorage(StrEnum):
    f32 = "f32"
    f16 = "f16"
    int8 = "int8"
    int4 = "int4"


#: Names for completion, which must not wait for torch to be imported; a test holds them to what there is.
METHODS = {
    "prune": (
        *("streaming_llm", "razor_attention", "duo_attention", "snapkv", "h2o", "ems"),
        *("scissorhands", "d2o", "kvmerger", "kvcrush", "elastic_cache"),
        *("expected_attention", "locret", "pyramid_kv", "ada_kv", "zipvl", "kvzip"),
    ),
    "quant": ("kivi", "turboquant", "gear", "zipcache", "mikv", "abq", "mustafar"),
    "share": ("cross_layer", "minicache", "cskv", "matryoshka_kv"),
    "read": ("quest", "shadowkv"),
}


def recipe_names() -> list[str]:
    """Recipes that come with einfold."""
    return sorted(file.stem for file in (Path(__file__).parents[1] / "recipes").glob("*.toml"))


def starting(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completion by the beginning of names."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def target_names() -> list[str]:
    """Targets that come with einfold, by their folders: the command line starts without importing them."""
    codegen = Path(__file__).parents[1] / "compiler" / "codegen"
    return sorted(file.parent.name for file in codegen.glob("*/target.py"))


def _known_target(value: str | None) -> str | None:
    if value is not None:
        from ..compiler.codegen.target import TARGETS

        if value not in TARGETS:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(TARGETS)}.")
    return value


def _recipes(incomplete: str) -> list[str]:
    """Names of recipes, and the shell's own TOML files beside them."""
    here = [str(path) for path in sorted(Path().glob("*.toml"))]
    return [name for name in (*recipe_names(), *here) if name.startswith(incomplete)]


def _weights(incomplete: str) -> list[str]:
    """Names of formats and solvers; the latter are read with torch, so only when they are asked for."""
    from ..compiler.solve.solver import SOLVERS

    return [name for name in (*PRESETS, *SOLVERS) if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Artifact = Annotated[
    Path, typer.Argument(help="An artifact folder, as `compile` writes it.", show_default=False)
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face model folder, a GGUF file, or a hub id.", show_default=False
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="TOML file that sets every knob, or the name of a recipe that comes with einfold "
        "(int4, int4-128, int4-exact, mpcache, streaming); options override it. `einfold recipe` lists all "
        "keys.",
        autocompletion=_recipes,
        show_default=False,
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar=f"<{'|'.join(target_names())}>",
        callback=_known_target,
        autocompletion=starting(target_names()),
        help="What to generate: a model for onnxruntime, or Triton kernels for attention on a GPU, beside "
        "which torch runs the rest, or nothing (reference: torch runs the graph by its operators' meaning, "
        "slowly). [default: onnx]",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT|SOLVER[:KEY=VALUE,..]",
        autocompletion=_weights,
        help="How weights are stored, such as int4 or int4:block=64, and what decides their codes, such as "
        "gptq:bits=3,block=64. fp16 halves the file; on a CPU it is a storage format only, the arithmetic "
        "stays float32. `einfold methods weights` lists formats and solvers. "
        "[default: fp32; of a checkpoint whose weights are codes, the codes]",
        show_default=False,
    ),
]
CacheOption = Annotated[
    CacheStorage | None,
    typer.Option(
        "--cache",
        help="How the KV cache is stored. f16 is half of the bytes (targets triton and reference). int8 has "
        "one scale a channel, from a short calibration text: a quarter of the bytes, and faster decoding at "
        "long contexts. int4 is an eighth of the bytes, and costs far more quality. [default: f32]",
        show_default=False,
    ),
]
_WRITTEN = "METHOD or METHOD:key=value,key=value; `einfold methods` lists them with their options"
PruneOption = Annotated[
    str | None,
    typer.Option(
        "--prune",
        metavar="METHOD[:KEY=VALUE,..]",
        autocompletion=starting((*METHODS["prune"], "none")),
        help="Keep fewer tokens in the KV cache: a window for all heads or for some, or the tokens that "
        f"got the most attention. {_WRITTEN}. [default: keep all]",
        show_default=False,
    ),
]
QuantOption = Annotated[
    str | None,
    typer.Option(
        "--quant",
        metavar="METHOD[:KEY=VALUE,..]",
        autocompletion=starting((*METHODS["quant"], "none")),
        help="Pack the tokens of the KV cache into few bits, the first and the newest left as they are. "
        f"{_WRITTEN}. [default: packed into nothing, see --cache]",
        show_default=False,
    ),
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="METHOD[:KEY=VALUE,..]",
        autocompletion=starting((*METHODS["share"], "none")),
        help="Let layers share their keys and values, or shrink the channels of both. "
        f"{_WRITTEN}. [default: each layer its own]",
        show_default=False,
    ),
]
ReadOption = Annotated[
    str | None,
    typer.Option(
        "--read",
        metavar="METHOD[:KEY=VALUE,..]",
        autocompletion=starting((*METHODS["read"], "none")),
        help="Read few of the tokens that are kept in a step, those that its query asks for. "
        f"{_WRITTEN}. [default: read all]",
        show_default=False,
    ),
]
Portable = Annotated[
    bool, typer.Option("--portable", help="Standard ONNX operators only (opset 24); slower.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Threads to compute with. [default: all processors]",
        show_default=False,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar=f"<{'|'.join(target_names())}>",
        callback=_known_target,
        autocompletion=starting(target_names()),
        help="onnxruntime, Triton kernels on a GPU, or the operators' reference meaning in torch. "
        "[default: what the artifact was compiled for]",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Use the compiled kernels (cubins) that a Triton artifact brings for this GPU and Triton "
        "version. They are machine code that nothing checks; without this they are ignored and all "
        "kernels are made from the artifact's graph.",
    ),
]
Chunk = Annotated[
    int, typer.Option(min=1, help="Tokens of a prefill step; bounds the memory of activations.")
]


Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Run within so much memory, such as 2GiB: weights that do not fit are read from the disk in "
        "every step, and so are layers of the cache; of a GPU's where the artifact is for one, and they are "
        "copied from the machine's. `einfold plan` tells which and how fast. [default: all "
        "stay in memory]",
        show_default=False,
    ),
]
DeviceFile = Annotated[
    Path | None,
    typer.Option(
        "--device",
        help="A description of a device, as `einfold device probe` writes it, that --memory is planned for. "
        "[default: this machine's]",
        show_default=False,
    ),
]
Room = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens of prompt and answer together that --memory leaves room for. [default: 4096, or the "
        "artifact's context where that is less]",
        show_default=False,
    ),
]


def name_of(choice: Enum | None) -> str | None:
    """What a choice is called in a recipe."""
    return None if choice is None else str(choice.value)


def recipe_options(
    target: str | None,
    weights: str | None,
    cache: CacheStorage | None,
    prune: str | None,
    quant: str | None,
    share: str | None,
    read: str | None,
) -> dict[str, str | None]:
    """The options that stand for keys of a recipe, as `resolve_recipe` takes them."""
    return {
        "target": target,
        "weights": weights,
        "cache": name_of(cache),
        "prune": prune,
        "quant": quant,
        "share": share,
        "read": read,
    }
