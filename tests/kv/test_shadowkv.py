"""ShadowKV: pages by their landmarks and outliers, and what is kept and accounted for that."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.codegen.triton.target import Triton
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.read.everything import Everything
from einfold.compiler.ir.kv.read.reader import READERS
from einfold.compiler.ir.kv.read.shadowkv.reader import ShadowKV
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.ops.attention import CachedAttention
from einfold.compiler.ir.ops.bounded import BoundedAttention
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError, RecipeError
from einfold.runtime.cache import Cache

from . import common
from .test_quest import call, chosen_as, normal, read


def by_hand(reader: ShadowKV, q_GD: Tensor, keys_TD: Tensor) -> set[int]:
    """The pages that the newest token of one row reads for one KV head, spelled out."""
    pages = list(keys_TD.split(reader.page))
    apart = torch.stack(
        [1 - page.mean(0).norm() ** 2 / page.norm(dim=1).pow(2).mean() for page in pages]
    )
    shares = (q_GD @ torch.stack([page.mean(0) for page in pages]).T).softmax(1)
    found = {0, len(pages) - 2, len(pages) - 1}
    for scores, more in ((apart, reader.outliers), (shares.amax(0), None)):
        most = len(found) + more if more is not None else reader.pages(len(keys_TD))
        for page in scores.argsort(descending=True).tolist():
            if len(found) < most:
                found.add(page)
    return found


@pytest.mark.parametrize("outliers", [0, 2, 5])
def test_the_pages_are_the_outliers_and_those_with_the_best_scores(outliers: int) -> None:
    """Beside what any reader of pages reads: 5 pages of 61 tokens, 4 of 44, of which 3 are always read."""
    reader = ShadowKV(page=4, share=0.3, tokens=0, outliers=outliers)
    counted = [len(pages) - (5, 4)[row] for row, pages in chosen_as(reader, by_hand)]
    assert counted == 4 * [outliers]


def test_an_outlier_is_read_whatever_is_asked() -> None:
    """Opposite keys have a landmark of zeros, which no query asks for: only an outlier is found."""
    keys = torch.zeros(1, 1, 64, 8)
    keys[..., 0] = 1
    keys[0, 0, 20:24, 1] = torch.tensor([9.0, -9.0, 9.0, -9.0])
    q = torch.zeros(1, 1, 1, 1, 8)
    q[..., 1] = 1
    visible = torch.ones(1, 1, 64, dtype=torch.bool)
    for outliers in (0, 1):
        reader = ShadowKV(4, 0.0, 16, outliers=outliers)
        found = reader.choosing.chosen(reader, q, keys, visible)[0, 0, 0]
        assert bool(found[20:24].all()) == bool(found[20:24].any()) == bool(outliers)


def test_codes_are_rounded_and_numbers_go_from_alike_to_not_at_all() -> None:
    keys = torch.tensor([[[127, -3], [127, -4]], [[50, 0], [-50, 0]], [[0, 0], [0, 0]]])
    found = ShadowKV().statistic.of_pages(keys.to(torch.int8)[None, None])[0, 0]
    assert found.tolist() == [[127, -3, 0], [0, 0, 127], [0, 0, 127]]
    assert ShadowKV().statistic.of_pages(keys[None, None].double())[0, 0, 0].tolist()[:2] == [
        127,
        -3.5,
    ]


@pytest.mark.parametrize("scaled", [False, True], ids=["f32", "int8"])
def test_statistics_that_are_kept_are_those_of_their_pages(scaled: bool) -> None:
    """In steps of many sizes, rows of other lengths, and slots that held something else before. Of codes a
    landmark is rounded, so that only those of numbers choose as landmarks found anew."""
    reader = ShadowKV(page=4, share=0.2, tokens=12, outliers=2)
    kind = torch.int8 if scaled else torch.float32
    caches = [(40 * normal(2, 2, 48, 8, seed=seed)).to(kind) for seed in (8, 9)]
    bounds = torch.full((2, 2, 13, 9), 77, dtype=kind)
    others = [cache.clone() for cache in caches]
    for start, end in pairwise([0, 1, 2, 9, 12, 13, 29, 30, 41]):
        lengths, new = [start, start // 2], end - start
        slots = {"key_cache_BKCD": caches[0], "value_cache_BKCD": caches[1]}
        kept = BoundedAttention(**call(reader.text, bounds, lengths, new, scaled), **slots).run()
        slots = {"key_cache_BKCD": others[0], "value_cache_BKCD": others[1]}
        anew = CachedAttention(**call(reader.text, None, lengths, new, scaled), **slots).run()
        if not scaled:
            torch.testing.assert_close(kept, anew)
    for row, length in enumerate((41, 15 + 11)):
        whole = length // 4 * 4
        wanted = ShadowKV().statistic.of_pages(
            caches[0][row, None, :, :whole].unflatten(2, (-1, 4))
        )
        assert torch.equal(bounds[row, :, : length // 4], wanted[0])


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_what_is_kept_beside_slots_is_in_the_account(dtype: str) -> None:
    storage = Plain(dtype, "channel" if dtype == "i8" else "none")
    layouts = [common.layout_of(Full(), storage, each) for each in (ShadowKV(16), Everything())]
    layout, whole = layouts
    common.check_account(layout)
    common.check_text(layout)
    landmarks = 2 * common.HEADS * (common.KEY + 1) * {"f32": 4, "f16": 2, "i8": 1}[dtype]
    assert layout.bytes(1, 160) == int(whole.bytes(1, 160)) + 11 * landmarks
    assert Cache.allocate(layout, 1, 150).nbytes == layout.bytes(1, 160)


def test_bytes_of_a_step_are_what_is_chosen_outliers_and_landmarks() -> None:
    """A layer: 2 heads of 16 + 8 numbers in float32 a token, and 17 a page."""
    layout = common.layout_of(Full(), Plain(), ShadowKV(16, tokens=0, outliers=5))
    assert layout.read_bytes(3, 1600) == 3 * 2 * 2 * 4 * (24 * (208 + 80) + 17 * 101)
    assert [ShadowKV().reads(n) for n in (1, 704, 705, 4096, 8192)] == [1, 704, 704, 704, 1216]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outliers": -1}, "outliers is a number of pages of a head, 0 to 4096, not -1"),
        ({"outliers": 4097}, "0 to 4096, not 4097"),
        ({"tokens": 8}, r"tokens is 0 or at least 3 pages of 4 \(12\), not 8"),
        ({"page": 12}, "shadowkv: a page has a power of two of tokens"),
        ({"share": 0.0, "tokens": 0}, "give a share of the tokens or a number"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(IRError, match=said):
        ShadowKV(**options)
    with pytest.raises(RecipeError, match=r"cache\.read"):
        Recipe.build({"cache": {"read": {"method": "shadowkv", **options}}})


def test_slots_of_half_a_byte_hold_no_landmarks() -> None:
    with pytest.raises(RecipeError, match=r"cache\.read shadowkv keeps statistics of pages in the"):
        Recipe.build({"cache": {"storage": "int4", "read": "shadowkv"}})


def test_layers_behind_the_first_get_the_reader_and_its_landmarks() -> None:
    found, notes = read(ShadowKV(4, 0.25, 12, outliers=2, skip_layers=1))
    assert notes[1][1].endswith(
        "tokens or 12 tokens, or what is more, in pages of 4 and 2 outliers"
    )
    AttachCache().run(found)
    verify(found, deep=True)
    assert found.placeholder("cache.1.0.bounds").meta["val"].shape[3] == 9


def test_every_target_has_every_reader_of_pages() -> None:
    """Beside the names, what each target has of a statistic."""
    from einfold.compiler.codegen.onnx.page_statistics import page_statistic
    from einfold.compiler.codegen.triton.attention.choosing_kinds import ChoosingKind
    from einfold.compiler.codegen.triton.attention.choosing_statistics import statistic_text

    for name in ("quest", "shadowkv"):
        reader = READERS[name]()
        assert not Onnx().cannot_read(reader) and not Triton().cannot_read(reader)
        assert page_statistic(None, reader, True).reader == reader  # type: ignore[arg-type]
        kind = ChoosingKind(2, 4, 64, 0.1, "fp32", "i8", True, reader.text)
        assert "tl.store(to" in statistic_text(kind).stored
