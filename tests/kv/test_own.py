"""Every policy, storage and reader of the product keeps to what holds for all."""

from __future__ import annotations

import pytest

from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.policy import POLICIES
from einfold.compiler.ir.kv.read.reader import READERS
from einfold.compiler.ir.kv.store.storage import STORAGES
from einfold.compiler.passes.cache_methods import FAMILIES

from . import common

#: Options that let tokens go within the texts here.
POLICY_OPTIONS = {
    "full": {},
    "window": {"sinks": 2, "recent": 5, "slack": 4},
    "heavy_hitters": {"tokens": 9, "recent": 4, "slack": 4},
    "retained": {"tokens": 9, "recent": 4, "sinks": 2, "slack": 4},
    "merged": {"tokens": 9, "recent": 4, "slack": 4},
    "pivotal": {"tokens": 9, "recent": 4, "slack": 4, "queries": 2},
    "matched": {"tokens": 9, "recent": 4, "slack": 4},
    "runs": {"tokens": 9, "recent": 4, "slack": 4, "apart": 1},
    "voted": {"tokens": 9, "observe": 4, "slack": 4, "queries": 2},
    "crushed": {"tokens": 9, "observe": 4, "slack": 4, "queries": 2},
    "anchored": {"tokens": 9, "offset": 4, "sinks": 2, "slack": 4},
    "expected": {"tokens": 9, "recent": 4, "sinks": 2, "slack": 4, "queries": 2},
}
STORAGE_OPTIONS = {
    "plain": {"dtype": "f16"},
    "kivi": {"group": 8, "residual": 8, "slack": 4},
    "turboquant": {"group": 8, "residual": 8, "slack": 4, "sinks": 2},
    "gear": {"group": 8, "residual": 8, "slack": 4, "tokens": 16},
    "zipcache": {"tokens": 16, "slack": 4},
    "mikv": {"tokens": 16, "slack": 4, "group": 8, "residual": 4, "share": 0.5},
    "abq": {"tokens": 4, "slack": 4, "block": 8},
    "mustafar": {"tokens": 4, "slack": 4, "residual": 4},
    "minicache": {"group": 8, "residual": 4, "slack": 4},
}
READER_OPTIONS = {
    "everything": {},
    "quest": {"page": 4, "tokens": 12},
    "shadowkv": {"page": 4, "tokens": 12, "outliers": 2},
}


def test_all_of_them_are_tried() -> None:
    """But for CSKV's features, which go with a window."""
    assert set(POLICIES) == set(POLICY_OPTIONS)
    assert set(STORAGES) == {*STORAGE_OPTIONS, "low_rank"}
    assert set(READERS) == set(READER_OPTIONS)


@pytest.mark.parametrize("name", POLICY_OPTIONS)
def test_policies(name: str) -> None:
    layout = common.layout_of(POLICIES[name](**POLICY_OPTIONS[name]))
    common.check_text(layout)
    common.check_account(layout)


def test_each_policy_says_what_it_keeps() -> None:
    told = {name: POLICIES[name](**options).says() for name, options in POLICY_OPTIONS.items()}
    assert len(set(told.values())) == len(told)
    assert told["merged"] == "5 centres, which others merge into, and 4 recent tokens"


@pytest.mark.parametrize("name", STORAGE_OPTIONS)
def test_storages(name: str) -> None:
    layout = common.layout_of(Full(), STORAGES[name](**STORAGE_OPTIONS[name]))
    common.check_text(layout)
    common.check_account(layout)


@pytest.mark.parametrize("name", READER_OPTIONS)
def test_readers(name: str) -> None:
    reader = READERS[name](**READER_OPTIONS[name])
    layout = common.layout_of(Full(), reader=reader)
    common.check_text(layout)
    common.check_account(layout)
    assert reader.reads(10) == 10  # few enough to be read whole
    assert all(
        layout.read_bytes(2, tokens) <= int(layout.bytes(2, tokens)) for tokens in (1, 33, 90)
    )


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, known in FAMILIES.items() for name in known]
)
def test_methods(family: str, name: str) -> None:
    common.check_method(family, name)
