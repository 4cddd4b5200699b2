"""What placements are judged by: one simulator for all, real layouts, and an optimum that is one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import einfold
from benchmarks.placement import cases
from benchmarks.placement.__main__ import budgets, of_mode
from benchmarks.placement.baselines import BASELINES, measured
from benchmarks.placement.cases import (
    DEVICES,
    SHAPES,
    Case,
    Shape,
    cut_of,
    random_case,
    shaped,
)
from benchmarks.placement.exact import bound, cp_sat, fastest
from benchmarks.placement.simulator import Access, Read, Window, of_plan, seconds
from einfold.compiler.codegen.onnx import cut
from einfold.compiler.ir.device import Device
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.timeline import timeline_of

from .. import models

SEEDS, PARTS, ON = (
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 2, 3, 4]),
    st.sampled_from([*DEVICES]),
)


def drawn(seed: int, part: int) -> tuple[Case, int]:
    case = random_case(seed)
    return case, [budget for _, budget in budgets(case)][part]


def test_reads_wait_for_room_and_runs_for_reads() -> None:
    def steps() -> list[list[Access]]:
        return [[Access(1.0, (Read(3.0, 2 * n - 2),)), Access(2.0)] for n in range(9)]

    # A read begins when the first of the step before has run: three seconds, and one of the run.
    assert seconds(steps(), before=3, told=4) == pytest.approx(4.0)
    late = [[Access(1.0, (Read(3.0, late=True),)), Access(2.0)] for _ in range(9)]
    assert seconds(late, before=3, told=4) == pytest.approx(6.0)


def test_a_window_lets_go_of_the_first() -> None:
    window = Window(10)
    assert [
        window.after(*each) for each in (("a", 6, 0), ("b", 4, 1), ("c", 5, 2), ("d", 1, 3))
    ] == [
        -1,
        -1,
        0,
        -1,
    ]
    assert window.after("c", 1, 4) == 2  # what is there is not read into


@given(SEEDS, PARTS, ON)
def test_plans_take_what_their_timelines_say(seed: int, part: int, device: str) -> None:
    case, budget = drawn(seed, part)
    plan = place(of_mode(case), budget, DEVICES[device])
    found = seconds(of_plan(plan, DEVICES[device]), before=3, told=1)
    assert found == pytest.approx(timeline_of(plan, DEVICES[device]).seconds)


@settings(max_examples=60, deadline=None)
@given(SEEDS, PARTS, ON)
def test_einfold_is_never_behind_a_baseline_with_its_constraints(
    seed: int, part: int, name: str
) -> None:
    case, budget = drawn(seed, part)
    load, device = of_mode(case), DEVICES[name]
    plan = place(load, budget, device)
    own = seconds(of_plan(plan, device))
    assert own >= bound(load, budget, device) * (1 - 1e-6)
    for other in BASELINES:
        found = measured(other, load, budget, case.paged, device, plan.beside)
        if other != "rotating" and found is not None:
            assert own <= found * 1.001, other


@pytest.mark.parametrize("seed", [0, 1, 4, 5])
def test_small_cases_are_within_an_eighth_of_the_fastest_plan_of_whole_super_ops(seed: int) -> None:
    """Where steps wait, the order tells, and not bytes alone: with pages they are mostly faster."""
    case = random_case(seed)
    for (_, budget), device in zip(
        budgets(case), (*DEVICES.values(), *DEVICES.values()), strict=False
    ):
        plan = place(of_mode(case), budget, device)
        whole = fastest(of_mode(case), budget, case.paged, device, plan.beside)
        own = seconds(of_plan(plan, device))
        assert whole is not None
        assert own <= whole * 1.125


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_einfold_moves_as_few_bytes_as_the_optimum(seed: int) -> None:
    """By CP-SAT, of parts where there are pages; a byte for each super-op is lost to rounding."""
    pytest.importorskip("ortools")
    slow = Device(disk_bandwidth=1e6, source="case")  # the disk alone tells
    for part in range(5):
        case, budget = drawn(seed, part)
        plan = place(of_mode(case), budget, slow)
        if case.routed:
            continue  # what experts read is no sum
        found = cp_sat(of_mode(case), budget, case.paged, case.paged, 20, plan.beside)
        assert found is not None
        if found.proved:
            assert plan.moved <= found.plan.moved + len(plan.pieces)


def test_the_bound_is_what_memory_has_no_room_for() -> None:
    case = shaped("0.5B", "fp32")
    load = of_mode(case)
    weights = sum(piece.nbytes for piece in load.paged)
    budget = load.fixed.total + weights // 4
    slow, quick = Device(), Device(disk_bandwidth=1e15)
    assert bound(load, budget, slow) == pytest.approx(
        0.75 * weights / slow.disk_bandwidth, rel=0.01
    )
    assert bound(load, budget, quick) == pytest.approx(weights / slow.ram_bandwidth, rel=0.01)


@pytest.mark.parametrize(("weights", "halved"), [("fp32", False), ("int4", True)])
def test_layouts_of_shapes_are_those_of_real_cuts(
    weights: str, halved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers, to the byte; an embedding and a head that are turned have a few numbers more."""
    if halved:
        monkeypatch.setattr(cut, "LEAST_HALVED", 0)
        monkeypatch.setattr(cases, "LEAST_HALVED", 0)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    monkeypatch.setitem(SHAPES, "tiny", Shape(2, 128, 256, 4, 2, 32, 128))
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    source, few = (
        models.save("llama", tmp_path / "model", **sizes),
        {"calibration": {"tokens": 256}},
    )
    einfold.compile(source, tmp_path / "out", weights=weights, recipe=few, check=False)
    found, real = shaped("tiny", weights, 256), cut_of(tmp_path / "out")
    assert [p.name for p in real.load.pieces[:3]] == [p.name for p in found.load.pieces[:3]]
    pairs = [(found.load.pieces, real.load.pieces)]
    if real.paged:
        pairs.append((found.load.paged, real.load.paged))
    for own, other in pairs:
        assert own[1:3] == other[1:3]
    if real.load.slots:
        of_disk = {"stage": 0, "file": 0}  # in whole pages
        slots = [replace(load.slots[1], **of_disk) for load in (found.load, real.load)]
        assert slots[0] == slots[1]


def test_it_is_run_and_told() -> None:
    command = [sys.executable, "-m", "benchmarks.placement", "--random", "2", "--seconds", "0"]
    command += ["--cases", "random"]
    ran = subprocess.run(
        [*command, "--rows"], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert ran.stdout.count("| random 0, pages |") == 15
    assert "| random, packed in steps | 15 |" in ran.stdout
    told = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=300, check=True
    )
    assert len(json.loads(told.stdout)) == 30
