"""The verbs and their options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="einfold",
    help="Compile transformer models so that they fit and fly. Every verb takes --help.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Target(str, Enum):
    onnx = "onnx"
    triton = "triton"
    reference = "reference"


class Weights(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


class CacheStorage(str, Enum):
    f32 = "f32"
    int8 = "int8"


class EngineName(str, Enum):
    onnx = "onnx"
    triton = "triton"
    reference = "reference"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Artifact = Annotated[
    Path, typer.Argument(help="An artifact folder, as `compile` writes it.", show_default=False)
]
ModelName = Annotated[
    str, typer.Argument(help="A Hugging Face model folder, or a hub id.", show_default=False)
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="TOML file that sets every knob, or the name of a recipe that comes with einfold "
        "(int4, int4-128, int4-exact, streaming); options override it.",
    ),
]
TargetOption = Annotated[
    Target | None,
    typer.Option(
        help="What to generate: a model for onnxruntime, or Triton kernels for attention on a GPU, beside "
        "which torch runs the rest, or nothing (reference: torch runs the graph by its operators' meaning, "
        "slowly). [default: onnx]",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="How weights are stored. fp16 halves the file; on a CPU it is a storage format only, the "
        "arithmetic stays float32. int8 and int4 are group-wise, rounded to nearest. [default: fp32]",
        show_default=False,
    ),
]
CacheOption = Annotated[
    CacheStorage | None,
    typer.Option(
        "--cache",
        help="How the KV cache is stored. int8 has one scale a channel, from a short calibration text: a "
        "quarter of the bytes, and faster decoding at long contexts. [default: f32]",
        show_default=False,
    ),
]
_WRITTEN = "METHOD or METHOD:key=value,key=value; `einfold methods` lists them with their options"
PruneOption = Annotated[
    str | None,
    typer.Option(
        "--prune",
        metavar="METHOD[:KEY=VALUE,..]",
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
        help="Pack the tokens of the KV cache into few bits, the newest left as they are. "
        f"{_WRITTEN}. [default: packed into nothing, see --cache]",
        show_default=False,
    ),
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="METHOD[:KEY=VALUE,..]",
        help="Let layers share their keys and values, or shrink the channels of both. "
        f"{_WRITTEN}. [default: each layer its own]",
        show_default=False,
    ),
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
    EngineName | None,
    typer.Option(
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


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(f"einfold {metadata.version('einfold')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
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
    recipe: RecipeFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of context to compile for. [default: the model's own limit]",
            show_default=False,
        ),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Standard ONNX operators only (opset 24); slower.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact that exists.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Run the finished artifact beside the reference on a few tokens, and behind a prompt of "
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
    from .verbs import compile_model

    options = {
        "target": _name(target),
        "cubins": None if cubins is None else [part.strip() for part in cubins.split(",")],
        "weights": _name(weights),
        "cache": _name(cache),
        "prune": prune,
        "quant": quant,
        "share": share,
        "recipe": recipe,
        "context": context,
        "portable": portable or None,
    }
    compile_model(model, out, options, force, check, dump, json)


@app.command()
def run(
    artifact: Artifact,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "-f", "--file", help="Read the prompt from a file; - is stdin.", show_default=False
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids, such as '1 15 27'.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message, with --chat.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 is all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the smallest set with this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens under this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: avoid tokens seen before.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes a draw repeatable.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop at this text; may be given again.", show_default=False),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past end-of-text tokens.")
    ] = False,
    engine: Engine = None,
    trust: Trust = False,
    threads: Threads = None,
    chunk: Chunk = 512,
    verify: Annotated[bool, typer.Option(help="Check the files' hashes first.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    from .verbs import run_artifact

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or [],
        "ignore_eos": ignore_eos,
    }
    loading: dict[str, Any] = {
        "engine": _name(engine),
        "threads": threads,
        "chunk": chunk,
        "verify": verify,
        "trust": trust,
    }
    run_artifact(artifact, prompt, file, ids, chat, system, options, loading, json)


@app.command("eval")
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
    from .verbs import evaluate_artifact

    evaluate_artifact(
        artifact,
        against,
        text,
        window,
        prompt,
        {"engine": _name(engine), "threads": threads, "chunk": chunk, "trust": trust},
        json,
    )


@app.command()
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
    from .verbs import bench_artifact

    bench_artifact(
        artifact,
        prompt_tokens,
        context or [128],
        new_tokens,
        batch,
        repeat,
        threads,
        chunk,
        trust,
        json,
    )


@app.command()
def estimate(
    model: ModelName,
    target: TargetOption = None,
    weights: WeightsOption = None,
    cache: CacheOption = None,
    prune: PruneOption = None,
    quant: QuantOption = None,
    share: ShareOption = None,
    recipe: RecipeFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of context to compile for, and to fill. [default: the model's own limit]",
            show_default=False,
        ),
    ] = None,
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
    from .verbs import estimate_model

    options = {
        "target": _name(target),
        "weights": _name(weights),
        "cache": _name(cache),
        "prune": prune,
        "quant": quant,
        "share": share,
        "recipe": recipe,
        "context": context,
        "batch": batch,
        "chunk": chunk,
    }
    estimate_model(model, options, budget, json)


@app.command()
def inspect(
    artifact: Artifact,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's text.")] = False,
    notes: Annotated[bool, typer.Option("--notes", help="Print every note of every pass.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact holds and what each pass did."""
    from .verbs import inspect_artifact

    inspect_artifact(artifact, graph, notes, json)


@app.command()
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
    from .verbs import diff_graphs

    diff_graphs(before, after, context, json)


@app.command()
def passes(
    target: TargetOption = None,
    weights: WeightsOption = None,
    cache: CacheOption = None,
    prune: PruneOption = None,
    quant: QuantOption = None,
    share: ShareOption = None,
    recipe: RecipeFile = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="The pipeline of the portable flavour.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the pipeline: each pass, in order, with its options and what it does."""
    from .verbs import list_passes

    options = {
        "target": _name(target),
        "weights": _name(weights),
        "cache": _name(cache),
        "prune": prune,
        "quant": quant,
        "share": share,
        "portable": portable or None,
    }
    list_passes(recipe, options, json)


@app.command()
def methods(json: Json = False, debug: Debug = False) -> None:
    """List the methods that --prune, --quant and --share take, each with its options."""
    from .verbs import list_methods

    list_methods(json)


@app.command()
def explain(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py::NAME",
            help="A function or module of a Python file, which also gives its `example_inputs()`. "
            "The file is run.",
            show_default=False,
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show each attention of a function: passes before and after, what runs for it, or why it stays."""
    from .explain import explain_target

    explain_target(function, json)


def _name(choice: Enum | None) -> str | None:
    return None if choice is None else str(choice.value)
