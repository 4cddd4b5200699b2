"""A policy that lives in this file alone: it compiles, runs and is accounted for as the product's are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from einfold.compiler.ir.kv.attention_sums import host
from einfold.compiler.ir.kv.keep.policy import POLICIES, Ints, Policy, Row, best_slots
from einfold.compiler.ir.kv.sizes import Size, least
from einfold.errors import RecipeError

from .. import models
from . import common

TOKENS = [3 + (7 * place) % 90 for place in range(60)]


@dataclass(frozen=True)
class ShortKeys(Policy):
    """Keeps the newest tokens, and of the others those with the shortest keys (Devoto et al. 2024)."""

    short: int = 8
    recent: int = 8
    slack: int = 8

    name = method = "short_keys"

    @property
    def lead(self) -> int:
        return self.short

    @property
    def newest(self) -> int:
        return self.recent

    @property
    def waiting(self) -> int:
        return self.slack

    @property
    def exact(self) -> bool:
        return True

    def slots(self, capacity: Size) -> Size:
        return least(capacity, self.short + self.recent + self.slack)

    def says(self) -> str:
        return f"{self.short} short keys and {self.recent} recent tokens"

    def staying(self, row: Row, used: int, leaving: int) -> Ints:
        older = used - self.recent
        length_KT = np.linalg.norm(host(row["key"])[:, :older], axis=-1)
        return best_slots(-length_KT, older - leaving, used, self.recent)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with POLICIES.with_one_more(ShortKeys):
        yield


def test_it_keeps_to_what_holds_for_all() -> None:
    layout = common.layout_of(ShortKeys(4, 4, 4))
    common.check_text(layout)
    common.check_account(layout)
    common.check_method("prune", "short_keys", short=3)


def test_targets_agree(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    cache = {"prune": {"method": "short_keys"}}
    by = {
        target: common.logits_of(folder, tmp_path / target, target, cache, TOKENS)
        for target in ("reference", "onnx")
    }
    np.testing.assert_allclose(by["onnx"], by["reference"], atol=1e-4)
    whole = common.logits_of(folder, tmp_path / "whole", "onnx", {}, TOKENS)
    assert np.abs(whole - by["onnx"]).max() > 1e-3  # it did let tokens go
    roomy = {"prune": {"method": "short_keys", "short": 100}}
    roomy_logits = common.logits_of(folder, tmp_path / "roomy", "onnx", roomy, TOKENS)
    np.testing.assert_allclose(roomy_logits, whole, atol=1e-4)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="short_keys takes short, recent, slack"):
        common.logits_of(
            folder, tmp_path / "out", "onnx", {"prune": {"method": "short_keys", "long": 3}}, TOKENS
        )
    with pytest.raises(RecipeError, match="nothing would be pruned"):
        common.logits_of(
            folder,
            tmp_path / "out",
            "onnx",
            {"prune": {"method": "short_keys", "short": 300}},
            TOKENS,
        )
