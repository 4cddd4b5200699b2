"""The ordered list of passes, with the reason for each place; and the manager that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import IRError, RecipeError
from .fuse.folded import Maker
from .ir.printer import print_program
from .ir.program import Program
from .ir.verifier import verify
from .passes.base import Note, Pass
from .passes.cache.attach_cache import AttachCache
from .passes.cache.order_heads import OrderHeads
from .passes.cache.plan_cache import PlanCache
from .passes.cleanup.fold_constants import FoldConstants
from .passes.cleanup.simplify import Simplify
from .passes.facts import failing
from .passes.fusion.fuse_attention import FuseAttention
from .passes.fusion.fuse_linears import FuseLinears
from .passes.fusion.fuse_residual_norms import FuseResidualNorms
from .passes.fusion.select_logit_rows import SelectLogitRows
from .passes.kv_prune.train_retaining import TrainRetaining
from .passes.memory.order_calls import OrderCalls
from .passes.raising.raise_activations import RaiseActivations
from .passes.raising.raise_linears import RaiseLinears
from .passes.raising.raise_norms import RaiseNorms
from .passes.raising.raise_patches import RaisePatches
from .passes.raising.raise_rotary import RaiseRotary
from .passes.raising.raise_windows import RaiseWindows
from .passes.weight_quant.rotate_values import RotateValues


def raising_passes() -> list[Pass]:
    """From ATen's spelling to `einfold` operators; every road into the compiler starts with these."""
    return [
        FoldConstants(),  # first: 1 + w becomes one weight, so that norms match
        RaiseNorms(),
        RaiseLinears(),  # before rotary: a projection is then where the walk back from q and k ends
        RaiseActivations(),
        RaiseRotary(),
        Simplify(),  # last: the transposes around attention meet and cancel
    ]


def planning_passes(
    cache: Sequence[Pass] = (),
    compare: Sequence[Pass] = (),
    fusion: Sequence[Pass] = (),
    values: Sequence[Pass] = (),
) -> list[Pass]:
    """The pipeline of a causal language model up to where its cache layout is decided.

    `cache` are the passes that refine the layout, `compare` what compares the graph with the model, `fusion`
    what fuses attention beside that over the cache, `values` what changes the values that are cached.
    """
    return [
        *raising_passes(),
        FuseLinears(),  # before quantization: a matrix is then packed once, in its final shape
        FuseResidualNorms(),
        *fusion,  # behind what is raised, as in a plain module
        SelectLogitRows(),
        *compare,  # before anything that may lose something: here the graph is the model
        *values,  # before the cache is planned: what methods measure, and scales hold, are these values
        PlanCache(),
        *cache,  # before the weights: what is measured is the model as it was, not as it is rounded
    ]


def language_model_passes(
    weights: Sequence[Pass] = (),
    cache: Sequence[Pass] = (),
    compare: Sequence[Pass] = (),
    fusion: Sequence[Pass] = (),
) -> list[Pass]:
    """The pipeline of a causal language model, or of a decoder that reads what an encoder made.

    `weights` are the passes that the recipe chose for weights, `cache` those that refine the cache layout,
    `compare` what compares the graph with the model, `fusion` what fuses attention to an
    encoder.
    """
    values = [step for step in weights if isinstance(step, RotateValues)]
    return [
        *planning_passes(cache, compare, fusion, values),
        TrainRetaining(),  # behind all that gives heads a policy; before the weights, as what is measured
        OrderHeads(),  # before the weights are packed: it permutes their rows and columns
        *(step for step in weights if step not in values),
        AttachCache(),  # near the end: earlier passes see attention without its cache
        Simplify(),
        OrderCalls(),  # last: it counts the bytes of what will run
    ]


def module_passes(target: str = "", attention: Maker | None = None) -> list[Pass]:
    """The pipeline of a plain module, no cache and no logits, up to where weights may lose something.

    `attention` makes the target's lowerings of attention (`Target.attention`).
    """
    return [
        *raising_passes(),
        FuseLinears(),
        FuseResidualNorms(),
        FuseAttention(target, attention),  # behind what is raised: no norm is then part of a region
        Simplify(),
    ]


def encoder_passes(
    module: Sequence[Pass], weights: Sequence[Pass] = (), compare: Sequence[Pass] = ()
) -> list[Pass]:
    """The pipeline of an encoder: that of a plain module (`module_passes`), and then its weights."""
    return [
        RaisePatches(),  # first: the product that a convolution becomes is a linear as any other
        RaiseWindows(),
        *module,
        *compare,  # before anything that may lose something: here the graph is the model
        *weights,
        Simplify(),
        OrderCalls(),
    ]


@dataclass
class PassRecord:
    """What one pass did: its options, its time, its notes."""

    name: str
    options: dict[str, Any]
    seconds: float
    changed: bool
    notes: list[Note] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The record as plain data, for manifests and reports."""
        return asdict(self)


Progress = Callable[[str, int, int], None]


@dataclass
class PassManager:
    """Runs passes in order, verifying the program before and after each.

    `dump` is a folder for the program's text after every pass; `progress(name, index, total)` is
    called before each. `asked` names passes that a person chose: one that finds nothing to do is refused.
    """

    passes: Sequence[Pass]
    dump: Path | None = None
    progress: Progress | None = None
    asked: frozenset[str] = frozenset()

    def run(self, program: Program) -> list[PassRecord]:
        """Raises IRError, naming the pass, where one breaks a rule of the IR or its promise or comes too
        early, and RecipeError where one that was asked for changed nothing."""
        verify(program)
        self._write_dump(program, 0, "captured")
        records = []
        for index, step in enumerate(self.passes, start=1):
            if self.progress is not None:
                self.progress(step.name, index, len(self.passes))
            missing = failing(program, step.requires)
            if missing:
                raise IRError(f"pass {step.name} needs what does not hold before it, {missing}")
            started = time.perf_counter()
            result = step.run(program)
            seconds = time.perf_counter() - started
            try:
                verify(program)
            except IRError as error:
                raise IRError(f"pass {step.name} broke the program: {error}") from error
            broken = failing(program, step.ensures)
            if broken:
                raise IRError(f"pass {step.name} did not do what it ensures, {broken}")
            if step.name in self.asked and not result.changed:
                raise RecipeError(_idle(step.name, result.notes))
            records.append(
                PassRecord(
                    step.name,
                    step.options(),
                    seconds,
                    result.changed,
                    result.notes,
                    result.measured,
                )
            )
            self._write_dump(program, index, step.name)
        return records

    def _write_dump(self, program: Program, index: int, name: str) -> None:
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / f"{index:02d}-{name}.eir").write_text(
                print_program(program), encoding="utf-8"
            )


def _idle(name: str, notes: Sequence[Note]) -> str:
    """The sentence for a method that was asked for and left everything as it was."""
    reasons: dict[str, list[str]] = {}
    for note in notes:
        reasons.setdefault(note.what, []).append(note.where)
    told = "; ".join(
        f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {what}"
        for what, where in list(reasons.items())[:3]
    )
    return (
        f"{name} was asked for and found nothing to do, so the result would claim what was not done "
        f"({told or 'no part of the graph is of its kind'}); leave it out, or change what stands in its way"
    )
