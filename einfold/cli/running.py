"""`run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PromptError, RecipeError, UnsupportedError
from .answering import run_encoder_decoder, seconds_of, told_seconds, write_piece
from .common import err, out, parse_bytes, print_json
from .encoding import kind_of, run_encoder
from .options import Artifact, Chunk, Debug, DeviceFile, Engine, Json, Memory, Threads, Trust
from .prompts import parse_ids, read_prompt

if TYPE_CHECKING:
    from ..runtime.tokenizer import Tokenizer


def run(
    context: typer.Context,
    artifact: Artifact,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            help="The prompt; for an encoder, or an encoder-decoder, a text, and may be given again.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "-f",
            "--file",
            help="Read the prompt from a file; - is stdin. What an encoder reads may also be arrays by the "
            "names of its inputs, from a .npz, or the first of them from a .npy, such as input_features.",
            show_default=False,
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids, such as '1 15 27'.", show_default=False),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put the prompt into the model's chat template, which is what happens anyway where the "
            "model has one; refuse where it has none.",
        ),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="A system message, for the chat template.", show_default=False),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="For an encoder-decoder: what the answer begins with, such as "
            "'<|en|><|transcribe|><|notimestamps|>'.",
            show_default=False,
        ),
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
    memory: Memory = None,
    room: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Tokens of prompt and answer together that --memory leaves room for. [default: those of the "
            "prompt and --max-new-tokens]",
            show_default=False,
        ),
    ] = None,
    device: DeviceFile = None,
    verify: Annotated[bool, typer.Option(help="Check the files' hashes first.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the results of an encoder to this .npz instead of stdout.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, or answer what an encoder reads; the text streams to stdout. Of an encoder alone,
    print the results as JSON."""
    given = {
        parameter.opts[-1]: str(parameter.name)
        for parameter in context.command.params
        if getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    }
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
        "engine": engine,
        "threads": threads,
        "chunk": chunk,
        "verify": verify,
        "trust": trust,
    }
    if room is not None and memory is None:
        raise RecipeError("--context is what --memory leaves room for; give both")
    if device is not None and memory is None:
        raise RecipeError("--device is what --memory is planned for; give both")
    if chat and raw:
        raise PromptError("--chat and --raw exclude each other")
    kind = kind_of(artifact)
    if memory is not None:
        if kind != "causal_lm":
            raise UnsupportedError(
                "--memory is for models that continue a text, of the targets onnx and triton"
            )
        loading |= {"memory": parse_bytes(memory), "context": room, "device": device}
    if kind == "encoder_decoder":
        read = (prompt or [], file, ids)
        run_encoder_decoder(artifact, *read, prefix or "", given, options, loading, json)
        return
    if kind == "encoder":
        run_encoder(artifact, prompt or [], file, ids, output, given, loading, as_json=json)
        return
    if output is not None:
        raise PromptError(f"--output is for the results of an encoder, and {artifact} writes text")
    if prefix is not None:
        raise PromptError(
            f"--prefix is for an encoder-decoder, and {artifact} continues its prompt; put it there"
        )
    if prompt is not None and len(prompt) > 1:
        raise PromptError(f"{artifact} continues one prompt at a time; give one -p")
    templated = False if raw else True if chat or system is not None else None
    text = prompt[0] if prompt else None
    run_artifact(artifact, text, file, ids, templated, system, options, loading, json)


def run_artifact(
    artifact: Path,
    prompt: str | None,
    file: Path | None,
    ids: str | None,
    chat: bool | None,
    system: str | None,
    options: dict[str, Any],
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    """`chat` None: the chat template is used where the model has one."""
    from ..model import load
    from ..runtime.artifact import Artifact as Opened
    from ..runtime.tokenizer import Tokenizer

    text = read_prompt(prompt, file, ids)
    if chat and ids is not None:
        raise PromptError("--chat needs a prompt of text, not --ids")
    if system is not None and not chat:
        raise PromptError("--system needs the chat template; leave out --raw")
    asked = None
    if loading.get("memory") is not None and loading["context"] is None:
        opened = Opened.open(artifact, loading["verify"], weights=False)
        asked = _tokens(lambda: Tokenizer.of(opened), text, ids, chat, system)
        loading["context"] = max(2, len(asked[0]) + int(options["max_new_tokens"]))
    started = time.perf_counter()
    model = load(artifact, **loading)
    load_seconds = time.perf_counter() - started
    if model.plan is not None:
        err.print(model.plan.sentence(), style="dim")
        if model.plan.warning():
            err.print(model.plan.warning(), style="yellow")
    tokens, templated = asked or _tokens(lambda: model.tokenizer, text, ids, chat, system)
    by_itself = templated and chat is None
    said = "in the model's chat template (--raw leaves it out); " if by_itself else ""
    show = None if as_json else write_piece
    result = model.generate(tokens, on_text=show, **options)
    times = model.timings
    timings = seconds_of(times, load_seconds)
    held, spilled = model.held_experts, model.spilled
    if as_json:
        print_json(
            {
                "text": result.text,
                "tokens": result.tokens,
                "prompt_tokens": result.prompt_tokens,
                "chat_template": templated,
                "finish_reason": result.finish_reason,
                "timings": timings,
                **({"plan": model.plan.data()} if model.plan is not None else {}),
                **({"experts": asdict(held)} if held is not None else {}),
                **({"spilled": asdict(spilled)} if spilled is not None else {}),
            }
        )
        return
    if not model.artifact.has("tokenizer.json"):
        out.print(" ".join(map(str, result.tokens)), end="")
    sys.stdout.write("\n")
    written = f"{result.prompt_tokens} + {len(result.tokens)} tokens ({result.finish_reason})"
    err.print(said + written + told_seconds(times, load_seconds), style="dim")
    if held is not None:
        err.print(held.sentence(), style="dim")
    if spilled is not None:
        err.print(spilled.sentence(), style="dim")


def _tokens(
    tokenizer: Callable[[], Tokenizer],
    text: str | None,
    ids: str | None,
    chat: bool | None,
    system: str | None,
) -> tuple[list[int], bool]:
    """The prompt as token ids, and whether it was put into the chat template."""
    if ids is not None:
        return parse_ids(ids), False
    found = tokenizer()
    if not (chat or (chat is None and found.has_template)):
        return found.encode(str(text)), False
    messages = [{"role": "system", "content": system}] if system else []
    return found.chat([*messages, {"role": "user", "content": str(text)}]), True
