"""`fold`: derive, check, remember. Derived plans are kept on disk, keyed by the cascade's text.

A file holds the plans as text that the project's own parser reads; nothing in it is evaluated. What is
read is run on numbers beside its cascade before it is used: a damaged plan is dropped and derived again.
The key has the version of the derivation in it, so that a better derivation never meets an older one's plans.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from ....errors import stop_on
from ...ir.cascade.canonical import Names, canonical, rename_plan
from ...ir.cascade.cascade import Cascade
from ...ir.cascade.plan_text import parse_plan, print_plan
from ...ir.cascade.printer import print_cascade
from ...ir.kept import cache_home, read_json, write_json
from .check import (
    WrongFoldError,
    check_again,
    check_corrections,
    check_numbers,
    dead_rows_agree,
)
from .edges import with_dead_rows
from .fold import Folding, Refusal, derive
from .passes import count_passes

#: Part of every key: raised whenever the derivation or the text of plans changes.
VERSION = 2


def fold(cascade: Cascade, rank: str, cache: Path | None = None) -> Folding:
    """The checked folding of a cascade over a rank, from the cache (`cache` or the user's) if it is known.

    A plan that fails its checks is never returned: the folding then is a refusal that says so. Raises
    IRError where the cascade breaks a rule of the IR.
    """
    plain, names = canonical(cascade.pruned())
    text = f"{VERSION}\n{names.rank(rank)}\n{print_cascade(plain)}"
    key = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
    path = (cache or cache_home() / "plans") / f"{key}.json"
    found = _load(path, text, plain, names.rank(rank))
    if found is None:
        try:
            found = derive_checked(plain, names.rank(rank))
        except WrongFoldError as error:
            return _refused(
                cascade, rank, f"einfold's own check rejected the derived plan: {error}"
            )
        _store(path, text, found)
    return _renamed(found, names.backwards(), cascade)


def derive_checked(cascade: Cascade, rank: str) -> Folding:
    """`derive` and all its checks, without the cache. Raises WrongFoldError where one fails."""
    cascade = cascade.pruned()
    found = derive(cascade, rank)
    if not dead_rows_agree(cascade, found.plans):
        found = replace(found, plans=tuple(with_dead_rows(plan) for plan in found.plans))
        if not dead_rows_agree(cascade, found.plans):
            return _refused(
                cascade, rank, "rows without a live key would not give what the statements give"
            )
    for plan in found.plans:
        check_corrections(plan)
    check_numbers(cascade, found.plans)
    return found


def _refused(cascade: Cascade, rank: str, reason: str) -> Folding:
    """A folding without plans: the cascade stays as it is written."""
    before = count_passes(cascade, rank)
    return Folding(rank, (), (Refusal("", "", reason),), before, before)


def _renamed(folding: Folding, names: Names, cascade: Cascade) -> Folding:
    plans = tuple(rename_plan(plan, names, cascade.ranks) for plan in folding.plans)
    refusals = tuple(
        Refusal(*(_in_words(text, names) for text in (r.statement, r.factor, r.reason)))
        for r in folding.refusals
    )
    return replace(folding, rank=names.rank(folding.rank), plans=plans, refusals=refusals)


def _in_words(text: str, names: Names) -> str:
    """A sentence under the cascade's own names."""

    def word(match: re.Match[str]) -> str:
        found = match.group(0)
        return names.tensor(found) if found.split(".")[0] in names.tensors else names.rank(found)

    return re.sub(r"\b[abr]\d+(?:\.\w+)*\b", word, text)


def _load(path: Path, text: str, cascade: Cascade, rank: str) -> Folding | None:
    try:
        data = read_json(path)
        if data is None or data["cascade"] != text or data["rank"] != rank:
            return None
        plans = tuple(parse_plan(plan) for plan in data["plans"])
        refusals = tuple(Refusal(*refusal) for refusal in data["refusals"])
        if plans:
            check_again(cascade, plans)
        return Folding(rank, plans, refusals, int(data["before"]), int(data["after"]))
    except Exception as error:
        stop_on(error)
        # Of another make, or wrong in whatever way: derived again and written anew.
        return None


def _store(path: Path, text: str, folding: Folding) -> None:
    data = {
        "cascade": text,
        "rank": folding.rank,
        "before": folding.passes_before,
        "after": folding.passes_after,
        "plans": [print_plan(plan) for plan in folding.plans],
        "refusals": [[r.statement, r.factor, r.reason] for r in folding.refusals],
    }
    write_json(path, data)
