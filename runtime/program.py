"""Reads an artifact's graph. Needs torch."""

from __future__ import annotations

from safetensors import SafetensorError, safe_open

from ..compiler.ir.manifest import GRAPH, WEIGHTS, Manifest
from ..compiler.ir.parser import parse
from ..compiler.ir.program import Program
from ..compiler.ir.verifier import verify
from ..compiler.ir.weights import Weight
from ..errors import ArtifactError, IRError, pass_on
from .artifact import Artifact


def read_program(artifact: Artifact, device: str = "cpu") -> Program:
    """The artifact's graph; its weights are read onto the device when they are asked for."""
    try:
        weights = safe_open(str(artifact.file(WEIGHTS)), framework="pt")
    except (SafetensorError, OSError) as error:
        pass_on(error)
        raise ArtifactError(f"{artifact.folder}/{WEIGHTS} is damaged: {error}") from error
    present = set(weights.keys())

    def load(name: str, declared: Weight) -> Weight:
        if name not in present:
            raise ArtifactError(
                f"{artifact.folder}/{WEIGHTS} lacks the weight {name} that the graph reads"
            )
        stored = tuple(weights.get_slice(name).get_shape())
        if stored != declared.shape:
            raise ArtifactError(
                f"{artifact.folder}/{WEIGHTS} holds {name} as {stored}, and the graph reads {declared.shape}"
            )
        return Weight(declared.shape, declared.dtype, lambda: weights.get_tensor(name).to(device))

    try:
        program = parse(artifact.read(GRAPH).decode("utf-8"), load)
        verify(program)
        _check_model(program, artifact.manifest)
    except (IRError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{artifact.folder}/{GRAPH} is no graph that runs: {error}") from error
    return program


def _check_model(program: Program, manifest: Manifest) -> None:
    """The graph is of the model and the cache that the manifest speaks of; raises IRError where it is not."""
    model = manifest.model
    if program.layout != manifest.layout():
        raise IRError("its cache is not the one that the manifest describes")
    if program.model.vocabulary != model.vocabulary:
        raise IRError(
            f"its vocabulary is {program.model.vocabulary}, and the manifest's {model.vocabulary}"
        )
    results = dict(zip(program.output_names(), program.output.args[0], strict=True))  # type: ignore[arg-type]
    shapes = program.shapes
    found = shapes.describe(results["logits"].meta["val"]) if "logits" in results else "nothing"
    if found != f"f32[N, {model.vocabulary}]":
        raise IRError(f"its logits are {found}, not f32[N, {model.vocabulary}]")
    given = {str(node.target): shapes.describe(node.meta["val"]) for node in program.placeholders()}
    for name, kind in given.items():
        if name in results and shapes.describe(results[name].meta["val"]) != kind:
            raise IRError(f"it gives {name} another type than it takes it with, {kind}")
