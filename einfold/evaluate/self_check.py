"""A finished artifact is run beside the reference, and beside the original, before it is kept.

A few tokens leave no cache. So where tokens can leave, the target then reads a prompt that is long enough
for it, and the reference goes on over a copy of what that made of the cache. (Each by itself might let go of
other tokens where two have the same score but for rounding, and nothing would be wrong.) The reference reads
no long prompt: what is checked behind it is how the compressed cache is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiler.codegen.reference.runner import ReferenceRunner
from ..compiler.codegen.target import made_for
from ..compiler.ir.compare import difference
from ..compiler.ir.kv.layout import CacheLayout
from ..compiler.ir.manifest import ModelEntry
from ..compiler.ir.ops import einfold_ops
from ..compiler.ir.program import Program, call_arguments
from ..compiler.ir.quant.scheme import PRESETS, Scheme
from ..compiler.ir.quant.schemes.grouped import Grouped
from ..compiler.passes.weight_methods import explaining
from ..errors import EinfoldError, UnsupportedError
from ..runtime.artifact import Artifact
from ..runtime.buffers import Array, Make, empty
from ..runtime.cache import Cache
from ..runtime.embeddings import no_table
from ..runtime.engine import Engine
from ..runtime.key_scales import key_scales
from ..runtime.runner import Floats, Runner

_PROMPT, _STEPS = 12, 4

#: Tokens of the text that is read.
TOKENS = _PROMPT + _STEPS

#: Tokens times parameters of the longest prompt that is read: about ten seconds on two processors.
_WORK = 2.5e11

#: Largest difference of logits, as a share of the largest logit, where both sides compute in float32.
_TOLERANCE = 1e-3


def check_tokens(vocabulary: int) -> npt.NDArray[np.int64]:
    """The text that is read, [1, S]."""
    return np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS))


def self_check(
    folder: Path, original: Floats | None = None, given: Mapping[str, Array] | None = None
) -> dict[str, Any]:
    """Compares the target, over a short prefill and a few decode steps, with the reference at once; and
    again behind a prompt of which tokens were let go or packed, where that costs little. `original` are the
    logits of `check_tokens` as transformers computes them: from them the target may differ by what its
    weights were rounded to (`Preset.bound`), where its cache still holds every token as it came. `given` is
    what a decoder reads beside its tokens, of one row.

    Gives the figures for the report. Raises EinfoldError where the target gives numbers that are not
    finite, or differs from the reference by more than float32 arithmetic explains. Weights that are
    multiplied in int8 (accuracy level 4) differ by design, and so does what queries choose among int8 slots
    where the target rounds them: there the difference is reported only.
    Where this machine cannot run the target, the report says that it was not checked, and why.
    """
    artifact = Artifact.open(folder, verify=False)
    made = made_for(artifact.manifest.target, artifact.manifest.recipe)
    try:
        runner = made.runner(artifact, lean=True)
    except UnsupportedError as error:
        return {"check": f"not run: {str(error).split(';')[0]}"}
    layout = artifact.manifest.layout()
    if artifact.manifest.embeds and given is None:
        given = no_table(1, artifact.manifest.embeds)
    first = 1 if _leaves_out(layout) else _PROMPT
    parts = [(_finite(_logits(artifact, runner, first, given)), TOKENS)]
    # Where no token leaves the cache, decoding must give what reading everything at once gives.
    whole = first if _lets_go(layout) or first == 1 else _PROMPT + _STEPS
    beside = ReferenceRunner(artifact, keep_weights=False)
    references = [_logits(artifact, beside, whole, given)]
    prompt, compressed = _long_enough(layout, artifact.manifest.model)
    if prompt:
        read, expected = _behind(artifact, runner, beside, prompt, given)
        parts.append((_finite(read), prompt + _STEPS))
        references.append(expected)
    off = [float(np.abs(a - b).max()) for (a, _), b in zip(parts, references, strict=True)]
    by_codes = [made.rounds_queries and _chooses_by_codes(layout, n) for _, n in parts]
    unexplained = [0.0 if chosen else each for each, chosen in zip(off, by_codes, strict=True)]
    target, reference = np.concatenate([part for part, _ in parts]), np.concatenate(references)
    scale = max(1.0, float(np.abs(reference).max()))
    recipe = artifact.manifest.recipe
    kept = _kept(beside.program)
    activations = recipe["weights"].get("activations", "f32")
    scheme = PRESETS.find(recipe["weights"]["format"]).scheme or kept
    approximate = not made.exact(scheme, activations)
    if max(unexplained) > _TOLERANCE * scale and not approximate:
        raise EinfoldError(
            f"the compiled model differs from the reference by {max(unexplained):.2e} (logits up to "
            f"{scale:.1f}); this is a fault of einfold, please report it with the model's architecture"
        )
    same = (target.argmax(-1) == reference.argmax(-1)).mean()
    return {
        **_beside_original(artifact, target[:TOKENS], original, approximate and kept is not None),
        "largest difference of logits": max(off),
        "largest logit": scale,
        "same likeliest token as the artifact's graph": float(same),
        "tokens": _PROMPT + _STEPS,
        "arithmetic": _arithmetic(approximate, activations)
        + (", tokens that are read chosen by rounded scores" if any(by_codes) else ""),
        "compressed cache": compressed,
    }


def _arithmetic(approximate: bool, activations: str) -> str:
    """What the target multiplies in, for the report."""
    if activations != "f32":
        return f"{activations} activations"
    return "int8 products (accuracy level 4)" if approximate else "float32"


def _kept(program: Program) -> Scheme | None:
    """The scheme of codes that products read, whoever chose it."""
    for node in program.nodes(einfold_ops.quantized_linear.default):
        found = call_arguments(node)
        return Grouped(found["bits"], found["block"], found["zeros"] is None)
    return None


def _beside_original(
    artifact: Artifact, target: Floats, original: Floats | None, int8: bool
) -> dict[str, Any]:
    """How far the target is from the original; raises EinfoldError where its form does not explain it.
    `int8`: whether codes that are the original's are multiplied in int8."""
    if original is None:
        return {}
    target, recipe = target[: len(original)], artifact.manifest.recipe
    preset = explaining(recipe["weights"])
    if int8 and preset.scheme is None:  # products round what they read, as int8 weights would
        preset = PRESETS.find("int8")
    bound = preset.bound if _as_it_came(artifact) else float("inf")
    off = difference(target, original).share if preset.scheme is None else _off(target, original)
    if off > bound:
        raise EinfoldError(
            f"the compiled model differs from the original by {off:.1e} of its logits, where {preset.name} "
            f"explains {bound:.0e}; this is a fault of einfold, please report it with the model's "
            "architecture"
        )
    return {
        "share of the original's logits that it is off by": off,
        "bound on that": bound if bound < float("inf") else "none for what was compressed",
        "same likeliest token as the original": float(
            (target.argmax(-1) == original.argmax(-1)).mean()
        ),
    }


