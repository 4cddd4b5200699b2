"""Super-ops of which some pages stay: the numbers of resident weights, and the bytes that were planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import einfold
from einfold.compiler.codegen.onnx.in_parts import OnnxInParts
from einfold.compiler.codegen.onnx.paging import PagedRunner
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.tiers import Load
from einfold.runtime.artifact import Artifact
from einfold.runtime.memory.pages import UNIT, no_paging

from ... import models
from ...disks import needs_a_disk
from ...quick import quick
from .in_parts import TEXT, check_as_resident

pytestmark = pytest.mark.skipif(bool(no_paging()), reason=no_paging())

#: Layers of three or four units, packed.
SIZES = {"num_hidden_layers": 5, "hidden_size": 256, "intermediate_size": 2048}


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A Llama whose layers take some units each, in a format."""
    folder = tmp_path_factory.mktemp("deep")
    source = models.save("llama", folder / "model", **SIZES)

    def get(weights: str) -> Path:
        out = folder / weights
        if not out.exists():
            einfold.compile(source, out, weights=weights, check=False)
        return out

    return get


@contextmanager
def running(path: Path, less: int) -> Iterator[tuple[einfold.Model, PagedRunner]]:
    """Within the memory that all packed weights take beside the rest, less so many units."""
    found = OnnxInParts.of(Artifact.open(path))
    load = replace(found.load(16, 1 << 20), pieces=found.load(16, 1 << 20).paged)
    budget = load.fixed.total + sum(piece.held for piece in load.paged) - less * UNIT
    plan = place(whole_is_too_large(load), budget)
    assert plan.paged and plan.parts, plan
    model = einfold.load(path, threads=1, chunk=16)
    runner = PagedRunner(found, plan, 1)
    model.engine.runner = runner
    try:
        yield model, runner
    finally:
        runner.close()


def whole_is_too_large(load: Load) -> Load:
    """The same where resident weights would take twice as much: else a model so small is all resident."""
    return replace(load, pieces=tuple(replace(p, held=2 * p.held) for p in load.pieces))


@pytest.mark.parametrize(
    ("weights", "less"), quick([("fp32", 2), ("fp32", 6), ("int8", 1)], ("fp32", 6), ("int8", 1))
)
def test_logits_and_tokens_are_those_of_resident_weights(
    weights: str, less: int, deep: Callable[[str], Path]
) -> None:
    path = deep(weights)
    with running(path, less) as (model, runner):
        rest = {piece.name for piece in runner.plan.pieces if piece.name.endswith(" rest")}
        # Layers of 7 MiB are a seventh of all and taken apart, those of 2 MiB are too small for that.
        assert len(rest) == (5 if weights == "fp32" else 0)
        check_as_resident(model, path)


def test_a_token_reads_what_was_planned_and_no_more(deep: Callable[[str], Path]) -> None:
    with running(deep("fp32"), 5) as (model, runner):
        assert sum(runner.plan.parts.values()) >= 5 * UNIT
        model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True)  # learns both kinds of steps
        before = runner.fetched
        model.generate(TEXT[:5], max_new_tokens=9, ignore_eos=True)
        # A prompt's step and eight of a token, but for what of the first was read ahead, and of the next is.
        assert 8 * runner.plan.fetched <= runner.fetched - before <= 10 * runner.plan.fetched
        assert runner.plan.fetched < sum(piece.nbytes for piece in runner.plan.pieces) / 1.5


def test_a_copy_that_is_damaged_where_a_part_comes_is_made_again(
    deep: Callable[[str], Path],
) -> None:
    """All of a super-op is hashed when a part of it is brought to stay."""
    path = deep("fp32")
    with running(path, 4) as (model, runner):
        wanted = model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
        name, stays = next(iter(runner.plan.parts.items()))
        file, place_of = runner.copy.file, runner.copy.ops[name]
    at = place_of.start + stays + 99
    assert at < place_of.loaded
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    with running(path, 4) as (model, runner):
        assert runner.copy.written
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted
