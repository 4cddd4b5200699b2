"""A compiled model, loaded: generate text or tokens, or ask for logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .compiler.codegen.target import TARGETS, Target
from .compiler.ir.manifest import CAUSAL, EMBEDDINGS, ENCODER, ENCODER_DECODER, READER
from .completion import Completion, Listeners
from .encoder import Encoder
from .encoder_decoder import EncoderDecoder
from .errors import ArtifactError, ArtifactWarning, PromptError, RecipeError
from .planning import Plan, in_parts, plan_of
from .runtime.artifact import Artifact
from .runtime.buffers import Make, empty
from .runtime.embeddings import table_of
from .runtime.encoding import EncoderEngine
from .runtime.engine import CHUNK, Engine, Timings
from .runtime.key_scales import key_scales
from .runtime.memory.experts import Hits
from .runtime.memory.slots_ahead import Spilled
from .runtime.runner import Floats, Runner
from .runtime.sampling import Sampling
from .runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass
class Model:
    """A loaded artifact. Make it with `load`.

    One thread at a time: a generation keeps its cache and its bound buffers here. Load the folder once
    for each thread; the weights in the file are mapped, and shared.
    """

    artifact: Artifact
    engine: Engine
    plan: Plan | None = None
    """What lies where, of one that was loaded under a memory budget."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises PromptError where it has none."""
        return Tokenizer.of(self.artifact)

    @property
    def timings(self) -> Timings:
        """Times of the last generation."""
        return self.engine.timings

    @property
    def held_experts(self) -> Hits | None:
        """What of its experts tokens found in memory since it was loaded; None where none are streamed under
        a memory budget."""
        found: Hits | None = getattr(self.engine.runner, "experts", None)
        return found

    @property
    def spilled(self) -> Spilled | None:
        """What of its cache went to the disk and came from it since it was loaded; None where none is spilled
        under a memory budget."""
        found: Spilled | None = getattr(self.engine.runner, "spilled", None)
        return found

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids go through as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        on_text: Callable[[str], None] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        embeddings: npt.ArrayLike | None = None,
    ) -> Completion:
        """Continues one prompt, text or token ids, until a `stop` text, an end token or the limit.

        `on_text` is given each new piece of text. The stop text is left out of the text that is
        given, and its tokens stay among the tokens. The text part of a model of images takes `embeddings`
        [N, hidden] too: token -1 - n of the prompt stands for row n.
        """
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            sampling=sampling,
            on_text=None if on_text is None else lambda row, piece: on_text(piece),
            embeddings=None if embeddings is None else [embeddings],
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
        embeddings: Sequence[npt.ArrayLike | None] | None = None,
    ) -> list[Completion]:
        """Continues several prompts of any lengths together, each with its `embeddings`, or None."""
        if isinstance(prompts, str):
            raise PromptError("generate_batch takes a list of prompts; this is one text")
        rows = [self.encode(prompt) for prompt in prompts]
        listeners = Listeners.of(self.artifact, lambda: self.tokenizer, len(rows), stop, on_text)
        results = self.engine.generate(
            rows,
            max_new_tokens,
            () if ignore_eos else self.artifact.manifest.model.eos_ids,
            sampling,
            listeners.on_token,
            self._beside(rows, embeddings),
        )
        return listeners.completions(results, list(map(len, rows)))

    def _beside(
        self, rows: Sequence[Sequence[int]], embeddings: Sequence[npt.ArrayLike | None] | None
    ) -> dict[str, Floats] | None:
        if embeddings is None:
            return None
        if not self.engine.embeds:
            raise PromptError(
                f"{self.artifact.folder} takes no embeddings: it is not the text part of a model of images"
            )
        return {EMBEDDINGS: table_of(rows, embeddings, self.engine.embeds)}

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works: the artifact has a tokenizer, and that a template of conversations."""
        return self.artifact.has("tokenizer.json") and self.tokenizer.has_template

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt of a conversation ([{"role": .., "content": ..}]) by the model's template."""
        return self.tokenizer.chat(messages)

    def logits(
        self, tokens: Sequence[int], prompt: int = 0, embeddings: npt.ArrayLike | None = None
    ) -> Iterator[tuple[int, Floats]]:
        """Logits behind every token of one text, in chunks: yields (start, [tokens of the chunk, V]).
        `embeddings` are as in `generate`.

        With `prompt`, the first so many tokens are read as a prompt, and the cache is compressed as it is
        when one is answered; then the rest goes through it, and only their logits are given.
        """
        given = self._beside([tokens], None if embeddings is None else [embeddings])
        row = self.engine.check_tokens(tokens, 0 if given is None else given[EMBEDDINGS].shape[1])
        if row.size > self.engine.context:
            raise PromptError(f"{row.size} tokens do not fit the context of {self.engine.context}")
        if not 0 <= prompt < row.size:
            raise PromptError(f"a prompt of {prompt} tokens leaves nothing of {row.size} to read")
        self.engine.cache = None  # the last one is let go before the next is taken
        cache = self.engine.cache = self.engine.allocate(1, row.size, prompt or None, given)
        if prompt:
            self.engine.prefill(cache, [row[:prompt]])
        yield from self.engine.stream(cache, row, all_logits=True, start=prompt)


def language_model(found: Any) -> Model:
    """A loaded causal language model; raises RecipeError for another kind."""
    if isinstance(found, Model):
        return found
    if isinstance(found, EncoderDecoder):
        raise RecipeError(
            f"{found.artifact.folder} is an encoder-decoder, which writes behind what its encoder read, and "
            "this is for models that continue a text; `einfold run` takes it"
        )
    raise RecipeError(
        f"{found.artifact.folder} is an encoder, which writes no text; `einfold run` gives its results"
    )


