"""The target `onnx`: a model for onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....errors import ArtifactError, UnsupportedError
from ...ir.kv.read.pages.paged import Paged
from ...ir.manifest import WEIGHTS, WHOLE, Part
from ..target import TARGETS, Held, InParts, Progress, Target

if TYPE_CHECKING:
    from torch import fx

    from ....runtime.artifact import Artifact
    from ....runtime.runner import Caller, Runner
    from ...ir.kv.read.reader import Reader
    from ...ir.kv.store.storage import Storage
    from ...ir.program import Program
    from ...ir.quant.scheme import Scheme
    from ...ir.weights_file import Placement
    from ...passes.base import Pass


@TARGETS.register
class Onnx(Target):
    """Code generation for ONNX."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "a model for onnxruntime"
    generators: ClassVar[tuple[str, ...]] = ("onnx-ir",)
    writers: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir")
    rounds_queries: ClassVar[bool] = True

    portable: bool = False
    accuracy_level: Literal[0, 1, 4] = 4
    """MatMulNBits: 4 multiplies in int8, 0 and 1 in float32 (slower, exact)."""

    @property
    def flavour(self) -> str:
        """Standard operators alone, or those of onnxruntime beside them."""
        return "portable" if self.portable else "ort"

    def misplaced(self) -> str:
        return "portable is for the target onnx; leave it out" if self.portable else ""

    def refuses(self, storage: Storage) -> str:
        stored = storage.slot_dtype if storage.plain else storage.name
        codes = {"i8": "int8", "u8": "int4"}.get(stored, "")
        if stored == "f32" or ((codes or storage.integral) and not self.portable):
            return ""
        if codes:
            return (
                f"the portable flavour has no operator that reads an {codes} cache, it could only widen all "
                "of it at every step; use cache.storage f32, or the default flavour"
            )
        if stored == "f16":
            return (
                "onnxruntime's attention for the CPU widens float16 slots at every step, and while it reads "
                "a prompt takes about the memory that they save; take cache.storage int8, which is smaller "
                "and faster, or compile for the target triton or reference"
            )
        if storage.integral:
            return (
                f"the portable flavour has no operator that multiplies codes of {storage.name} as integers; "
                "use the default flavour, or cache.storage f32"
            )
        if storage.method in ("turboquant", "abq"):
            levels = " and levels=even, which are the defaults" * (storage.method == "turboquant")
            return (
                "the target onnx multiplies codes of 4 bits with even levels as integers, and could only "
                f"widen others at every step; take bits=4{levels or ', the default, and an even block'}, or "
                "compile for the target triton or reference"
            )
        if storage.scattered:
            return (
                f"the target onnx has no operator that reads what {storage.name} stores, it could only widen "
                "all of the cache at every step; compile for the target reference"
            )
        return (
            f"the target onnx has no operator that reads what {storage.name} stores, it could only widen "
            "all of the cache at every step; take cache.quant turboquant, whose codes it multiplies as "
            "integers, or cache.storage int8, or compile for the target triton or reference"
        )

    def cannot_read(self, reader: Reader) -> str:
        paged = isinstance(reader, Paged)
        if reader.whole or (paged and not self.portable):
            return ""
        if paged:
            return (
                f"the portable flavour has no operator that reads the pages which {reader.name} chooses; "
                "compile for the default flavour, or for the target reference"
            )
        reads = f"no operator of the target onnx reads what {reader.name} chooses"
        return f"{reads}; compile for the target reference"

    @property
    def zero_points(self) -> bool:
        return not self.portable  # ONNX packs those of 4 bits across rows

    def weight_passes(self, scheme: Scheme | None) -> list[Pass]:
        from ...passes.weight_quant.explicit_zeros import ExplicitZeros

        if not self.portable or scheme is None or not scheme.operators:
            return []
        return [ExplicitZeros()]  # standard operators know no implied zero point

    def remark(self, scheme: Scheme) -> str:
        from .kernels import remark

        return remark(scheme, self.accuracy_level != 4, self.flavour)

    def exact(self, scheme: Scheme | None, activations: str = "f32") -> bool:
        rounded = scheme is not None and bool(scheme.operators) and self.accuracy_level == 4
        return super().exact(scheme, activations) and (self.portable or not rounded)

    def attention(self) -> Callable[..., Any] | None:
        from .fused import ThroughAttention

        return partial(ThroughAttention, self.flavour)

    def scratch(self, program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
        from .account import scratch

        return scratch(program, node, dims, self.portable)

    def held(self, program: Program) -> Held:
        from .account import held

        return held(program, self.accuracy_level != 4, self.flavour)

    def write(
        self,
        program: Program,
        placements: dict[str, Placement],
        folder: Path,
        progress: Progress,
        part: Part = WHOLE,
    ) -> None:
        import onnx_ir as ir

        from .lower import lower

        progress("generating ONNX", 0.0)
        lowered = lower(program, WEIGHTS, placements, self.flavour, self.accuracy_level)
        ir.save(lowered, folder / part.model)

    def check_written(self, folder: Path, part: Part = WHOLE) -> None:
        from .check import check_onnx

        try:
            check_onnx(
                (folder / part.model).read_bytes(), WEIGHTS, (folder / WEIGHTS).stat().st_size
            )
        except ArtifactError as error:
            raise UnsupportedError(
                f"the model needs more than an artifact may hold: {error}"
            ) from error

    def runner(
        self,
        artifact: Artifact,
        threads: int | None = None,
        trust: bool = False,
        lean: bool = False,
    ) -> Runner:
        from .runner import OnnxRunner

        return OnnxRunner(artifact, threads, prepack=not lean)

    def in_parts(self, artifact: Artifact) -> InParts:
        from .in_parts import OnnxInParts

        return OnnxInParts.of(artifact)

    def caller(
        self,
        artifact: Artifact,
        threads: int | None = None,
        lean: bool = False,
        part: Part = WHOLE,
    ) -> Caller:
        from .runner import OnnxCaller

        return OnnxCaller(artifact, threads, not lean, part)
