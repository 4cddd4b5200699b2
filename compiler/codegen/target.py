"""What a target is: what a compiled program is written as, and what runs it.

A target stands in a package of this one, whose module `target` registers it. Its fields are its table in a
recipe, such as `[onnx]`. Loading an artifact reads these modules, so they import what they write and run with
inside their methods, and none of them imports torch by itself (docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from ...errors import UnsupportedError
from ..ir.manifest import WHOLE, Part
from ..ir.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, fx

    from ...runtime.artifact import Artifact
    from ...runtime.runner import Caller, Runner
    from ..ir.kv.read.reader import Reader
    from ..ir.kv.store.storage import Storage
    from ..ir.program import Program
    from ..ir.quant.scheme import Scheme
    from ..ir.weights_file import Placement
    from ..memory.planning import MemoryPlan
    from ..memory.tiers import Load, TierPlan
    from ..passes.base import Pass

#: Told of progress: what is being done, and the share of it that is done (0 to 1).
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Held:
    """Bytes that a process which runs an artifact holds beside weights, cache and activations."""

    process: int
    """Taken before a weight is read: Python, NumPy, and the engine with its libraries."""
    packed: int = 0
    """The engine's own copies of weights."""
    arena: int = 0
    """Bytes that its arena keeps for each byte of activations."""

    def runtime(self, activations: int) -> int:
        """The runtime's own copies of weights, and what its arena keeps."""
        return self.packed + self.arena * activations


class InParts(Protocol):
    """An artifact that was read and taken apart; no weight is loaded."""

    def load(self, chunk: int, cache: int, capacity: int = 0) -> Load:
        """What it holds in memory in steps of `chunk` tokens over a cache for `capacity` tokens, which has
        `cache` bytes of memory."""

    def spilling(self, load: Load, capacity: int) -> Load:
        """The same with the layers whose slots of a cache for `capacity` tokens may be spilled."""

    def runner(self, plan: TierPlan, threads: int | None = None, trust: bool = False) -> Runner:
        """What runs it with weights where a plan of its `load` says; options are those of
        `Target.runner`."""


class Target(BaseModel):
    """Base of the targets, with the answers of one that torch runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str]
    """What is generated, in half a sentence, for lists of the targets."""
    generators: ClassVar[tuple[str, ...]] = ()
    """Distributions that its code is generated with; the manifest names their versions."""
    writers: ClassVar[tuple[str, ...]] = ()
    """Modules that `write` cannot do without."""
    rounds_queries: ClassVar[bool] = False
    """Whether queries are rounded where they choose among slots of codes, so that what scores nearly as well
    may be read instead."""

    @property
    def flavour(self) -> str:
        """Which operators it is written in; a word in the manifest."""
        return "torch"

    def misplaced(self) -> str:
        """Why its table means nothing where another target was chosen; "" where it does not matter."""
        return ""

    def refuses(self, storage: Storage) -> str:
        """Why it cannot run over a cache that is stored so, in a sentence; "" where it can."""
        return ""

    def cannot_read(self, reader: Reader) -> str:
        """Why it cannot attend over what a reader chooses, in a sentence; "" where it can."""
        return ""

    def no_encoders(self) -> str:
        """Why it cannot compile a model that keeps no cache, in a sentence; "" where it can."""
        return ""

    def weight_passes(self, scheme: Scheme | None) -> list[Pass]:
        """What it needs of weights that are stored so; runs behind the passes that the recipe asks for."""
        return []

    @property
    def zero_points(self) -> bool:
        """Whether it runs weights whose groups have zero points, however many groups a row has."""
        return True

    def remark(self, scheme: Scheme) -> str:
        """What a person should know of weights that are stored so, such as that no kernel reads them; ""
        where there is nothing to say."""
        return ""

    def exact(self, scheme: Scheme | None, activations: str = "f32") -> bool:
        """Whether products with weights that are stored so are computed in float32.

        Of activations in 8 bits none is: what is nearly the same ahead of the rounding may be a step apart
        behind it."""
        return activations == "f32"

    def attention(self) -> Callable[..., Any] | None:
        """Makes lowerings of attention (`compiler/fuse/folded.py`) in operators that `write` takes.

        A lowering raises NotLoweredError with the reason where a plan is better left as it was written. None
        where the target has no operators for attention.
        """
        return None

    def scratch(self, program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
        """Bytes that a call takes while it runs, beside its inputs and results."""
        return 0

    def plan(self, program: Program, inputs: Mapping[str, Tensor]) -> MemoryPlan | None:
        """Where intermediate values lie in a step with inputs of these shapes; None where another engine
        decides that."""
        return None

    def held(self, program: Program) -> Held:
        """What a process holds that runs the program. Measured: 420 to 450 MB with torch 2.13."""
        return Held(480_000_000)

    def check_installed(self) -> None:
        """Raises ModuleNotFoundError where a package that `write` needs is not installed."""
        for module in self.writers:
            import_module(module)

    def write(
        self,
        program: Program,
        placements: dict[str, Placement],
        folder: Path,
        progress: Progress,
        part: Part = WHOLE,
    ) -> None:
        """Writes what the target runs of a part into an artifact's folder, beside weights and graph.

        `placements` say where the weights lie in their file. Raises UnsupportedError, naming operator and
        node or layer, for what it cannot write.
        """

    def check_written(self, folder: Path, part: Part = WHOLE) -> None:
        """Raises UnsupportedError where `runner` or `caller` would refuse what was written."""

    def runs(self, target: str) -> bool:
        """Whether it can run what was compiled for the target of a name."""
        return target == self.name

    def runner(
        self,
        artifact: Artifact,
        threads: int | None = None,
        trust: bool = False,
        lean: bool = False,
    ) -> Runner:
        """What runs a causal language model. `threads` is the processors to use, all that there are without
        it; `trust` lets it run code that the artifact brings; `lean` holds as little memory as can be, and
        may be slow.

        Raises ArtifactError for files that it cannot take, UnsupportedError where this machine lacks what
        runs them.
        """
        raise NotImplementedError

    def in_parts(self, artifact: Artifact) -> InParts:
        """A causal language model as one whose weights need not all be resident. Raises UnsupportedError
        where they must."""
        raise UnsupportedError(
            f"the target {self.name} holds all of its weights in memory; a memory budget is for artifacts "
            "of the targets onnx and triton"
        )

    def limit(self, artifact: Artifact) -> int | None:
        """The memory budget of a causal language model for which this machine's device has too little memory;
        None where all of it has room."""
        return None

    def caller(
        self,
        artifact: Artifact,
        threads: int | None = None,
        lean: bool = False,
        part: Part = WHOLE,
    ) -> Caller:
        """What runs an encoder, or the part of an artifact that is one; options and errors are those of
        `runner`."""
        raise NotImplementedError


TARGETS: Registry[type[Target]] = Registry(
    "target", "einfold.compiler.codegen", module="target", order=("onnx", "triton", "reference")
)


def made_for(target: str, recipe: Mapping[str, Any]) -> Target:
    """A target as a manifest's recipe has it."""
    return TARGETS[target].model_validate(recipe.get(target, {}))
