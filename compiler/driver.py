"""The one road from a model to an artifact: capture, passes, weights, code, manifest."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from ..errors import ModelError, RecipeError, UnsupportedError
from .artifact import check_dump, check_output, file_entry, staged
from .calibrate.statistics import Statistics, digest_of, fingerprint
from .calibrate.text import calibration_tokens, rows_of
from .codegen.target import Progress, Target
from .encoder_decoder import account, capture_pair
from .frontend import huggingface, tokens
from .frontend.adapters import Adapter, find_adapter
from .frontend.checkpoint import open_checkpoint, read_config
from .frontend.encoder_decoders import EncoderDecoder, find_encoder_decoder
from .frontend.encoders import Encoder, capture_encoder, encoder_of, result_entries
from .frontend.example import Example
from .frontend.folders import read_folder
from .frontend.huggingface import ModelSource
from .frontend.modules import Captured, capture_module
from .frontend.own_text import own_text, runs
from .frontend.structure import CAUSAL, parameter_count, structure
from .frontend.vision import AUTO as VISION
from .frontend.vision import TextPart, find_text_part
from .ir.allowed import check_allowed
from .ir.interrupts import tracing
from .ir.kept import cache_home
from .ir.manifest import (
    GRAPH,
    NAME,
    READER,
    WEIGHTS,
    WHOLE,
    Begin,
    FileEntry,
    Kind,
    Manifest,
    ModelEntry,
)
from .ir.peak_memory import peak_memory
from .ir.printer import print_program
from .ir.program import Program, no_inputs
from .ir.quant.scheme import Scheme
from .ir.stored import TurnedWeight, scheme_of
from .ir.together import together
from .ir.weights import Weight
from .ir.weights_file import write_weights
from .kept_trace import trace_language_model
from .memory.survey import inputs_at, step_dims
from .passes.base import Pass
from .passes.cleanup.simplify import Simplify
from .passes.compare_original import CompareOriginal
from .passes.fusion.fuse_attention import FuseAttention
from .passes.memory.order_calls import OrderCalls
from .pipeline import (
    PassManager,
    PassRecord,
    encoder_passes,
    language_model_passes,
    module_passes,
    planning_passes,
)
from .recipe import CacheSection, Recipe
from .report import report_page

#: Tokens of context for a model whose config names no limit.
DEFAULT_CONTEXT = 2048

REPORT = "report.json"
PAGE = "report.html"


@dataclass
class CompileReport:
    """What a compile did; kept in the artifact as report.json."""

    manifest: Manifest
    passes: list[PassRecord]
    seconds: dict[str, float]
    tokenizer: str
    """Where the tokenizer is from, or why there is none."""
    check: dict[str, Any] = field(default_factory=dict)
    calibration: str = ""
    """What the model was calibrated on."""
    peak_rss: int = 0
    """Largest resident memory of the process so far, bytes."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the model was read."""
    memory: list[dict[str, Any]] = field(default_factory=list)
    """The arena of intermediate values, a plan a step (`MemoryPlan.data`), where the target has one."""

    def data(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.model_dump(mode="json"),
            "passes": [record.summary() for record in self.passes],
            "seconds": self.seconds,
            "tokenizer": self.tokenizer,
            "check": self.check,
            "calibration": self.calibration,
            "peak_rss": self.peak_rss,
            "notes": self.notes,
            "memory": self.memory,
        }


