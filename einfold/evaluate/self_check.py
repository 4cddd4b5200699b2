"""A finished artifact is run beside the reference on a few tokens before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.ir.cache.layout import CacheLayout
from ..errors import EinfoldError, UnsupportedError
from ..runtime.artifact import Artifact
from ..runtime.cache import Cache, Make, empty
from ..runtime.reference_runner import ReferenceRunner
from ..runtime.runner import Floats, Runner

_PROMPT, _STEPS = 12, 4

#: Largest difference of logits, as a share of the largest logit, where both sides compute in float32.
_TOLERANCE = 1e-3


def self_check(folder: Path) -> dict[str, Any]:
    """Compares the target, over a short prefill and a few decode steps, with the reference at once.

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
    target = _logits(artifact, runner, _PROMPT)
    # Where no token leaves the cache, decoding must give what reading everything at once gives.
    whole = _PROMPT if _lets_go(artifact.manifest.layout()) else _PROMPT + _STEPS
    reference = _logits(artifact, ReferenceRunner(artifact, keep_weights=False), whole)
    if not np.isfinite(target).all():
        raise EinfoldError(
            "the compiled model gives logits that are not finite; nothing was written"
        )
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
    }


def _target(artifact: Artifact) -> Runner:
    if artifact.manifest.target == "triton":
        from ..on_triton import triton_runner

        return triton_runner(artifact)
    if artifact.manifest.target == "reference":
        return ReferenceRunner(artifact, keep_weights=False)
    from ..runtime.onnx_runner import OnnxRunner

    return OnnxRunner(artifact, prepack=False)


def _lets_go(layout: CacheLayout) -> bool:
    """Whether tokens may leave the slots within the few that are read here."""
    return any(
        group.policy.lead + group.newest + group.storage.granule <= _PROMPT + _STEPS
        for group in layout.clocks().values()
    )


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
