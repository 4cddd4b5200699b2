"""Every target, and one that stands wholly in this file: from a recipe to an artifact that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

import einfold
from einfold.api import resolve_recipe
from einfold.cli.app import app
from einfold.compiler.codegen.reference.runner import ReferenceRunner
from einfold.compiler.codegen.target import TARGETS, Progress, Target, made_for
from einfold.compiler.ir.kv.store.storage import Storage
from einfold.compiler.ir.manifest import WHOLE, Part
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.weights_file import Placement
from einfold.compiler.recipe import Recipe
from einfold.errors import ArtifactError, RecipeError, UnsupportedError
from einfold.recipe_text import recipe_text
from einfold.runtime.artifact import Artifact
from einfold.runtime.runner import Floats

from ..hostile import forge
from ..quick import quick

PROMPT, NEW = [5, 6, 7, 8], 6


class Toy(Target):
    """A reference that counts its steps."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "a file with a number"
    generators: ClassVar[tuple[str, ...]] = ("numpy",)

    start: int = 100
    """What it counts from."""

    def misplaced(self) -> str:
        return "start is for the target toy" if self.start != 100 else ""

    def refuses(self, storage: Storage) -> str:
        return "toys count in float32" if storage.slot_dtype != "f32" else ""

    def write(
        self,
        program: Program,
        placements: dict[str, Placement],
        folder: Path,
        progress: Progress,
        part: Part = WHOLE,
    ) -> None:
        (folder / "toy.txt").write_text(str(self.start), encoding="utf-8")

    def runner(
        self,
        artifact: Artifact,
        threads: int | None = None,
        trust: bool = False,
        lean: bool = False,
    ) -> Counting:
        return Counting(artifact)


class Counting(ReferenceRunner):
    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.steps = int(artifact.read("toy.txt"))

    def step(self, *arguments: Any) -> Floats:
        self.steps += 1
        return super().step(*arguments)


class Picky(Toy):
    """Nothing in a recipe says that it takes no cache; the layout does."""

    name: ClassVar[str] = "picky"

    def refuses(self, storage: Storage) -> str:
        return "it is picky"


NAMES = [*TARGETS, Toy.name]


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in (Toy, Picky):
            stack.enter_context(TARGETS.with_one_more(kind))
        yield


@pytest.fixture(scope="module")
def made(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each target, checked by the compile where this machine can run it."""
    folder = tmp_path_factory.mktemp("targets")
    for name in NAMES:
        einfold.compile(text_model, folder / name, target=name)
    return {name: folder / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_runs_as_the_reference_does(name: str, made: dict[str, Path]) -> None:
    manifest = Artifact.open(made[name]).manifest
    assert manifest.target == name
    assert set(TARGETS[name].generators) <= manifest.versions.keys()
    assert manifest.flavour == made_for(name, manifest.recipe).flavour
    wanted = einfold.load(made[name], engine="reference").generate(PROMPT, max_new_tokens=NEW)
    try:
        model = einfold.load(made[name])
    except UnsupportedError as error:  # for kernels a GPU, and none is here
        pytest.skip(str(error))
    assert model.generate(PROMPT, max_new_tokens=NEW).tokens == wanted.tokens
    assert model.engine.runner.weight_bytes == manifest.weight_bytes


def test_the_toy_ran_by_itself(made: dict[str, Path]) -> None:
    model = einfold.load(made["toy"], engine="toy")
    model.generate(PROMPT, max_new_tokens=NEW)
    assert model.engine.runner.steps == 100 + NEW  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_listed_and_hashed(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    written = Artifact.open(made[name]).manifest.files.keys()
    own = written - Artifact.open(made["reference"]).manifest.files.keys()
    assert bool(own) == (name != "reference")
    for file in sorted(own):
        folder = forge.copy(made[name], tmp_path / "copy")
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        forge.write(folder / file, bytes(content))
        with pytest.raises(ArtifactError, match="is damaged"):
            einfold.load(folder)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_who_runs_what(name: str, engine: str, made: dict[str, Path]) -> None:
    if engine in (name, "reference"):
        return
    with pytest.raises(RecipeError, match=f"compiled for {name}, so engine '{engine}' cannot run"):
        einfold.load(made[name], engine=engine)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "cache",
    [{}, {"storage": "f16"}, {"storage": "int8"}, {"quant": "kivi"}, {"share": "cskv"}],
    ids=str,
)
def test_a_cache_is_taken_or_refused_with_a_sentence(name: str, cache: dict[str, Any]) -> None:
    target = TARGETS[name]()
    steps = Recipe.build({"target": "reference", "cache": cache}).cache_passes()
    stored = [step.storage for step in steps if hasattr(step, "storage")]
    reasons = [reason for storage in stored if (reason := target.refuses(storage))]
    if not reasons:
        assert Recipe.build({"target": name, "cache": cache}).made_for == target
        return
    with pytest.raises(RecipeError) as caught:
        Recipe.build({"target": name, "cache": cache})
    assert reasons[0] in str(caught.value)


def test_a_layout_is_refused_before_weights_are_written(text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="layer 0, plain: it is picky"):
        einfold.compile(text_model, tmp_path / "a", target="picky")
    with pytest.raises(RecipeError, match="it is picky"):
        einfold.estimate(text_model, target="picky")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", quick(NAMES, "toy"))
def test_estimates_and_the_command_line_know_it(name: str, text_model: Path) -> None:
    told = einfold.estimate(text_model, target=name)
    assert told.process > 10_000_000
    done = CliRunner().invoke(app, ["estimate", str(text_model), "--target", name, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["resident"] == told.resident


def test_a_table_of_its_own(tmp_path: Path) -> None:
    recipe = Recipe.build({"target": "toy", "toy": {"start": 3}})
    assert recipe.made_for == Toy(start=3)
    (tmp_path / "r.toml").write_text(recipe_text(recipe), encoding="utf-8")
    assert "[toy]" in recipe_text(recipe)
    assert Recipe.read(tmp_path / "r.toml") == recipe == Recipe.build(recipe.model_dump())
    assert resolve_recipe(recipe, context=64).made_for == Toy(start=3)
    with pytest.raises(RecipeError, match=r"unknown key 'toy\.end'"):
        Recipe.build({"toy": {"end": 3}})
    with pytest.raises(RecipeError, match=r"toy\.start: .*integer"):
        Recipe.build({"toy": {"start": "early"}})
    with pytest.raises(RecipeError, match="start is for the target toy"):
        Recipe.build({"toy": {"start": 3}})
    with pytest.raises(RecipeError, match="toy is a table"):
        Recipe.build({"toy": 3})


def test_an_unknown_target_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder = forge.copy(made["toy"], tmp_path / "copy")
    forge.edit(folder, lambda data: data.update(target="dragon"))
    with pytest.raises(ArtifactError, match="the target 'dragon', which this einfold does not"):
        einfold.load(folder)
    with pytest.raises(RecipeError, match="target is one of onnx, triton, reference"):
        Recipe.build({"target": "dragon"})
    for name in ("../x", "A", "", "x" * 65, "x\n"):
        forge.edit(folder, lambda data, name=name: data.update(target=name))
        with pytest.raises(ArtifactError, match="'target'"):
            einfold.load(folder)
