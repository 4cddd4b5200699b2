"""Reads an artifact's graph. Needs torch."""

from __future__ import annotations

from safetensors import SafetensorError, safe_open
from torch import fx

from ..compiler.ir.manifest import ENCODER, READER, WEIGHTS, WHOLE, Manifest, Part
from ..compiler.ir.parser import parse
from ..compiler.ir.program import Program
from ..compiler.ir.verifier import verify
from ..compiler.ir.weights import Weight
from ..errors import ArtifactError, IRError, pass_on
from .artifact import Artifact


def read_program(artifact: Artifact, device: str = "cpu", part: Part = WHOLE) -> Program:
    """A part's graph; its weights are read onto the device when they are asked for."""
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
        program = parse(artifact.read(part.graph).decode("utf-8"), load)
        verify(program)
        _check_model(program, artifact.manifest, part)
    except (IRError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{artifact.folder}/{part.graph} is no graph that runs: {error}"
        ) from error
    return program


def _check_model(program: Program, manifest: Manifest, part: Part) -> None:
    """The graph is of the model that the manifest speaks of; raises IRError where it is not."""
    model, shapes = manifest.model, program.shapes
    reads = manifest.kind == ENCODER or part == READER
    if program.model.vocabulary != model.vocabulary and part == WHOLE:
        raise IRError(
            f"its vocabulary is {program.model.vocabulary}, and the manifest's {model.vocabulary}"
        )
    values: list[fx.Node] = list(program.output.args[0])  # type: ignore[arg-type]
    results = {
        name: shapes.describe(value.meta["val"])
        for name, value in zip(program.output_names(), values, strict=True)
    }
    given = {str(node.target): shapes.describe(node.meta["val"]) for node in program.placeholders()}
    if reads:
        listed = [{e.name: str(e) for e in part} for part in (manifest.inputs, manifest.outputs)]
        if program.layout is not None or [given, results] != listed:
            raise IRError("it takes and gives other tensors than the manifest lists")
        return
    if program.layout != manifest.layout():
        raise IRError("its cache is not the one that the manifest describes")
    if (found := results.get("logits", "nothing")) != f"f32[N, {model.vocabulary}]":
        raise IRError(f"its logits are {found}, not f32[N, {model.vocabulary}]")
    for entry in manifest.beside:
        if given.get(entry.name) != entry.beside:
            raise IRError(
                f"it does not take {entry.name} as {entry.beside}, which the manifest lists"
            )
    for name, kind in given.items():
        if results.get(name, kind) != kind:
            raise IRError(f"it gives {name} another type than it takes it with, {kind}")
