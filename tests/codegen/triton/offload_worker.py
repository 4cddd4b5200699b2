"""Runs Triton artifacts within a memory budget, in the interpreter, over a simulated device; started as
`tests.codegen.triton.worker` is."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

import einfold
from einfold.compiler.codegen.triton import in_parts
from einfold.compiler.codegen.triton.offload import OffloadedRunner
from einfold.compiler.ir.interpreter import Run
from einfold.errors import ArtifactError, ArtifactWarning

from ...allocator import asked
from ...simulated_copies import Forgetful, Simulated
from .worker import serve


def in_arena(request: dict[str, Any]) -> dict[str, Any]:
    """A prompt in steps over the arena, and over another device with all of it allocated: whether they give
    the same bits, and the blocks that torch asked for in each step when its shapes were known, but for those
    that rows are looked up in on the host."""
    logits: list[list[Any]] = []
    for arena in (True, False):
        copies = Simulated()
        in_parts.copies_of = lambda device, copies=copies: copies  # type: ignore[assignment]
        model = einfold.load(
            request["artifact"],
            memory=request["memory"],
            context=request["context"],
            chunk=request["chunk"],
        )
        runner: Any = model.engine.runner
        assert isinstance(runner, OffloadedRunner)
        if not arena:
            runner._arena.begin = partial(Run, runner.interpreter)
        steps: list[Any] = []
        blocks: list[int] = []

        def watched(
            arrays: Any, others: Any, run: Any = runner._run, steps: Any = steps, to: Any = blocks
        ) -> Any:
            with asked() as on_host:
                for lookup in runner._lookups:  # noqa: B023
                    lookup.rows(torch.tensor(arrays[lookup.ids]))
            with asked() as sizes:
                out = run(arrays, others)
            to.append(len(sizes) - len(on_host))
            steps.append(out["logits"].clone())
            return out

        runner._run = watched
        with copies:
            for _ in range(2):  # the second meets no shape that is new
                blocks.clear()
                model.generate(request["prompt"], max_new_tokens=request["new"], ignore_eos=True)
        logits.append(steps)
        if arena:
            found = {
                "arena": runner._arena.nbytes,
                "rows": sum(runner._held[lookup.name].nbytes for lookup in runner._lookups),
                "blocks": blocks,
                "activations": runner.plan.fixed.activations,
            }
    same = [torch.equal(a, b) for a, b in zip(*logits, strict=True)]
    return {"same": same, **found}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("what") == "arena":
        return in_arena(request)
    return generated(request)


def generated(request: dict[str, Any]) -> dict[str, Any]:
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
