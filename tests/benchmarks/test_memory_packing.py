"""Packing as a benchmark: folders of problems, what it writes and ends with; the public problems."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory_packing
from benchmarks.client import ROOT
from benchmarks.memory_packing import measure, problems

#: Problems as MiniMalloc publishes them, beside the checkout where they are at hand.
PUBLIC = ROOT.parent / "shared" / "memory-challenging"

_TWO_LEVELS = "id,lower,upper,size\n0,0,2,4\n1,2,4,4\n2,0,4,3\n"


def _main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["memory_packing", *words])
    return memory_packing.main()


def test_a_folder_is_packed_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "problems", tmp_path / "results"
    folder.mkdir()
    out.mkdir()
    (folder / "levels.7.csv").write_text(_TWO_LEVELS)
    (folder / "notes.csv").write_text("nothing to pack\n")
    assert _main(monkeypatch, str(folder), "--json", "--out", str(out)) == 0
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert (row["problem"], row["arena"], row["peak"], row["capacity"]) == ("levels.7.csv", 7, 7, 7)
    assert row["holds"] and row["fits"] and row["proved"]
    assert "notes.csv names no capacity and is left out" in said.err
    page, document = sorted(out.iterdir(), key=lambda file: file.suffix, reverse=True)
    assert json.loads(document.read_text()) == [row]
    assert "levels.7.csv" in page.read_text() and "omnimalloc" in page.read_text()


def test_what_cannot_fit_ends_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "levels.6.csv").write_text(_TWO_LEVELS)
    assert _main(monkeypatch, str(tmp_path), "--json", "--seconds", "1") == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["holds"] is False or row["fits"] is False
    assert row["arena"] >= 7


@pytest.mark.parametrize("path", sorted(PUBLIC.glob("*.csv")), ids=lambda path: path.name)
def test_each_public_problem_fits_in_ten_seconds_of_a_processor(path: Path, tmp_path: Path) -> None:
    (tmp_path / path.name).write_bytes(path.read_bytes())
    ((name, buffers, capacity),) = problems(tmp_path)
    row = measure(name, buffers, capacity, 10)
    assert row.holds and row.fits
    assert row.peak <= row.arena <= capacity
