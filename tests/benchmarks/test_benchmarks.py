"""The parts of the benchmark that only compute: a wrong ratio would be believed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cache_memory import Held, agrees, page
from benchmarks.core_distance import core_distance
from benchmarks.entries import BANDWIDTH, ENTRIES, Entry, choose
from benchmarks.figures import Figures
from benchmarks.quarter_heads import QuarterHeads
from benchmarks.report import data, markdown
from benchmarks.rounds import Journal, Measure, turns
from benchmarks.targets import TARGETS, Target
from benchmarks.workers.llama_state import tile_state
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.program import ModelInfo, Program

MACHINE = {
    "cpu": "A CPU",
    "family": "6-1",
    "cores": "2",
    "flags": "avx2",
    "memory": "24 GiB",
    "python": "3.11",
}


def timed(
    entry: str, measure: str, number: int, seconds: float, tokens: int = 10
) -> dict[str, Any]:
    return {
        "shape": "tiny",
        "entry": entry,
        "measure": measure,
        "round": number,
        "seconds": seconds,
        "tokens": tokens,
    }


def loaded(entry: str, weight_bytes: int, cache_bytes: float) -> dict[str, Any]:
    return {
        "shape": "tiny",
        "entry": entry,
        "measure": "load",
        "round": 0,
        "start": 0.5,
        "load": 0.25,
        "first": 0.125,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
    }


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine is three times slower in the second round; both engines feel it."""
    records = [
        timed("a", "d16", 0, 1.0),
        timed("b", "d16", 0, 2.0),
        timed("a", "d16", 1, 3.0),
        timed("b", "d16", 1, 6.0),
        timed("a", "d16", 2, 1.0),  # b failed in the last round
    ]
    figures = Figures(records, "tiny")
    assert figures.ratio("a", "b", "d16") == 2.0
    assert figures.rate("a", "d16") == 10.0
    assert figures.ratio("a", "absent", "d16") is None
    assert Figures(records, "other").ratio("a", "b", "d16") is None


def test_the_roofline_counts_weights_and_the_cache_of_the_context() -> None:
    records = [
        loaded(BANDWIDTH, 1000, 0),
        timed(BANDWIDTH, "d16", 0, 1.0),
        loaded("a", 100, 25.0),
        timed("a", "d16", 0, 10.0, tokens=10),
    ]
    assert Figures(records, "tiny").roofline("a", "d16") == pytest.approx((100 + 16 * 25) / 1000)
    assert Figures(records, "tiny").load("a", whole=True) == 0.875


def test_every_engine_begins_a_round_in_its_turn() -> None:
    entries = [Entry(name, "", None, "") for name in ("a", "b", "c")]
    entries.append(Entry(BANDWIDTH, "", None, ""))
    orders = [[e.name for e in turns(entries, Measure(8), number)] for number in range(4)]
    assert orders[0] == [BANDWIDTH, "a", "b", "c"]
    assert orders[1] == [BANDWIDTH, "b", "c", "a"]
    assert [order[1] for order in orders] == ["a", "b", "c", "a"]


def test_an_engine_is_not_asked_for_longer_contexts_than_it_declares() -> None:
    entries = [Entry("short", "", None, "", longest=128), Entry("long", "", None, "")]
    assert [e.name for e in turns(entries, Measure(8, 4096), 0)] == ["long"]
    assert len(turns(entries, Measure(8, 128), 0)) == 2
    assert len(turns(entries, Measure(512), 0)) == 2


def test_targets_are_judged_the_right_way_round() -> None:
    assert Target("", "load", "a", 0.7).met(0.6)
    assert not Target("", "load", "a", 0.7).met(0.8)
    assert Target("", "ratio", "a", 1.25).met(1.3)
    names = {entry.name for entry in ENTRIES}
    for target in TARGETS:
        assert {target.entry, *target.peer.split("|")} - {""} <= names


def test_a_journal_goes_on_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal.open(path, resume=False)
    journal.add(entry="a", measure="d16", round=0)
    with path.open("a") as stream:
        stream.write('{"entry": "a", "meas')
    again = Journal.open(path, resume=True)
    assert again.has(entry="a", measure="d16", round=0)
    assert not again.has(entry="a", round=1)
    again.add(entry="a", measure="d16", round=1)
    assert len(Journal.open(path, resume=True).records) == 2
    assert not Journal.open(path, resume=False).records


