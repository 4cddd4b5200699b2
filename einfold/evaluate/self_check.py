"""A finished artifact is run beside the reference on a few tokens before it is kept.

A few tokens leave no cache. So where tokens can leave, the target then reads a prompt that is long enough
for it, and the reference goes on over a copy of what that made of the cache. (Each by itself might let go of
other tokens where two have the same score but for rounding, and nothing would be wrong.) The reference reads
no long prompt: what is checked behind it is how the compressed cache is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.ir.cache.layout import CacheLayout
from ..compiler.ir.manifest import ModelEntry
from ..errors import EinfoldError, UnsupportedError
from ..runtime.artifact import Artifact
from ..runtime.cache import Cache, Make, empty
from ..runtime.engine import Engine
from ..runtime.reference_runner import ReferenceRunner
from ..runtime.runner import Floats, Runner

_PROMPT, _STEPS = 12, 4

#: Tokens times parameters of the longest prompt that is read: about ten seconds on two processors.
_WORK = 2.5e11

#: Largest difference of logits, as a share of the largest logit, where both sides compute in float32.
_TOLERANCE = 1e-3


def self_check(folder: Path) -> dict[str, Any]:
    """Compares the target, over a short prefill and a few decode steps, with the reference at once; and
    again behind a prompt of which tokens were let go or packed, where that costs little.

    Gives the figures for the report. Raises EinfoldError where the target gives numbers that are not
    finite, or differs from the reference by more than float32 arithmetic explains. Weights that are
    multiplied in int8 (accuracy level 4) differ by design: there the difference is reported only.
    Where this machine cannot run the target, the report says that it was not checked, and why.
    """
    artifact = Artifact.open(folder, verify=False)
    try:
        runner = _target(artifact)
    except UnsupportedError as error:
        return {"check": f"not run: {str(error).split(';')[0]}"}
    layout = artifact.manifest.layout()
    target = _finite(_logits(artifact, runner, _PROMPT))
    # Where no token leaves the cache, decoding must give what reading everything at once gives.
    whole = _PROMPT if _lets_go(layout) else _PROMPT + _STEPS
    beside = ReferenceRunner(artifact, keep_weights=False)
    reference = _logits(artifact, beside, whole)
    prompt, compressed = _long_enough(layout, artifact.manifest.model)
    if prompt:
        read, expected = _behind(artifact, runner, beside, prompt)
        target = np.concatenate((target, _finite(read)))
        reference = np.concatenate((reference, expected))
    difference = float(np.abs(target - reference).max())
    scale = max(1.0, float(np.abs(reference).max()))
    recipe = artifact.manifest.recipe
    approximate = (
        artifact.manifest.flavour == "ort"  # standard operators multiply in float32
        and recipe["weights"]["format"].startswith("int")
        and recipe["onnx"]["accuracy_level"] == 4
    )
    if difference > _TOLERANCE * scale and not approximate:
        raise EinfoldError(
            f"the compiled model differs from the reference by {difference:.2e} (logits up to {scale:.1f}); "
            "this is a fault of einfold, please report it with the model's architecture"
        )
    same = (target.argmax(-1) == reference.argmax(-1)).mean()
    return {
        "largest difference of logits": difference,
        "largest logit": scale,
        "same likeliest token": float(same),
        "tokens": _PROMPT + _STEPS,
        "arithmetic": "int8 products (accuracy level 4)" if approximate else "float32",
        "compressed cache": compressed,
    }


def _target(artifact: Artifact) -> Runner:
    if artifact.manifest.target == "triton":
        from ..on_triton import triton_runner

        return triton_runner(artifact)
    if artifact.manifest.target == "reference":
        return ReferenceRunner(artifact, keep_weights=False)
    from ..runtime.onnx_runner import OnnxRunner

    return OnnxRunner(artifact, prepack=False)


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
        group.policy.lead + group.newest + group.storage.granule <= _PROMPT + _STEPS
        for group in layout.clocks().values()
    )


def _long_enough(layout: CacheLayout, model: ModelEntry) -> tuple[int, str]:
    """(tokens of a prompt behind which tokens have left, 0 where none is read; what to say of it)."""
    most = min(model.context - _STEPS, int(_WORK / model.parameters))
    needed = {
        group.describe(): int(group.slots(model.context)) + 1 for group in layout.clocks().values()
    }
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
    artifact: Artifact, runner: Runner, beside: Runner, prompt: int
) -> tuple[Floats, Floats]:
    """Logits of a few steps behind a long prompt: of the target's, and of the reference's, at once, over a
    copy of the target's cache."""
    manifest = artifact.manifest
    model, make = manifest.model, getattr(runner, "make", empty)
    total = prompt + _STEPS
    ids = np.random.default_rng(1).integers(0, model.vocabulary, (1, total))
    engine = Engine(runner, manifest.layout(), model.vocabulary, model.context, make=make)
    cache = engine.allocate(1, total, prompt)
    engine.prefill(cache, [ids[0, :prompt]])
    steps = min(_STEPS, cache.step_limit())
    cache.make_room(steps)
    copied = cache.select(np.zeros(1, np.int64))
    copied = replace(
        copied, buffers={name: _in_numpy(buffer) for name, buffer in copied.buffers.items()}
    )
    places = np.arange(prompt, prompt + steps)[None]
    reference = beside.step(copied, ids[:, places[0]], places, np.arange(steps))
    out: list[Floats] = []
    for place in places[0]:
        step = np.array([[place]])
        out.append(runner.step(cache, ids[:, step[0]], step, np.arange(1)).copy())
        cache.advance(1, runner.observed)
    return np.concatenate(out), reference


def _in_numpy(buffer: Any) -> Any:
    """A buffer of any device."""
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()


def _logits(artifact: Artifact, runner: Runner, prompt: int) -> Floats:
    """Logits of every token of a fixed random text: `prompt` tokens as a prompt, then single ones."""
    manifest = artifact.manifest
    total = min(_PROMPT + _STEPS, manifest.model.context)
    prompt = min(prompt, total)
    ids = np.random.default_rng(0).integers(0, manifest.model.vocabulary, (1, total))
    make: Make = getattr(runner, "make", empty)
    cache = Cache.allocate(manifest.layout(), 1, total, prompt, make)
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
