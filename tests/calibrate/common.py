"""What holds for every observer, whoever brings it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.calibrate.observer import Found, Observer
from einfold.compiler.calibrate.sites import Site
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.calibrate.stream import Later, stream
from einfold.compiler.ir.program import Program
from einfold.errors import CalibrationError, IRError

from ..programs import program

#: Two layers of attention with rotated keys, and the head of a language model.
BODY = """
    weight @e : f32[11, 16]
    weight @cos : f32[64, 2]
    weight @sin : f32[64, 2]
    weight @w.weight : f32[16, 16]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %rows "logit_rows" : i64[N]
    read %e "e" : f32[11, 16]
    read %c "cos" : f32[64, 2]
    read %s "sin" : f32[64, 2]
    read %w "w.weight" : f32[16, 16]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %x = einfold.linear(%h, %w, none) : f32[B, S, 16]
    call %v = aten.unflatten.int(%x, -1, [4, 4]) : f32[B, S, 4, 4]
    call %k = einfold.rotary(%v, %pos, %c, %s, false) : f32[B, S, 4, 4]
    call %o = einfold.attention(%k, %k, %v, none, 0, 0.5, 0, 0.0) : f32[B, S, 4, 4]
    call %k2 = einfold.rotary(%o, %pos, %c, %s, false) : f32[B, S, 4, 4]
    call %o2 = einfold.attention(%k2, %k2, %o, none, 1, 0.5, 5, 3.0) : f32[B, S, 4, 4]
    call %f = aten.flatten.using_ints(%o2, -2, -1) : f32[B, S, 16]
    call %r = einfold.select_rows(%f, %rows) : f32[N, 16]
    call %l = einfold.linear(%r, %e, none) : f32[N, 11]
    output "logits" = %l
"""
TEXT = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(5))

Make = Callable[[], Observer]


def equal(one: dict[str, Found], two: dict[str, Found]) -> bool:
    return one.keys() == two.keys() and all(
        one[site].keys() == two[site].keys()
        and all(torch.equal(one[site][name], two[site][name]) for name in one[site])
        for site in one
    )


def sample(make: Make, found: Program) -> Tensor:
    own = make().sample(found)
    return TEXT if own is None else own[0]


def check_found(make: Make) -> dict[str, Found]:
    """Something finite at each of its sites; the same each time, and from the model as it was."""
    found = program(BODY)
    names = [site.name for site in make().sites(found)]
    assert names and len(set(names)) == len(names)
    assert not [name for name in names if "/" in name or name.startswith(".")]
    tokens = sample(make, found)
    text = stream(found, tokens, [make()])
    assert set(text) == set(names)
    assert all(bool(torch.isfinite(x).all()) for at in text.values() for x in at.values())
    later = Later(found, [make()])
    with pytest.raises(IRError, match="asked for before calibration"):
        later.at(names[0])
    for name in list(found.weights):
        found.weights.discard(name)  # what later passes do to the weights is not seen
    later.run(tokens)
    assert equal({name: later.at(name) for name in names}, text)
    assert later.at("nowhere") == {}
    return text


def check_kept(make: Make, folder: Path) -> None:
    """A run that was interrupted goes on, and ends as one that was not; then nothing is read again."""
    found = program(BODY)
    tokens, seen = sample(make, found), []
    want = stream(found, tokens, [make()])
    observer = make()
    begin = observer.begin

    def interrupted(site: Site, *values: Any) -> None:
        seen.append(site.name)
        if len(seen) == len(want):
            raise KeyboardInterrupt
        begin(site, *values)

    observer.begin = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stream(found, tokens, [observer], folder)
    got = stream(found, tokens, [observer], folder)
    assert len(seen) == len(want) + 1 and equal(got, want)
    assert equal(stream(found, tokens, [observer], folder), want)
    assert len(seen) == len(want) + 1


def check_asked(make: Make, folder: Path) -> None:
    """A pass asks for it; it is measured once, and found again by model, graph and text."""
    told: list[str] = []

    def measured(place: Path | None) -> tuple[int, int]:
        told.clear()
        asked = Statistics(
            lambda: (TEXT, "a text"), lambda: "m", place, lambda text, share: told.append(text)
        )
        first = asked.of(program(BODY), make())
        assert asked.of(program(BODY), make()) is first and len(asked.read) == 1
        return len(told), len(first)

    once, sites = measured(folder)
    assert once == sites and measured(folder) == (0, sites)
    assert measured(None) == (sites, sites) and len(list(folder.iterdir())) == 1


def check_refused(make: Make) -> None:
    """Numbers that are not finite are a sentence."""
    table = torch.randn(11, 16)
    table[3, 12] = float("nan")
    with pytest.raises(CalibrationError, match="not finite on the calibration text"):
        stream(program(BODY, e=table), torch.full((2, 24), 3), [make()])
