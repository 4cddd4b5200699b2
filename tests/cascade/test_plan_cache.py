"""Plans on disk: the same under other names, quick to read, never trusted further than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from einfold.compiler.analysis.cascade import plans
from einfold.compiler.analysis.cascade.check import WrongFoldError
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.plan_text import parse_plan, print_plan
from einfold.compiler.ir.kept import read_json, write_json
from einfold.errors import IRError

from .test_check import MOMENTS
from .texts import NAIVE


def kept_in(path: Path) -> dict[str, Any]:
    data = read_json(path)
    assert data is not None
    return data


@pytest.mark.parametrize("text", [NAIVE, MOMENTS])
def test_a_plan_comes_back_as_it_was(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = parse(text)
    first = plans.fold(cascade, "t", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(plans, "derive_checked", None)  # deriving again would fail
    assert plans.fold(cascade, "t", tmp_path) == first


def test_other_names_and_sizes_are_the_same_cascade(tmp_path: Path) -> None:
    plans.fold(parse(NAIVE), "t", tmp_path)
    other = NAIVE.replace("SD", "total").replace(" : T", " : 4096").replace("GM", "top")
    other = other.replace("rank s", "rank q").replace("[s", "[q")
    found = plans.fold(parse(other), "t", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert found.plan is not None
    assert [state.name for state in found.plan.states] == ["top", "total", "AV.0"]
    assert found.plan.ranks["t"].extent == "4096"


def test_refusals_are_kept_under_the_cascade_s_own_names(tmp_path: Path) -> None:
    text = NAIVE.replace("SN[s, t] / SD[s]", "round(SN[s, t] / SD[s])")
    first = plans.fold(parse(text), "t", tmp_path)
    assert first == plans.fold(parse(text), "t", tmp_path)
    assert "with the completed GM, SD" in first.reason


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cascade": "another"}', "plan", "version"])
def test_a_damaged_file_is_derived_again(damage: str, tmp_path: Path) -> None:
    cascade = parse(NAIVE)
    first = plans.fold(cascade, "t", tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "plan":
        data = kept_in(path)
        data["plans"] = ["einfold.plan 1 over t, passes 3 -> 1\nstate M[s] = __import__('os')\n"]
        write_json(path, data)
    elif damage == "version":
        data = kept_in(path)
        data["plans"] = [plan.replace("einfold.plan 1", "einfold.plan 9") for plan in data["plans"]]
        write_json(path, data)
    else:
        path.write_text(damage)
    assert plans.fold(cascade, "t", tmp_path) == first
    assert kept_in(path)["plans"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("correct b6 = b6.old[r0] * exp(b4.ref.old[r0] - b4.ref[r0])\n", ""),
        (":: max(", ":: min("),
        (" scale free", " scale free static 400"),
        ("passes 3 -> 1", "passes 3 -> 1, dead rows zero"),
        ("stream b3[r0, r1] = ", "stream b3[r0, r1] = 2 * "),
        ("input a1", "input a9"),
    ],
)
def test_a_plan_that_reads_and_is_wrong_is_derived_again(
    old: str, new: str, tmp_path: Path
) -> None:
    cascade = parse(NAIVE)
    first = plans.fold(cascade, "t", tmp_path)
    (path,) = tmp_path.iterdir()
    right = path.read_text()
    data = kept_in(path)
    assert old in data["plans"][0]
    data["plans"] = [data["plans"][0].replace(old, new)]
    parse_plan(data["plans"][0])  # it reads: only its meaning gives it away
    write_json(path, data)
    assert plans.fold(cascade, "t", tmp_path) == first
    assert path.read_text() == right


def test_a_plan_that_fails_its_check_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise WrongFoldError("output AV differs")

    monkeypatch.setattr(plans, "check_numbers", fail)
    found = plans.fold(parse(NAIVE), "t", tmp_path)
    assert found.plan is None and not found.plans
    assert "check rejected the derived plan: output AV differs" in found.reason
    assert found.passes_after == 3 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert plans.fold(parse(NAIVE), "t", blocked / "plans").plan is not None


@pytest.mark.parametrize(
    "line",
    [
        "state M[s] = S[s, t]",
        "correct M = M.old[s]",
        "reference M.ref[s] watches M",
        "before x",
        "nothing at all",
    ],
)
def test_text_that_is_no_plan_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(IRError, match="line 2"):
        parse_plan(f"einfold.plan 1 over t, passes 3 -> 1\n{line}\n")


def test_a_plan_s_text_is_stable() -> None:
    plan = plans.derive_checked(parse(NAIVE), "t").plan
    assert plan is not None
    assert print_plan(parse_plan(print_plan(plan))) == print_plan(plan)
