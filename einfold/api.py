"""The Python API of compiling: the same road, with the same options, as the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from .compiler.analysis.liveness import peak_activation_bytes
from .compiler.codegen.target import Held, Progress
from .compiler.driver import (
    Check,
    CompileReport,
    Input,
    compile_to,
    export_module,
    open_model,
    trace,
    wrap_model,
)
from .compiler.encoder_decoder import cross_bytes
from .compiler.export_checkpoint import ExportReport
from .compiler.export_checkpoint import export_checkpoint as write_checkpoint
from .compiler.frontend.example import Example
from .compiler.frontend.two_programs import READ
from .compiler.ir.manifest import MODEL
from .compiler.ir.program import Program
from .compiler.ir.together import together
from .compiler.passes.weight_methods import laid_over, read_weights
from .compiler.recipe import Recipe
from .errors import RecipeError
from .runtime.encoding import ROWS
from .runtime.engine import CHUNK

#: A method for the KV cache: `METHOD:key=value,..`, a table with the key `method`, or "none".
Method: TypeAlias = str | dict[str, Any] | None


def compile(
    model: str | Path | Any,
    out: str | Path,
    *,
    weights: str | None = None,
    cache: str | None = None,
    prune: Method = None,
    quant: Method = None,
    share: Method = None,
    read: Method = None,
    portable: bool | None = None,
    context: int | None = None,
    target: str | None = None,
    cubins: Sequence[str] | None = None,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    tokenizer: Any = None,
    force: bool = False,
    check: bool = True,
    dump: str | Path | None = None,
    progress: Progress | None = None,
) -> CompileReport:
    """Compiles a causal language model, an encoder or an encoder-decoder into the artifact folder `out`.

    `model` is a Hugging Face model folder, a hub id, a GGUF file, or a `PreTrainedModel` in memory (then give
    its `tokenizer` too if the artifact is to take text). For an encoder options of the cache are refused.
    `recipe` sets every knob; the other options override it. `prune`, `quant`, `share` and `read` choose
    methods for the KV cache (`einfold methods` lists them) as `"METHOD:key=value,.."` or a table with the key
    `method`; "none" undoes the recipe's choice.
    `target` is "onnx", "triton" or "reference"; `cubins` names GPUs, such as "sm_90", to compile Triton
    kernels for ahead of time. `check` runs the captured graph beside the model as transformers
    runs it, and the finished artifact beside both, on a few tokens, and refuses to keep one that disagrees.
    `dump` is a folder for the graph's text after each pass.

    Raises the errors of `einfold.errors`; `out` appears whole or not at all.
    """
    chosen = resolve_recipe(
        recipe,
        weights=weights,
        cache=cache,
        prune=prune,
        quant=quant,
        share=share,
        read=read,
        portable=portable,
        context=context,
        target=target,
        cubins=cubins,
    )
    found = open_input(model, tokenizer)
    return compile_to(
        found,
        Path(out),
        chosen,
        force=force,
        dump=None if dump is None else Path(dump),
        progress=progress,
        check=_check(found) if check else None,
    )


def _check(model: Input) -> Check:
    """What compares a model of its kind with the original."""
    if model.encoder is not None:
        from .evaluate.encoder_check import EncoderCheck

        return EncoderCheck()
    if model.pair is not None:
        from .evaluate.encoder_decoder_check import EncoderDecoderCheck

        return EncoderDecoderCheck()
    from .evaluate.original import OriginalCheck

    return OriginalCheck()


def resolve_recipe(
    recipe: str | Path | Recipe | dict[str, Any] | None,
    *,
    weights: str | None = None,
    cache: str | None = None,
    prune: Method = None,
    quant: Method = None,
    share: Method = None,
    read: Method = None,
    portable: bool | None = None,
    context: int | None = None,
    target: str | None = None,
    cubins: Sequence[str] | None = None,
) -> Recipe:
    """A recipe with the given options laid over it, and then checked as a whole."""
    where = "the recipe"
    if recipe is None:
        data, where = {}, "the options"
    elif isinstance(recipe, Recipe):
        data = recipe.model_dump()
    elif isinstance(recipe, dict):
        data = copy.deepcopy(recipe)
    else:
        path = find_recipe(recipe)
        data, where = Recipe.load(path), str(path)
    for place, value in (
        (("cache", "storage"), cache),
        (("cache", "prune"), prune),
        (("cache", "quant"), quant),
        (("cache", "share"), share),
        (("cache", "read"), read),
        (("onnx", "portable"), portable),
        (("context",), context),
        (("target",), target),
        (("triton", "cubins"), None if cubins is None else tuple(cubins)),
    ):
        if value is not None:
            undone = value == "none" and place[0] == "cache"
            _lay_over(data, place, None if undone else value)
    if weights is not None:
        _weights_over(data, weights, where)
    return Recipe.build(data, where)


def _weights_over(data: dict[str, Any], text: str, where: str) -> None:
    table = data.get("weights") or {}
    try:
        under = read_weights(table) if isinstance(table, str) else table
        if isinstance(under, dict):  # else it is left for the check to refuse
            # What was asked for is meant for weights that come in codes too.
            data["weights"] = {**laid_over(under, text), "keep": False}
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _lay_over(data: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Sets a key; a section that is no table is left for the check to refuse."""
    section: Any = data
    for name in place[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return
    section[place[-1]] = value


def find_recipe(name: str | Path) -> Path:
    """A recipe file, or one that comes with einfold by its name, such as `int4` or `streaming`."""
    own = Path(__file__).with_name("recipes") / f"{name}.toml"
    return (
        own
        if not Path(name).exists() and Path(name).name == str(name) and own.is_file()
        else Path(name)
    )


def open_input(model: str | Path | Any, tokenizer: Any = None) -> Input:
    """A model as compiles take it, from a folder, a hub id or memory."""
    if isinstance(model, (str, Path)):
        found = open_model(model)
        found.tokenizer = tokenizer
        return found
    return wrap_model(model, tokenizer)


@dataclass(frozen=True)
class Estimate:
    """Bytes that a compile and a run would take, told before any weight is read.

    `cache` is held once a prompt has been read, `cache_peak` at most while one that fills the context is;
    `cache_read` is what a step of one token reads of it then. `activations` is for a prefill step of
    `chunk` tokens at the end of the context. `runtime` is what the runtime packs of weights and keeps in
    its arena beside these, `process` what a process takes that runs any artifact of the target.
    `largest_context` is the longest run, prompt and answer, whose `resident` bytes fit the budget (None
    without one), up to the `context` that is compiled for; 0 where none does. Of an encoder the cache is 0,
    and the activations are of `batch` texts of the whole context, or images. Of an encoder-decoder `given`
    is what the encoder gives and the decoder reads in every step.
    """

    weights: int
    cache: int
    cache_peak: int
    activations: int
    context: int
    batch: int
    chunk: int
    cache_expression: str
    budget: int | None = None
    largest_context: int | None = None
    runtime: int = 0
    process: int = 0
    given: int = 0
    cache_read: int = 0

    @property
    def resident(self) -> int:
        """Bytes of memory that a process holds at most which runs the artifact."""
        return self.total + self.runtime + self.process

    @property
    def total(self) -> int:
        """Bytes at most: while the end of a prompt that fills the context is read."""
        return self.weights + self.cache_peak + self.activations + self.given


def estimate(
    model: str | Path,
    *,
    target: str | None = None,
    weights: str | None = None,
    cache: str | None = None,
    prune: Method = None,
    quant: Method = None,
    share: Method = None,
    read: Method = None,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    context: int | None = None,
    portable: bool | None = None,
    batch: int = 1,
    budget: int | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Estimate:
    """Weights, cache and activation bytes of a model, from its config alone.

    Runs the same passes as a compile with the same options, on weights that are known by shape only, so
    the figures are those of the artifact, and what a compile for this `context` would refuse is refused.
    They are for `batch` rows that fill the context; `budget` is in bytes, of all that the process holds.
    `progress` is told what is being done.
    """
    found = open_model(model)
    chosen = resolve_recipe(
        recipe,
        weights=weights,
        cache=cache,
        prune=prune,
        quant=quant,
        share=share,
        read=read,
        context=context,
        portable=portable,
        target=target,
    )
    if batch < 1 or chunk < 1:
        raise RecipeError(f"batch and chunk must be 1 or more, not {batch} and {chunk}")
    program, _ = trace(found, chosen, progress=progress)
    layout, full, made_for = program.layout, program.model.context, chosen.made_for
    stored = together([program] if program.encoder is None else [program, program.encoder])

    def parts(tokens: int) -> tuple[int, int, int, int]:
        slots = {} if layout is None else layout.slot_dims(tokens, tokens)
        steps = [{"B": 1, "S": min(chunk, tokens), "N": 1}, {"B": batch, "S": 1, "N": batch}]
        if layout is None:
            steps = [{"B": batch, "S": tokens}]
        activations = [
            peak_activation_bytes(program, step | slots | {READ: tokens}, made_for.scratch)
            for step in steps
        ]
        given = 0
        if program.encoder is not None:
            reads = {"B": min(batch, ROWS), "S": tokens}
            activations.append(peak_activation_bytes(program.encoder, reads, made_for.scratch))
            given = cross_bytes(program.encoder, batch, tokens)
        most = max(activations)
        held = 0 if layout is None else int(layout.peak_bytes(batch, tokens, tokens))
        return held, most, kept.runtime(most), given

    weight_bytes, kept = stored.nbytes, _held(program, chosen)
    largest = None
    if budget is not None and not full:
        raise RecipeError(
            f"{found.source.location} reads no text, so there is no longest one that fits a budget; leave "
            "the budget out"
        )
    if budget is not None:
        low, high = 0, full
        while low < high:
            middle = (low + high + 1) // 2
            fits = weight_bytes + kept.process + sum(parts(middle)) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        largest = low
    peak, activations, runtime, given = parts(full)
    return Estimate(
        weight_bytes,
        0 if layout is None else int(layout.bytes(batch, full)),
        peak,
        activations,
        full,
        batch,
        chunk if layout is not None else full,
        "0" if layout is None else str(layout.account()),
        budget,
        largest,
        runtime,
        kept.process,
        given,
        0 if layout is None else layout.read_bytes(batch, full),
    )


def _held(program: Program, recipe: Recipe) -> Held:
    """What a process holds that runs a program, and the encoder before it."""
    found = recipe.made_for.held(program)
    if program.encoder is None:
        return found
    more = recipe.made_for.held(program.encoder)
    return replace(found, packed=found.packed + more.packed, arena=max(found.arena, more.arena))


def export_checkpoint(
    model: str | Path | Any,
    out: str | Path,
    *,
    weights: str | None = None,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    tokenizer: Any = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a causal language model as a folder in the format compressed-tensors, its linears in codes.

    `model`, `weights` and `recipe` are as in `compile`; what a recipe says beside its weights is not used.
    Without a format, the codes of a checkpoint that has some are written as they are. Embeddings, and a head
    that shares its weight with one, are written as they come. The codes stand for the same numbers as those
    of an artifact.

    Raises the errors of `einfold.errors`: UnsupportedError for a scheme that the format does not hold; `out`
    appears whole or not at all.
    """
    chosen = resolve_recipe(recipe, weights=weights)
    found = open_input(model, tokenizer)
    return write_checkpoint(found, Path(out), chosen, force, progress)


def export_onnx(
    model: str | Path | Any,
    out: str | Path,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    output_names: Sequence[str] | None = None,
    portable: bool = False,
    weights: str | None = None,
    force: bool = False,
    check: bool = True,
) -> Path:
    """Exports to a folder with model.onnx and its weights; gives the path of model.onnx.

    With `example_inputs` any `nn.Module` is exported by itself: a tuple of arguments (or one tensor), a
    table of them by name, or `example_kwargs` beside them; None and numbers among them are fixed. Inputs
    are named as in `forward`, outputs as in the table that the module gives (else `output_0` and so on, or
    `output_names`), axes as in `dynamic_shapes`, which is as torch.export takes it. Matrix products are
    raised, fused and, with `weights`, quantized like a language model's, and attention that the module
    spells out becomes one operator where that gains. Float16 and bfloat16 are computed in float32; inputs and
    outputs keep their type.

    What was written is run by onnxruntime on the example inputs, and on inputs of other sizes where there
    are dynamic ones, and is not kept where it differs from the module; `check=False` leaves that out.

    Without example inputs `model` is a causal language model, an encoder or an encoder-decoder, as `compile`
    takes it, and the folder is a whole artifact; of the last the encoder is encoder.onnx beside it.
    """
    if example_inputs is None and example_kwargs is None:
        compile(model, out, weights=weights, portable=portable, force=force, check=check)
    else:
        from .evaluate.export_check import ModuleCheck

        example = Example.of(() if example_inputs is None else example_inputs, example_kwargs)
        export_module(
            model,
            Path(out),
            example,
            dynamic_shapes,
            resolve_recipe(None, weights=weights, portable=portable),
            force,
            output_names,
            ModuleCheck() if check else None,
        )
    return Path(out) / MODEL