def load(
    folder: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    chunk: int = CHUNK,
    verify: bool = True,
    trust: bool = False,
    memory: int | None = None,
    context: int | None = None,
    device: str | Path | None = None,
) -> Any:
    """Loads an artifact. Gives a `Model`, which writes text, or where it is one of an encoder an `Encoder`,
    which gives tensors, or of an encoder-decoder an `EncoderDecoder`, which writes text behind what it read.

    `engine` "onnx" runs it on onnxruntime, "triton" with kernels on a GPU, "reference" by the operators'
    meaning in torch; without one it is run by what it was compiled for. `threads` defaults to the
    processors at hand; `chunk` bounds the tokens of a prefill step. Kernels are made anew from the
    artifact's graph; those that it brings compiled are used with `trust` alone, since nothing checks
    what machine code does.

    With `memory`, a number of bytes, a language model of the targets onnx and triton runs within so much,
    whatever its weights take: some stay, the rest is read from the disk in every step (`einfold.plan` says
    which), with room for a cache of `context` tokens, 4,096 without it, of which some layers lie in a file
    where it does not fit, or steps are shorter so; what is shorter is told by a `device` description, as for
    `einfold.plan`. The first time a copy with packed weights, of 2.3 times
    their bytes, is written to einfold's cache folder, where there is room. Of the target triton it is a GPU's
    memory, and what does not stay there is copied from the machine's; a model that has no room on the GPU
    runs so without being asked.

    Raises ArtifactError where the folder is damaged or no artifact, RecipeError for an impossible option,
    UnsupportedError where this machine cannot run it.
    """
    if engine is not None and engine not in TARGETS:
        raise RecipeError(f"engine {engine!r} is none of {', '.join(TARGETS)}")
    if threads is not None and not 1 <= threads <= 1024:
        # onnxruntime takes a negative number for one, and dies slowly of a hundred thousand
        raise RecipeError(f"threads must be between 1 and 1024, not {threads}")
    if context is not None and memory is None:
        raise RecipeError("context is what memory leaves room for; give both")
    if device is not None and memory is None:
        raise RecipeError("device is what memory is planned for; give both")
    artifact = Artifact.open(folder, verify, weights=False)
    manifest = artifact.manifest
    asked = memory is not None
    if not asked and manifest.kind == CAUSAL:
        memory = _target(artifact, engine).limit(artifact)
    if memory is not None:  # a budget that cannot do is refused before weights are hashed
        parts = in_parts(artifact, _target(artifact, engine))
        try:
            plan = plan_of(artifact, parts, memory, context, chunk, device)
        except RecipeError:
            if asked:
                raise
            memory = None  # the least has no room by the plan's numbers: let the device decide
    if memory is not None and not asked:
        warnings.warn(ArtifactWarning(_no_room(artifact, memory)), stacklevel=2)
    # Hashing the weights and packing them for the processor are what loading takes; they go side by side.
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(artifact.check_weights, memory is None) if verify else None
        try:
            if memory is not None:
                runner = parts.runner(plan.tiers, threads, trust)
                plan = plan.as_run(getattr(runner, "plan", plan.tiers))
                return Model(artifact, _engine(runner, artifact, chunk), plan)
            target = _target(artifact, engine)
            if manifest.kind == ENCODER:
                return Encoder(artifact, EncoderEngine(target.caller(artifact, threads), manifest))
            reader = None
            if manifest.kind == ENCODER_DECODER:
                reader = EncoderEngine(target.caller(artifact, threads, part=READER), manifest)
            runner = target.runner(artifact, threads, trust)
        finally:
            if checked is not None:
                checked.result()  # damage explains best what the loader may have met
    made = _engine(runner, artifact, chunk)
    return Model(artifact, made) if reader is None else EncoderDecoder(artifact, reader, made)


def _no_room(artifact: Artifact, free: int) -> str:
    return (
        f"{artifact.folder}: weights and a cache have no room in the {free:,} bytes that the GPU has for it, "
        "so some weights are copied there in every step (`Model.plan` says which)"
    )


def _engine(runner: Runner, artifact: Artifact, chunk: int) -> Engine:
    manifest = artifact.manifest
    make: Make = getattr(runner, "make", empty)
    model, begin = manifest.model, manifest.begin
    return Engine(
        runner,
        manifest.layout(),
        model.vocabulary,
        model.context,
        chunk,
        make,
        () if begin is None else begin.never,
        () if begin is None else begin.never_first,
        manifest.embeds,
        key_scales(artifact),
    )


def _target(artifact: Artifact, engine: str | None) -> Target:
    """What runs an artifact."""
    target = artifact.manifest.target
    if target not in TARGETS:
        raise ArtifactError(
            f"{artifact.folder} was compiled for the target {target!r}, which this einfold does not have; it "
            f"has {', '.join(TARGETS)}"
        )
    chosen = TARGETS[engine or target]()
    if not chosen.runs(target):
        raise RecipeError(
            f"{artifact.folder} was compiled for {target}, so engine {engine!r} cannot run it; leave the "
            f"engine out, or compile with --target {engine}"
        )
    if artifact.manifest.kind != CAUSAL and (reason := chosen.no_encoders()):
        kind = artifact.manifest.kind.replace("_", "-")
        raise ArtifactError(f"{artifact.folder} is an {kind}: {reason}")
    return chosen
