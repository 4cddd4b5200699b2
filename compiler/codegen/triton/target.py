"""The target `triton`: kernels for attention and products with stored weights; torch runs the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ...ir.kv.read.pages.paged import Paged
from ...ir.manifest import WHOLE, Part
from ..target import TARGETS, InParts, Progress, Target

if TYPE_CHECKING:
    from ....runtime.artifact import Artifact
    from ....runtime.runner import Runner
    from ...ir.kv.read.reader import Reader
    from ...ir.kv.store.storage import Storage
    from ...ir.program import Program
    from ...ir.weights_file import Placement


@TARGETS.register
class Triton(Target):
    """Code generation for Triton."""

    name: ClassVar[str] = "triton"
    title: ClassVar[str] = (
        "Triton kernels for attention and stored weights on a GPU, beside which torch runs the rest"
    )
    generators: ClassVar[tuple[str, ...]] = ("triton",)

    cubins: tuple[Literal["sm_80", "sm_90", "sm_100"], ...] = ()
    """GPUs to compile the kernels for ahead of time; loading uses these only where it is told to trust."""

    def misplaced(self) -> str:
        return "cubins are for the target triton; add --target triton" if self.cubins else ""

    def refuses(self, storage: Storage) -> str:
        return storage.without_kernels()

    def cannot_read(self, reader: Reader) -> str:
        if reader.whole or isinstance(reader, Paged):
            return ""
        reads = f"no kernel of the target triton reads what {reader.name} chooses"
        return f"{reads}; compile for the target reference"

    def no_encoders(self) -> str:
        return (
            "the target triton writes kernels for attention over a cache, and an encoder keeps none; compile "
            "for the target onnx or reference"
        )

    def write(
        self,
        program: Program,
        placements: dict[str, Placement],
        folder: Path,
        progress: Progress,
        part: Part = WHOLE,
    ) -> None:
        from .write import write_kernels

        progress("generating kernels", 0.0)
        write_kernels(program, folder, self.cubins, progress)

    def runner(
        self,
        artifact: Artifact,
        threads: int | None = None,
        trust: bool = False,
        lean: bool = False,
    ) -> Runner:
        from .runner import triton_runner

        return triton_runner(artifact, trust)

    def in_parts(self, artifact: Artifact) -> InParts:
        from .in_parts import TritonInParts

        return TritonInParts.of(artifact)

    def limit(self, artifact: Artifact) -> int | None:
        from .in_parts import limit

        return limit(artifact)