@dataclass
class Input:
    """A model to compile: where it is from, its configs, and its weights once they are loaded."""

    source: ModelSource
    config: Any
    state: Mapping[str, Tensor | Weight] | None = None
    tokenizer: Any = None
    generation: Any = None
    module: Any = None
    """The module itself, where it is in memory, with PEFT's adapters merged into its weights."""
    given: Any = None
    """The module as it was given, with its adapters beside the weights."""
    adapter: Adapter | None = None
    """What is merged into the weights when they are loaded."""
    encoder: Encoder | None = None
    """How the model is built and called where it is an encoder; None for another kind."""
    pair: EncoderDecoder | None = None
    """The same where it is an encoder-decoder."""
    begin: Begin | None = None
    """How an encoder-decoder begins to write."""
    part: TextPart | None = None
    """What it is part of, where it is the text part of a model of images."""
    checkpoint: Mapping[str, Weight] | None = None
    """Its weights where the checkpoint holds codes; known by their headers before they are loaded."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the model was read."""

    def structure(self) -> Any:
        """The module that is traced, see `frontend.structure`."""
        return structure(self.source, self.config, self.state, self.module, self.auto)

    @property
    def known(self) -> Mapping[str, Tensor | Weight] | None:
        """What is known of the weights: their data once they are loaded, or how they are stored."""
        return self.checkpoint if self.state is None else self.state

    @property
    def schemes(self) -> list[Scheme]:
        """Schemes that weights of the checkpoint come in."""
        weights = (self.checkpoint or {}).values()
        stored = [each.stored if isinstance(each, TurnedWeight) else each for each in weights]
        found = dict.fromkeys(map(scheme_of, stored))
        return [scheme for scheme in found if scheme is not None]

    @property
    def tensors(self) -> Mapping[str, Tensor] | None:
        """The weights of what is no language model; they are never in codes."""
        return cast("Mapping[str, Tensor] | None", self.state)

    @property
    def kind(self) -> Kind:
        """What the manifest calls it."""
        if self.pair is not None:
            return "encoder_decoder"
        return "causal_lm" if self.encoder is None else "encoder"

    @property
    def auto(self) -> str:
        """The class of transformers that builds it."""
        kind = self.encoder or self.pair
        return CAUSAL if kind is None else kind.auto


class Check(Protocol):
    """Looks at a compile; both raise where they find a fault."""

    def graph(self, model: Input, program: Program) -> str:
        """The graph beside the model, before passes that may lose something; a sentence for the report."""

    def files(self, folder: Path) -> dict[str, Any]:
        """The finished artifact, before it is put in place; figures for the report."""


def open_model(name: str | Path) -> Input:
    """Finds a model by folder or hub id and reads its config; no weight is read."""
    adapter = find_adapter(name)
    base = adapter.base if adapter is not None and not adapter.beside_base else name
    source = huggingface.find_model(base)
    config = read_config(source)
    kind, notes = read_folder(source, config)
    generation = tokens.read_generation_config(source)
    found = Input(source, config, generation=generation, adapter=adapter, notes=notes)
    if isinstance(kind, EncoderDecoder):
        found.pair, found.begin = kind, tokens.begin(source, config, generation)
        found.notes += tokens.ignored_in_generation(generation)
    elif isinstance(kind, TextPart):
        found.part, found.config = kind, kind.config
    else:
        found.encoder = kind
    checkpoint = open_checkpoint(source, config) if kind is None else None
    if checkpoint is not None:
        found.checkpoint = checkpoint.weights
        notes += checkpoint.notes
    return found


def wrap_model(model: Any, tokenizer: Any = None) -> Input:
    """A `PreTrainedModel` that is in memory; its weights are shared, not copied."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ModelError(
            f"{type(model).__name__} is no Hugging Face causal language model, encoder or "
            "encoder-decoder; use einfold.export_onnx with example inputs for other modules"
        )
    name = str(getattr(config, "name_or_path", "") or type(model).__name__)
    source = ModelSource(name, None, in_memory=True)
    pair = find_encoder_decoder(source, config, [type(model).__name__])
    generation = getattr(model, "generation_config", None)
    given, notes = None, []
    layers = sum(1 for key, _ in model.named_parameters() if "lora_A" in key)
    if layers and callable(getattr(model, "merge_and_unload", None)):
        given, model = model, copy.deepcopy(model).merge_and_unload()
        notes = [f"LoRA was merged into the weights that it changes, {layers} of them"]
    elif layers:
        notes = [f"LoRA is compiled beside the weights that it changes, {layers} of them"]
    state = state_of(model)
    if any(tensor.is_meta for tensor in state.values()):
        raise ModelError(f"{name} has weights on the meta device, which hold no numbers; load them")
    huggingface.check_unquantized(source, config, state)
    part = find_text_part(source, config, [type(model).__name__])
    encoder = None
    if part is not None:
        state, config, model, given = part.state(source, state), part.config, None, None
        notes.append(part.note)
    elif pair is None:
        encoder = encoder_of(source, model)
    if pair is not None:
        notes += tokens.ignored_in_generation(generation)
    return Input(
        source,
        config,
        state,
        tokenizer,
        generation,
        model,
        given,
        encoder=encoder,
        pair=pair,
        part=part,
        begin=None if pair is None else tokens.begin(source, config, generation),
        notes=notes,
    )


def state_of(model: Any) -> dict[str, Tensor]:
    """Parameters by all their names, and the buffers that are saved with them."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.state_dict())