def _off(target: Floats, original: Floats) -> float:
    """The difference of a token's logits, beside how far they are spread; of the median token, for single
    ones, the first above all, may be off by much more."""
    spread = original - original.mean(-1, keepdims=True)
    apart = target - target.mean(-1, keepdims=True) - spread
    each = np.linalg.norm(apart, axis=-1) / np.maximum(np.linalg.norm(spread, axis=-1), 1e-30)
    return float(np.median(each))


def _as_it_came(artifact: Artifact) -> bool:
    """Whether the cache holds each of the few tokens in full, each layer its own, and all are read."""
    layout = artifact.manifest.layout()
    shared = artifact.manifest.recipe["cache"]["share"] is not None
    plain = all(group.storage.slot_dtype == "f32" for _, _, group in layout.groups())
    whole = all(group.reader.whole for _, _, group in layout.groups())
    return plain and whole and not shared and not _lets_go(layout)


def _finite(logits: Floats) -> Floats:
    """The logits; raises EinfoldError where one is not finite."""
    if not np.isfinite(logits).all():
        raise EinfoldError(
            "the compiled model gives logits that are not finite; nothing was written"
        )
    return logits


def _lets_go(layout: CacheLayout) -> bool:
    """Whether tokens may leave the slots within the few that are read here."""
    return any(
        group.lead + group.newest + group.storage.granule <= _PROMPT + _STEPS
        for group in layout.clocks().values()
    )


def _leaves_out(layout: CacheLayout) -> bool:
    """Whether a query reads fewer tokens than there are here: then a step of several may read otherwise."""
    return any(group.reader.reads(TOKENS) < TOKENS for _, _, group in layout.groups())


