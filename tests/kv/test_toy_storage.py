"""A storage that lives in this file alone: sizes, codec and a kernel's stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.store.packed import Packed, Pieces
from einfold.compiler.ir.kv.store.storage import STORAGES, GroupShape, Piece
from einfold.compiler.ir.kv.streams import AT, Source, Stream
from einfold.errors import RecipeError

from .. import models
from ..codegen.triton.conftest import asking, needs_triton
from . import common

TOKENS = [3 + (7 * place) % 90 for place in range(60)]


class HalvesCodec:
    @staticmethod
    def encode(storage: Packed, keys_KTD: Tensor, values_KTD: Tensor, seen: Any) -> Pieces:
        return {
            f"{part}_half": x.unflatten(1, (-1, storage.granule)).half()
            for part, x in (("key", keys_KTD), ("value", values_KTD))
        }

    @staticmethod
    def decode(storage: Packed, pieces: Pieces) -> tuple[Tensor, Tensor]:
        return pieces["key_half"].float(), pieces["value_half"].float()


@dataclass(frozen=True)
class Halves(Packed):
    """Packs older tokens into float16, four at a time."""

    residual: int = 8

    name = method = "halves"

    @property
    def granule(self) -> int:
        return 4

    @property
    def codec(self) -> Any:
        return HalvesCodec

    def streams(self, shape: GroupShape) -> dict[str, Stream]:
        made = Stream(self.granule)
        made.key, made.value = (
            made.add(Source(f"{part}_half", f"{part}_half", AT[part])) for part in ("key", "value")
        )
        return {"": made}

    def check(self, shape: GroupShape) -> None:
        """Heads of any size."""

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part in ("key", "value"):
            yield Piece(f"{part}_half", self.granule, shape.size(part), "f16")


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with STORAGES.with_one_more(Halves):
        yield


def test_it_keeps_to_what_holds_for_all() -> None:
    layout = common.layout_of(Full(), Halves(slack=5))
    common.check_text(layout)
    common.check_account(layout)
    common.check_method("quant", "halves", slack=9)


def test_it_runs_by_the_reference_and_onnx_refuses_it(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    cache = {"quant": {"method": "halves", "slack": 8}}
    found = common.logits_of(folder, tmp_path / "packed", "reference", cache, TOKENS)
    whole = common.logits_of(folder, tmp_path / "whole", "reference", {}, TOKENS)
    assert 1e-7 < np.abs(found - whole).max() < 2e-2  # float16 was read
    with pytest.raises(RecipeError, match=r"halves: .*no operator that reads what halves stores"):
        common.logits_of(folder, tmp_path / "onnx", "onnx", cache, TOKENS)


@needs_triton
@pytest.mark.slow
def test_kernels_read_it(tmp_path: Path) -> None:
    """This file is the process with the interpreter, so that the toy is registered there too."""
    with asking("tests.kv.test_toy_storage", tmp_path) as ask:
        for new, parts in ((1, 1), (3, 2)):
            found = ask(storage=Halves().text, new=new, parts=parts, sinks=True)
            assert found["error"] < 1e-5
            assert found["same slots"]
            assert found["kernels"] == 2


if __name__ == "__main__":
    from ..codegen.triton.packed_worker import answer
    from ..codegen.triton.worker import serve

    STORAGES.register(Halves)
    serve(answer)