def test_a_peer_that_is_missing_is_told_in_the_page() -> None:
    records = [
        timed("einfold int4", "d16", 0, 2.0),
        {
            "shape": "tiny",
            "entry": "genai int4",
            "measure": "skipped",
            "reason": "onnxruntime_genai is not installed",
        },
    ]
    page = markdown(records, MACHINE, "title")
    assert "genai int4 left out: onnxruntime_genai is not installed" in page
    assert "| einfold int4 | 5 |" in page
    plain = data(records, MACHINE)
    assert plain["shapes"]["tiny"]["ratios"]["einfold int4"]["genai int4"] == {"d16": None}


def test_entries_are_chosen_by_words() -> None:
    assert [e.name for e in choose(["inductor"])] == [BANDWIDTH, "inductor bf16"]
    assert [e.name for e in choose(["Einfold int4"])] == [BANDWIDTH, "einfold int4"]  # a whole name
    assert len(choose([])) == len(ENTRIES)
    with pytest.raises(ValueError, match="no entry is called 'vllm'"):
        choose(["vllm"])


def saved_state(rows: list[bytes]) -> bytes:
    """A state of llama.cpp with one layer, whose K and V rows are given."""
    cells = b"".join(struct.pack("<iIi", p, 1, 0) for p in range(len(rows)))
    part = struct.pack("<iq", 1, len(rows[0])) + b"".join(rows)
    counts = struct.pack("<II", 1, len(rows))
    return b"headerxx" + counts + cells + struct.pack("<II", 0, 1) + part + part


def test_a_saved_state_is_made_longer() -> None:
    short = saved_state([b"aa", b"bb", b"cc"])
    assert bytes(tile_state(short, 3, 7)) == saved_state(
        [b"aa", b"bb", b"cc", b"aa", b"bb", b"cc", b"aa"]
    )
    assert bytes(tile_state(short, 3, 3)) == short


def test_a_state_of_another_layout_is_refused() -> None:
    short = saved_state([b"aa", b"bb"])
    with pytest.raises(ValueError, match="1 stream of 3 cells"):
        tile_state(short, 3, 7)
    with pytest.raises(ValueError, match="left over"):
        tile_state(short + b"more", 2, 7)


def test_memory_agrees_by_difference() -> None:
    full = Held("full, f32", 400_000_000, 420_000_000, 400_000_000, 420_000_000)
    small = Held("small", 500_000_000, 524_000_000, 100_000_000, 131_000_000)
    assert agrees(full.peak, small.peak, full.accounted_peak, small.accounted_peak)
    assert agrees(full.steady, small.steady, full.accounted_steady, small.accounted_steady)
    assert not agrees(full.steady, small.steady + 5_000_000, 400_000_000, 100_000_000)
    text = page([full, small], "tiny", 16384, "title")
    assert (
        "| small | 500.0 | 524.0 | -100.0 | -104.0 | yes | 100.0 | 131.0 | 300.0 | 289.0 | yes |"
        in text
    )


def test_the_best_of_several_peers_is_the_one_to_beat() -> None:
    records = [timed("ours", "d16", 0, 1.0), timed("p", "d16", 0, 2.0), timed("q", "d16", 0, 1.5)]
    target = Target("the best", "ratio", "ours", 1.4, "d16", "p|q|absent", "tiny")
    assert target.value(Figures(records, "tiny")) == pytest.approx(1.5)


def test_a_quarter_of_the_heads_keeps_all() -> None:
    heads = [LayerCache(n, 2, 8, 8, (HeadGroup((0, 1)),)) for n in range(4)]
    found = Program(ModelInfo("test", 11, 64), layout=CacheLayout(tuple(heads)))
    QuarterHeads().run(found)
    assert found.layout is not None
    groups = [
        (layer.layer, group.heads, group.policy.name) for layer, _, group in found.layout.groups()
    ]
    kept = [(layer, head) for layer, heads, name in groups if name == "full" for head in heads]
    assert kept == [(0, 0), (2, 0)]
    assert (1, (0, 1), "window") in groups


def test_core_distance_is_of_a_cache_line() -> None:
    """From a hit in a shared cache to a trip over a socket; nothing where it cannot be had."""
    found = core_distance()
    assert found is None or 2 < found < 20_000