def _chooses_by_codes(layout: CacheLayout, tokens: int) -> bool:
    """Whether queries choose among int8 slots, of so many tokens."""
    return any(
        group.reader.reads(tokens) < tokens and group.storage.slot_dtype == "i8"
        for _, _, group in layout.groups()
    )


def _long_enough(layout: CacheLayout, model: ModelEntry) -> tuple[int, str]:
    """(tokens of a prompt behind which tokens have left, 0 where none is read; what to say of it)."""
    most = min(model.context - _STEPS, int(_WORK / model.parameters))
    needed: dict[str, int] = {}
    for group in layout.clocks().values():  # of one kind some may come in whole pages
        kind, slots = group.describe(), int(group.slots(model.context))
        needed[kind] = max(needed.get(kind, 0), slots + 1)
    reached = {kind: tokens for kind, tokens in needed.items() if tokens <= most}
    # What needs more than the context lets nothing go there.
    missed = [kind for kind in needed if most < needed[kind] <= model.context - _STEPS]
    prompt = max(reached.values(), default=0)
    said = [f"read behind a prompt of {prompt} tokens: {', '.join(reached)}"] if reached else []
    if missed:
        said.append(
            f"not checked, for that takes a longer prompt than is quick: {', '.join(missed)}"
        )
    return prompt, "; ".join(said) or "none: every token stays in it"


def _behind(
    artifact: Artifact,
    runner: Runner,
    beside: Runner,
    prompt: int,
    given: Mapping[str, Array] | None,
) -> tuple[Floats, Floats]:
    """Logits of a few steps behind a long prompt: of the target's, and of the reference's, at once, over a
    copy of the target's cache."""
    manifest = artifact.manifest
    model, make = manifest.model, getattr(runner, "make", empty)
    total = prompt + _STEPS
    ids = np.random.default_rng(1).integers(0, model.vocabulary, (1, total))
    engine = Engine(
        runner,
        manifest.layout(),
        model.vocabulary,
        model.context,
        make=make,
        key_scales=key_scales(artifact),
    )
    cache = engine.allocate(1, total, prompt, given)
    engine.prefill(cache, [ids[0, :prompt]])
    cache.make_room(steps := min(_STEPS, cache.step_limit()))
    copied = cache.select(np.zeros(1, np.int64))
    copied = replace(
        copied, buffers={name: _in_numpy(buffer) for name, buffer in copied.buffers.items()}
    )
    # Where queries choose, those of one step go by statistics of pages with tokens of later ones.
    at_once = 1 if engine.layout.chooses else steps
    ids = ids[:, prompt : prompt + steps]
    return _steps(runner, cache, ids, prompt, 1), _steps(beside, copied, ids, prompt, at_once)


def _steps(runner: Runner, cache: Cache, ids: Any, first: int, size: int) -> Floats:
    """Logits of tokens from place `first` on, so many at a step."""
    out: list[Floats] = []
    for start in range(0, ids.shape[1], size):
        step = ids[:, start : start + size]
        places = first + start + np.arange(step.shape[1])
        out.append(runner.step(cache, step, places[None], np.arange(step.shape[1])).copy())
        cache.advance(step.shape[1], runner.observed)
    return np.concatenate(out)


def _in_numpy(buffer: Any) -> Any:
    """A buffer of any device."""
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()


def _logits(
    artifact: Artifact, runner: Runner, prompt: int, given: Mapping[str, Array] | None
) -> Floats:
    """Logits of every token of a fixed random text: `prompt` tokens as a prompt, then single ones."""
    manifest = artifact.manifest
    total = min(TOKENS, manifest.model.context)
    prompt = min(prompt, total)
    ids = check_tokens(manifest.model.vocabulary)[:, :total]
    make: Make = getattr(runner, "make", empty)
    cache = Cache.allocate(manifest.layout(), 1, total, prompt, make, given, key_scales(artifact))
    out: list[Floats] = []
    start = 0
    while start < total:
        size = min(prompt - start, cache.step_limit()) if start < prompt else 1
        end = start + size
        cache.make_room(size)
        positions, rows = np.arange(start, end)[None], np.arange(size)
        out.append(runner.step(cache, ids[:, start:end], positions, rows).copy())
        cache.advance(size, runner.observed)
        if end == prompt:
            cache.settle()
        start = end
    return np.concatenate(out)
