"""Runs Triton artifacts within a memory budget, in the interpreter, over a simulated device; started as
`tests.codegen.triton.worker` is."""

from __future__ import annotations

import warnings
from typing import Any

import einfold
from einfold.compiler.codegen.triton import in_parts
from einfold.errors import ArtifactError, ArtifactWarning

from ...simulated_copies import Forgetful, Simulated
from .worker import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What an artifact writes within a budget and without one, and what was copied.

    `forgets` leaves out an order of the two streams, `unlocked` says why memory is not page-locked.
    """
    copies = Forgetful(request["forgets"]) if "forgets" in request else Simulated()
    copies.unlocked = request.get("unlocked", "")
    in_parts.copies_of = lambda device: copies  # type: ignore[assignment]
    options = {"max_new_tokens": request["new"], "ignore_eos": True}
    loading = {"chunk": request.get("chunk", 512)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ArtifactWarning)
        model = einfold.load(
            request["artifact"], memory=request["memory"], context=request["context"], **loading
        )
    runner, steps = model.engine.runner, 0
    taken = runner.step

    def step(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return taken(*given)

    runner.step = step  # type: ignore[method-assign]
    told = {
        "plan": model.plan.data(),
        "sentence": model.plan.sentence(),
        "warnings": [str(each.message) for each in caught],
    }
    with copies:
        try:
            rows = model.generate_batch(request["prompts"], **options)
        except ArtifactError as error:
            return told | {"race": str(error.__cause__), "kind": type(error.__cause__).__name__}
        # Once more: items lie in other buffers then.
        again = model.generate_batch(request["prompts"], **options)
    reference = einfold.load(request["artifact"], engine="reference", **loading)
    expected = reference.generate_batch(request["prompts"], **options)
    return told | {
        "found": [row.tokens for row in rows],
        "again": [row.tokens for row in again],
        "expected": [row.tokens for row in expected],
        "steps": steps,
        "copied": runner.fetched,
        "on the device": (1 << 40) - copies.room,
        "placed": len(runner._placed),
    }


if __name__ == "__main__":
    serve(answer)
