"""What attention-gym hides and does to scores: it folds to one pass, and is fused on ONNX or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import einfold
from einfold.compiler.fuse.explain import explain_function

from .conftest import load
from .gym import OF_HEADS, ROWS, Modification

CATALOGUE = load("attention_forms")
EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@EVERY
def test_it_folds_to_one_pass(row: Modification, plan_cache: Path) -> None:
    report = explain_function(row.function, row.inputs(), plan_cache)
    assert (report.status, report.passes_before, report.passes_after) == ("fused", 3, 1)


def on_onnx(row: Modification, portable: bool) -> str:
    """Why a row stays as written on ONNX, "" where it is fused."""
    module = CATALOGUE.AsModule(row.function)
    (found,) = einfold.explain_export(module, row.inputs(), portable=portable).cascades
    assert (found.status == "fused") == (not found.reason)
    return str(found.reason)


@EVERY
def test_the_default_flavour_takes_it_or_says_why_not(row: Modification) -> None:
    reason = on_onnx(row, False)
    assert row.left in reason and bool(row.left) == bool(reason)


@pytest.mark.slow
@EVERY
def test_the_portable_flavour_too(row: Modification) -> None:
    reason = on_onnx(row, True)
    left = "" if row.left == OF_HEADS else row.left
    assert left in reason and bool(left) == bool(reason)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])
def test_it_computes_what_it_did(row: Modification, portable: bool, tmp_path: Path) -> None:
    """The export's own check runs it beside the module."""
    module = CATALOGUE.AsModule(row.function)
    einfold.export_onnx(module, tmp_path / "a", row.inputs(), portable=portable)


def test_the_document_counts_them() -> None:
    text = " ".join(
        (Path(str(CATALOGUE.__file__)).parent / "attention.md").read_text("utf-8").split()
    )
    taken = sum(not row.left for row in ROWS)
    more = sum(row.left == OF_HEADS for row in ROWS)
    assert f"{len(ROWS)} of {len(ROWS)} fold to one pass" in text
    assert f"the default flavour takes {taken}, the portable one {taken + more}" in text