@tracing()
def trace(
    model: Input,
    recipe: Recipe,
    dump: Path | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> tuple[Program, list[PassRecord]]:
    """Captures a model and runs the recipe's pipeline; reads no weight's data, but for the `check`.

    Works from the config alone when `model.state` is None, as `estimate` does.
    """
    tell = progress or (lambda text, share: None)
    tell("tracing the model", 0.0)
    records = []
    recipe = settled(recipe, model)
    for program, passes in captured(model, recipe, check, tell):
        reads = model.pair is not None and program.encoder is None
        manager = PassManager(
            passes,
            dump / "encoder" if dump is not None and reads else dump,
            lambda name, index, total: tell(f"pass {name}", index / max(1, total)),
            asked=recipe.asked(),
        )
        for record in manager.run(program):
            records.append(replace(record, name=f"encoder: {record.name}") if reads else record)
    _check_layout(program, recipe)
    return program, records


def reads_text(model: Input) -> bool:
    """Whether weights can be solved on a text that is read through the model."""
    return model.kind == "causal_lm" and model.part is None


def settled(recipe: Recipe, model: Input) -> Recipe:
    """The recipe for a model: with nothing left that is whatever is best for it."""
    width = int(getattr(model.config, "hidden_size", 0) or 0)
    return recipe.settled(reads_text(model), width)


def _encoding(model: Input, recipe: Recipe, check: Check | None) -> list[Pass]:
    """The pipeline of what reads a model's input at once."""
    target = recipe.made_for
    module = module_passes(target.name, target.attention())
    return encoder_passes(module, recipe.weight_passes(), _comparison(model, check))


def captured(
    model: Input,
    recipe: Recipe,
    check: Check | None = None,
    tell: Progress = lambda text, share: None,
) -> list[tuple[Program, list[Pass]]]:
    """The model as a program, with its pipeline; of an encoder-decoder before it the encoder with its own.
    Otherwise as `trace`."""
    if model.encoder is not None:
        check_recipe(recipe, model.source.location)
        program = capture_encoder(
            model.source, model.config, model.encoder, recipe.context, model.tensors, model.module
        )
        return [(program, _encoding(model, recipe, check))]
    fusion: list[Pass] = []
    if model.pair is not None:
        _check_solver(recipe, f"{model.source.location} is an encoder-decoder")
        program = capture_pair(
            model.source, model.config, model.pair, recipe, model.tensors, model.module
        )
        target = recipe.made_for
        fusion = [FuseAttention(target.name, target.attention())]
    else:
        context = _context(model, recipe)
        program = trace_language_model(
            model.source,
            model.config,
            context,
            model.known,
            model.module,
            model.part is not None,
        )
    if model.state is not None:
        program.statistics = _statistics(model, program, recipe, tell)
    passes = language_model_passes(
        recipe.weight_passes(model.schemes),
        recipe.cache_passes(),
        _comparison(model, check),
        fusion,
    )
    if program.encoder is None:
        return [(program, passes)]
    return [(program.encoder, _encoding(model, recipe, check)), (program, passes)]


def _check_solver(recipe: Recipe, what: str) -> None:
    """Raises RecipeError for weights that would be chosen by reading a text through what takes none."""
    if recipe.reads_text:
        raise RecipeError(
            f"{what}, and {recipe.reads_text} reads a text through a causal language model; use a solver "
            "that reads none, such as hqq, and one width of all weights"
        )


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises RecipeError for what a recipe asks of an encoder in vain, UnsupportedError for a target that
    has none."""
    chosen = recipe.cache.model_dump()
    plain = CacheSection().model_dump()
    asked = [f"cache.{key}" for key, value in chosen.items() if value != plain[key]]
    if asked:
        raise RecipeError(
            f"{where} is an encoder, which keeps no KV cache, and {', '.join(asked)} is about one; leave it "
            "out"
        )
    _check_solver(recipe, f"{where} is an encoder")
    if reason := recipe.made_for.no_encoders():
        raise UnsupportedError(f"{where} is an encoder: {reason}")


def _check_layout(program: Program, recipe: Recipe) -> None:
    """Raises RecipeError where the target cannot run over the cache as it came to be planned."""
    for layer, _, group in () if program.layout is None else program.layout.groups():
        refused = {
            group.storage.name: recipe.made_for.refuses(group.storage),
            group.reader.name: recipe.made_for.cannot_read(group.reader),
        }
        for name, reason in refused.items():
            if reason:
                raise RecipeError(f"layer {layer.layer}, {name}: {reason}")


@tracing()
def plan_cache(model: Input, recipe: Recipe, check: Check | None = None) -> Program:
    """Captures a model and decides how its cache is kept, as a compile does; attention has no cache yet.

    What the storage needs is calibrated. Heads are as the model has them: none are permuted.
    """
    if model.pair is not None:
        raise UnsupportedError(
            f"{model.source.location} is an encoder-decoder, whose cache transformers keeps in two parts; "
            "compile it into an artifact instead"
        )
    load_weights(model)
    program = trace_language_model(
        model.source, model.config, _context(model, recipe), model.state, model.module
    )
    program.statistics = _statistics(model, program, recipe, lambda text, share: None)
    planning = planning_passes(recipe.cache_passes(), _comparison(model, check))
    PassManager(planning, asked=recipe.asked()).run(program)
    if program.calibrations:
        calibrate(model, program, recipe)
    return program


@tracing()
def compile_to(
    model: Input,
    out: Path,
    recipe: Recipe,
    force: bool = False,
    dump: Path | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
) -> CompileReport:
    """Compiles a model into the artifact folder `out`.

    The folder appears whole or not at all. Raises the errors of `einfold.errors`, one sentence each.
    """
    check_output(out, force)  # before anything long is begun
    recipe = settled(recipe, model)
    recipe.made_for.check_installed()
    if dump is not None:
        check_dump(dump, out)
    tell = progress or (lambda text, share: None)
    clock = _Clock()
    calibrated = "nothing needed it"
    with staged(out, force) as folder:
        with clock.phase("load"):
            tell("loading weights", 0.0)
            load_weights(model)
        with clock.phase("passes"):
            program, records = trace(model, recipe, dump, progress, check)
        parts = {WHOLE: program} | ({} if program.encoder is None else {READER: program.encoder})
        for each in parts.values():
            check_allowed(each)  # what could not be loaded again is not written
        read = [] if program.statistics is None else program.statistics.read
        if program.calibrations:
            with clock.phase("calibrate"):
                tell("calibrating", 0.0)
                read.append(calibrate(model, program, recipe, tell))
        calibrated = "; ".join(dict.fromkeys(read)) or calibrated
        program.statistics = None  # lets go of what was found
        program.beside = no_inputs
        weights = together([*parts.values()])
        parameters = parameter_count(model.structure())
        model.state = (
            None  # from here on only the program holds the weights, and lets go as they are written
        )
        with clock.phase("weights"):
            placements, digest = write_weights(
                weights,
                folder / WEIGHTS,
                lambda name, done, total: tell("writing weights", done / max(1, total)),
            )
        with clock.phase("code"):
            for part, each in parts.items():
                (folder / part.graph).write_text(print_program(each), encoding="utf-8")
                recipe.made_for.write(each, placements, folder, tell, part)
                recipe.made_for.check_written(folder, part)
            tokenizer = tokens.save_tokenizer(model.source, model.tokenizer, folder)
        manifest = _manifest(model, program, recipe, folder, digest, parameters, weights.nbytes)
        report = CompileReport(manifest, records, clock.seconds, tokenizer, calibration=calibrated)
        report.notes = [*model.notes, *recipe.remarks()]
        report.memory = _arenas(parts.values(), recipe.made_for)
        if check is not None:
            with clock.phase("check"):
                tell("checking against the reference", 0.0)
                (folder / NAME).write_bytes(manifest.dump())
                report.check = check.files(folder)
        report.peak_rss = peak_memory()
        (folder / REPORT).write_text(json.dumps(report.data(), indent=1), encoding="utf-8")
        (folder / PAGE).write_text(report_page(report.data()), encoding="utf-8")
        listed = {name: file_entry(folder / name) for name in (REPORT, PAGE)}
        report.manifest = manifest.model_copy(update={"files": manifest.files | listed})
        (folder / NAME).write_bytes(report.manifest.dump())
    tell("done", 1.0)
    return report


def _arenas(programs: Iterable[Program], target: Target) -> list[dict[str, Any]]:
    """The plans of the steps that take most: of a prompt's chunk, and of a token behind it."""
    found = []
    for program in programs:
        chunk = min(OrderCalls.tokens, program.model.context or OrderCalls.tokens)
        steps = {f"{chunk} tokens at once": chunk}
        if program.layout is not None:
            steps["a token at a time"] = 1
        for step, new in steps.items():
            plan = target.plan(program, inputs_at(program, step_dims(program, 1, new)))
            if plan is not None:
                found.append(plan.data(step))
    return found


class ExportCheck(Protocol):
    """Looks at a module's export; both raise where they find a fault."""

    def graph(self, captured: Captured) -> None:
        """The graph beside the module, before passes that may lose something."""

    def files(self, folder: Path, captured: Captured, recipe: Recipe) -> None:
        """What was written, before it is put in place."""


@tracing()
def export_module(
    module: Any,
    out: Path,
    example: Example,
    dynamic_shapes: Any,
    recipe: Recipe,
    force: bool,
    output_names: Sequence[str] | None = None,
    check: ExportCheck | None = None,
) -> None:
    """Exports any module to a folder with model.onnx, its weights and the graph's text."""
    check_output(out, force)
    recipe.made_for.check_installed()
    _check_solver(recipe, f"{type(module).__name__} is a plain module")
    found = capture_module(module, example, dynamic_shapes, output_names)
    program = found.program
    target = recipe.made_for
    PassManager(module_passes(target.name, target.attention())).run(program)
    if check is not None:
        check.graph(found)
    PassManager([*recipe.weight_passes(), Simplify()]).run(program)
    kept = {name: program.weights[name] for name in program.weights}  # writing lets go of them
    with staged(out, force) as folder:
        placements, _ = write_weights(program.weights, folder / WEIGHTS)
        (folder / GRAPH).write_text(print_program(program), encoding="utf-8")
        recipe.made_for.write(program, placements, folder, lambda text, share: None)
        if check is not None:
            program.weights.restore(kept)
            check.files(folder, found, recipe)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def _context(model: Input, recipe: Recipe) -> int:
    limit = huggingface.context_limit(model.config)
    if limit is not None and recipe.context is not None and recipe.context > limit:
        raise RecipeError(
            f"context {recipe.context} is longer than the {limit} tokens "
            f"that {model.source.location} was made for"
        )
    return recipe.context or limit or DEFAULT_CONTEXT


def load_weights(model: Input) -> None:
    """Gives a model its weights, with adapters merged into them; raises ModelError for what is damaged."""
    if model.state is None:
        if model.checkpoint is not None:
            model.state = model.checkpoint
        elif model.encoder is None:
            model.state = _text_state(model)
        else:
            model.state = _encoder_state(model, model.encoder)
        if model.adapter is not None:
            model.state, said = model.adapter.merged(model.state)
            model.notes.append(said)


def _text_state(model: Input) -> dict[str, Tensor]:
    """The weights of a model that writes text; of one of images those of its text part."""
    if model.part is None:
        return huggingface.load_state(model.source, model.config, model.auto)
    whole = huggingface.load_state(model.source, model.part.whole, VISION)
    return model.part.state(model.source, whole)


def _encoder_state(model: Input, encoder: Encoder) -> dict[str, Tensor]:
    """The weights of an encoder; its checkpoint may be of a model that does more."""
    left_out: list[str] = []
    state = huggingface.load_state(model.source, model.config, encoder.auto, left_out)
    if left_out:
        model.notes.append(
            f"the checkpoint holds {len(left_out)} weights that {encoder.model_class.__name__} does not "
            f"read, {left_out[0]} among them"
        )
    return state if encoder.head is None else state | encoder.head.state()


def _comparison(model: Input, check: Check | None) -> list[CompareOriginal]:
    return [] if check is None else [CompareOriginal(lambda program: check.graph(model, program))]


def _statistics(model: Input, program: Program, recipe: Recipe, tell: Progress) -> Statistics:
    """What passes may ask of the model; what they found is kept in the user's cache folder."""
    return Statistics(
        lambda: _calibration_text(model, program, recipe, tell),
        _named(model),
        cache_home() / "calibration",
        tell,
    )


def _named(model: Input) -> Callable[[], str] | None:
    """What gives a name for the model's weights; None where they have none."""
    folder, revision = model.source.folder, str(getattr(model.config, "_commit_hash", None) or "")
    files = [] if folder is None else [*folder.glob("*.safetensors"), folder / "config.json"]
    files += [] if model.source.file is None else [model.source.file]
    state = model.state
    changed = model.source.in_memory or model.adapter is not None  # its weights may be any
    if changed and state is not None:
        return cache(lambda: digest_of(state))
    if files:
        return cache(lambda: fingerprint(files))
    return cache(lambda: f"{model.source.name} {revision}") if revision else None


def _calibration_text(
    model: Input, program: Program, recipe: Recipe, tell: Progress
) -> tuple[Tensor, str]:
    """The calibration text [rows, tokens] and where it is from."""
    wanted = recipe.reads_text or (recipe.trains and reads_text(model))
    if wanted and recipe.calibration.text is None and model.part is None:
        shape = rows_of(recipe.calibration_tokens, program.model.context)
        running = runs(model.source, model.config, model.state, model.module)
        named = None if program.statistics is None else program.statistics.model
        seed = recipe.calibration.seed
        ids = own_text(running, program.model.vocabulary, shape, named, tell, seed)
        return ids, "a text that the model wrote"
    if model.tokenizer is None:  # kept: the artifact gets it too
        model.tokenizer, _ = tokens.load_tokenizer(model.source)
    return calibration_tokens(
        model.tokenizer,
        recipe.calibration.text,
        recipe.calibration_tokens,
        program.model.vocabulary,
        program.model.context,
    )


def calibrate(
    model: Input,
    program: Program,
    recipe: Recipe,
    tell: Progress = lambda text, share: None,
) -> str:
    """Runs what the passes want to know of the model; gives what was read."""
    ids, origin = _calibration_text(model, program, recipe, tell)
    for calibration in program.calibrations:
        calibration.run(ids, tell)
    program.calibrations.clear()
    return f"{ids.numel()} tokens of {origin}"


def _manifest(
    model: Input,
    program: Program,
    recipe: Recipe,
    folder: Path,
    digest: str,
    parameters: int,
    weight_bytes: int,
) -> Manifest:
    files: dict[str, FileEntry] = {
        path.relative_to(folder).as_posix(): file_entry(
            path, digest if path.name == WEIGHTS else None
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    kind = model.encoder or model.pair
    entries = () if kind is None else kind.inputs(model.config)
    entries = entries if model.part is None else (model.part.entry(),)
    reads = program.encoder or program
    layout = program.layout
    made_by = ["torch", "transformers", *recipe.made_for.generators]
    eos, bos, pad = tokens.special_tokens(model.config, model.generation)
    return Manifest(
        kind=model.kind,
        einfold=metadata.version("einfold"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=recipe.target,
        flavour=recipe.made_for.flavour,
        model=ModelEntry(
            source=Path(model.source.location).name or Path(model.source.location).resolve().name,
            architecture=program.model.architecture,
            vocabulary=program.model.vocabulary,
            context=program.model.context,
            hidden=program.model.hidden,
            parameters=parameters,
            eos_ids=eos,
            bos_id=bos,
            pad_id=pad,
        ),
        recipe=recipe.model_dump(mode="json"),
        inputs=entries,
        outputs=() if kind is None else result_entries(reads),
        begin=model.begin,
        cache=() if layout is None else tuple(layout.lines()),
        weight_bytes=weight_bytes,
        cache_bytes="0" if layout is None else account(program),
        versions={name: _version(name) for name in made_by} | {"python": platform.python_version()},
        files=files,
    )


def _version(package: str) -> str:
    """The version of a package; kernels are generated without Triton too."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
