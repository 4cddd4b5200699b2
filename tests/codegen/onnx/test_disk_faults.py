"""Disks that fail while a model runs whose weights do not all stay, and models that were closed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.compiler.codegen.onnx.cut_model import CutModel
from einfold.compiler.codegen.onnx.paging import PagedRunner
from einfold.compiler.codegen.onnx.streaming import StreamingRunner
from einfold.compiler.memory.tiers import TierPlan
from einfold.errors import ArtifactError, DiskError
from einfold.runtime.artifact import Artifact
from einfold.runtime.memory import direct, pages
from einfold.runtime.memory.pages import PagedFile, no_paging

from ...disks import needs_a_disk
from .in_parts import TEXT

#: Numbers of what is asked of the kernel where a unit is brought.
BRING = pages._BRING


def plan_of(path: Path, paged: bool) -> TierPlan:
    load = CutModel.of(Artifact.open(path)).load(512, 1 << 30)
    pieces = load.paged if paged else load.pieces
    return TierPlan(pieces, frozenset({"layer 1"}), load.fixed, 1 << 40, paged=paged)


@pytest.fixture(params=["pages", "packed in every step"])
def model(
    request: pytest.FixtureRequest,
    wide_head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[einfold.Model]:
    """A model with streamed weights, by each way in which they come."""
    paged = request.param == "pages"
    if paged:
        needs_a_disk(tmp_path)
        if no_paging():
            pytest.skip(no_paging())
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(direct, "_PAUSE", 0.001)
    found = einfold.load(wide_head, threads=1, chunk=16)
    kind = PagedRunner if paged else StreamingRunner
    runner = kind(CutModel.of(found.artifact), plan_of(wide_head, paged), 1)
    found.engine.runner = runner
    yield found
    runner.close()


class Disk:
    """Fails reads of streamed weights, as the kernel tells of it in either way: so many, then no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = self.reads = 0
        advise, read = PagedFile._advise, os.preadv

        def advised(file: PagedFile, part: Any, advice: int) -> None:
            if advice == BRING:
                self._read(14, "Bad address")  # what it says of a page that it cannot read
            advise(file, part, advice)

        def preadv(*arguments: Any) -> int:
            self._read(5, "Input/output error")
            return read(*arguments)

        monkeypatch.setattr(PagedFile, "_advise", advised)
        monkeypatch.setattr(os, "preadv", preadv)

    def _read(self, number: int, said: str) -> None:
        self.reads += 1
        if self.failures > 0:
            self.failures -= 1
            raise OSError(number, said)


@pytest.fixture
def disk(model: einfold.Model, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under the model, once that is loaded."""
    return Disk(monkeypatch)


def generated(model: einfold.Model) -> list[int]:
    return model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens


def prefill(model: einfold.Model) -> object:
    row = np.array(TEXT[:5])
    return model.engine.prefill(model.engine.allocate(1, 8, 5), [row])


def step(model: einfold.Model) -> object:
    cache, one = model.engine.allocate(1, 8, 5), np.zeros((1, 1), np.int64)
    return model.engine.step(cache, one, one, np.zeros(1, np.int64))


ENTRIES = pytest.mark.parametrize(
    "entry",
    [generated, prefill, step, lambda model: list(model.logits(TEXT[:5]))],
    ids=["generate", "prefill", "step", "logits"],
)


def test_a_read_that_fails_once_is_no_error(model: einfold.Model, disk: Disk) -> None:
    wanted = generated(model)
    for _ in range(4):
        disk.failures, before = 1, disk.reads
        assert generated(model) == wanted
        assert disk.failures == 0
        assert disk.reads > before + 1


@ENTRIES
def test_a_disk_that_fails_is_told_and_the_model_goes_on(
    entry: Callable[[einfold.Model], object], model: einfold.Model, disk: Disk
) -> None:
    """By every entry: what, where, and what to do; once the disk reads again all is as before."""
    wanted = generated(model)
    for _ in range(2):
        disk.failures = 1 << 30
        for _ in range(2):
            with pytest.raises(DiskError) as told:
                entry(model)
            said = str(told.value)
            assert ": Input/output error, twice, where " in said
            assert said.endswith("and the model can go on: ask for the same again")
            assert "packed.bin" in said or "weights.safetensors" in said
        disk.failures = 0
        assert generated(model) == wanted


@ENTRIES
def test_a_model_that_was_closed_says_so(
    entry: Callable[[einfold.Model], object], model: einfold.Model
) -> None:
    generated(model)
    for _ in range(2):
        model.engine.runner.close()  # type: ignore[attr-defined]
        with pytest.raises(ArtifactError, match=r"was closed, .*: load it again"):
            entry(model)


def test_a_step_that_finds_its_reader_closed_is_told(
    model: einfold.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another thread closes the model while a step runs."""
    runner: Any = model.engine.runner
    run, ran = runner._run, []

    def closing(*arguments: Any) -> object:
        ran.append(arguments[0].name)
        if len(ran) == 3:
            runner.close()
        return run(*arguments)

    monkeypatch.setattr(runner, "_run", closing)
    with pytest.raises(ArtifactError, match="ended; load the artifact again"):
        generated(model)
