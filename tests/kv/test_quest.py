"""Quest: pages by bounds of their keys, and what is kept and accounted for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import einfold
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.kv.read.everything import Everything
from einfold.compiler.ir.kv.read.pages.paged import Paged
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.read.reader import parse_reader
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.ops.attention import CachedAttention
from einfold.compiler.ir.ops.bounded import BoundedAttention
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_read.by_reader import ReadByReader
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError, RecipeError
from einfold.runtime.cache import Cache

from .. import models
from ..programs import calls, program
from . import common

TOKENS = [3 + (7 * place) % 90 for place in range(60)]
SMALL = {"method": "quest", "page": 4, "share": 0.25, "tokens": 12, "skip_layers": 0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(reader: Quest, q_GD: Tensor, keys_TD: Tensor) -> set[int]:
    """The pages that the newest token of one row reads for one KV head, spelled out."""
    pages = list(keys_TD.split(reader.page))
    shares = []
    for query in q_GD:
        scores = []
        for page in pages:
            middle, half = (page.amax(0) + page.amin(0)) / 2, (page.amax(0) - page.amin(0)) / 2
            scores.append(float(query @ middle + reader.spread * (query.abs() @ half)))
        shares.append(torch.tensor(scores).softmax(0))
    best = torch.stack(shares).amax(0)
    found = {0, len(pages) - 2, len(pages) - 1}
    for page in best.argsort(descending=True).tolist():
        if len(found) < reader.pages(len(keys_TD)):
            found.add(page)
    return found


def chosen_as(
    reader: Paged, by_hand: Callable[[Any, Tensor, Tensor], set[int]]
) -> Iterator[tuple[int, set[int]]]:
    """Checks that of two rows the slots of these pages are read; gives the pages of each row's heads."""
    q, keys = normal(2, 2, 3, 1, 8), normal(2, 2, 64, 8, seed=1)
    lengths = torch.tensor([61, 44])
    visible = (torch.arange(64) < lengths[:, None])[:, None]
    found = reader.choosing.chosen(reader, q, keys, visible)
    for row, length in enumerate(lengths.tolist()):
        for head in range(2):
            pages = by_hand(reader, q[row, head, :, 0], keys[row, head, :length])
            wanted = [slot < length and slot // 4 in pages for slot in range(64)]
            assert found[row, head, 0].tolist() == wanted
            yield row, pages


@pytest.mark.parametrize("spread", [1.0, 0.5])
def test_the_pages_are_those_with_the_best_scores(spread: float) -> None:
    reader = Quest(page=4, share=0.3, tokens=0, spread=spread)
    assert len([*chosen_as(reader, by_hand)]) == 4


def test_the_bound_is_above_every_product() -> None:
    keys, query = normal(1, 1, 64, 8), normal(8, seed=1)
    largest, smallest = Quest(16).statistic.of_pages(keys.unflatten(2, (-1, 16)))[0, 0].chunk(2, -1)
    bound = query.clamp(min=0) @ largest.mT + query.clamp(max=0) @ smallest.mT
    products = (keys[0, 0] @ query).unflatten(0, (4, 16))
    assert (products <= bound[:, None] + 1e-5).all()


def test_one_number_of_a_channel_lies_between_the_largest_and_the_smallest() -> None:
    """At 1 it is the largest; in between, a page's score is one product."""
    keys, query = normal(1, 2, 64, 8), normal(1, 2, 3, 5, 8, seed=1)
    pages = keys.unflatten(2, (-1, 16))
    largest, smallest = Quest(16).statistic.of_pages(pages).chunk(2, -1)
    assert torch.equal(Quest(16, linear=1.0).statistic.of_pages(pages), largest)
    linear = Quest(16, linear=0.6).statistic
    assert torch.allclose(linear.of_pages(pages), 0.6 * largest + 0.4 * smallest)
    assert linear.asked(query) is query
    codes = (40 * pages).to(torch.int8)
    wanted = 0.6 * codes.amax(3).double() + 0.4 * codes.amin(3).double()
    assert (linear.of_pages(codes) - wanted).abs().max() <= 0.5
    assert [Quest(linear=each).bound_numbers(8) for each in (0.0, 0.6)] == [16, 8]


def call(read: str, bounds: Tensor | None, lengths: list[int], new: int, scaled: bool) -> Any:
    batch = len(lengths)
    scale = 0.02 + 0.01 * torch.rand(2, 8, generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {
        "q_BSHD": normal(batch, new, 4, 8, seed=sum(lengths)),
        "k_BSKD": normal(batch, new, 2, 8, seed=sum(lengths) + 1),
        "v_BSKD": normal(batch, new, 2, 8, seed=sum(lengths) + 2),
        "used_B": torch.tensor(lengths),
        "key_scale_KD": scale if scaled else None,
        "value_scale_KD": scale if scaled else None,
        "layer": 0,
        "scale": 0.4,
        "window": 0,
        "softcap": 0.0,
        "interleaved": False,
        "read": read,
    }
    names = ("count_BK", "sinks_H", "positions_BS", "cos_PR", "sin_PR")
    given |= dict.fromkeys(names)
    return given if bounds is None else given | {"bounds_BKPE": bounds}


@pytest.mark.parametrize("scaled", [False, True], ids=["f32", "int8"])
def test_bounds_that_are_kept_choose_as_bounds_found_anew(scaled: bool) -> None:
    """In steps of many sizes, rows of other lengths, and slots that held something else before."""
    read = Quest(page=4, share=0.2, tokens=12).text
    kind = torch.int8 if scaled else torch.float32
    caches = [(40 * normal(2, 2, 48, 8, seed=seed)).to(kind) for seed in (8, 9)]
    bounds = torch.full((2, 2, 13, 16), 77, dtype=kind)
    others = [cache.clone() for cache in caches]
    ends = [0, 1, 2, 9, 12, 13, 29, 30, 41]
    for start, end in pairwise(ends):
        lengths, new = [start, start // 2], end - start
        slots = {"key_cache_BKCD": caches[0], "value_cache_BKCD": caches[1]}
        kept = BoundedAttention(**call(read, bounds, lengths, new, scaled), **slots).run()
        slots = {"key_cache_BKCD": others[0], "value_cache_BKCD": others[1]}
        anew = CachedAttention(**call(read, None, lengths, new, scaled), **slots).run()
        torch.testing.assert_close(kept, anew)
        # The shorter row goes on at half of the longer one's end, over what it wrote beyond.
    for row, length in enumerate((41, 15 + 11)):
        for page in range(length // 4):
            of_page = caches[0][row, :, 4 * page : 4 * page + 4]
            wanted = torch.cat((of_page.amax(1), of_page.amin(1)), -1)
            assert torch.equal(bounds[row, :, page], wanted)


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_what_is_kept_beside_slots_is_in_the_account(dtype: str) -> None:
    storage = Plain(dtype, "channel" if dtype == "i8" else "none")
    layout, whole = (common.layout_of(Full(), storage, each) for each in (Quest(16), Everything()))
    common.check_account(layout)
    common.check_text(layout)
    size = {"f32": 4, "f16": 2, "i8": 1}[dtype]
    bounds = 2 * common.HEADS * 2 * common.KEY * size
    assert layout.bytes(1, 160) == int(whole.bytes(1, 160)) + 11 * bounds
    assert Cache.allocate(layout, 1, 150).nbytes == layout.bytes(
        1, 160
    )  # slots come in whole pages


def test_bytes_of_a_step_are_what_is_chosen_and_the_bounds() -> None:
    """A layer: 2 heads of 16 + 8 numbers in float32 a token, and 2 x 16 a page."""
    layout = common.layout_of(Full(), Plain(), Quest(16, tokens=0))
    assert common.layout_of(Full()).read_bytes(3, 1600) == 3 * 2 * 2 * 4 * 24 * 1600
    assert layout.read_bytes(3, 1600) == 3 * 2 * 2 * 4 * (24 * 208 + 32 * 101)
    assert layout.read_bytes(1, 32) == 2 * 2 * 4 * (24 * 32 + 32 * 3)  # no more than there are
    assert [Quest(16).reads(n) for n in (1, 511, 512, 513, 4096, 8192)] == [
        1,
        511,
        512,
        512,
        512,
        1024,
    ]


def test_a_cache_for_transformers_grows_and_its_bounds_do_too() -> None:
    model = models.build("llama")
    ids = torch.tensor([TOKENS[:5]])
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    everything = {"cache": {"read": SMALL | {"share": 1.0}}}
    with einfold.cache_for(model, everything, context=128, check=False) as cache:
        found = model.generate(ids, past_key_values=cache, **options)
        assert cache.capacity == 128
        assert cache.nbytes == sum(layer.layout.bytes(1, 128) for layer in cache.layers)
    assert found.tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"page": 12}, "a page has a power of two of tokens, 2 to 1024, not 12"),
        ({"page": 1}, "a power of two"),
        ({"page": 2048}, "2 to 1024, not 2048"),
        ({"share": 1.5}, "share is a part of the tokens, 0 to 1, not 1.5"),
        ({"share": float("nan")}, "share is a part"),
        ({"tokens": 8}, r"tokens is 0 or at least 3 pages of 4 \(12\), not 8"),
        ({"tokens": -1}, "tokens is 0 or at least"),
        ({"share": 0.0, "tokens": 0}, "give a share of the tokens or a number"),
        ({"spread": 2.0}, "spread goes from the middle of a page's numbers to their edge"),
        ({"skip_layers": -1}, "skip_layers is 0 or more, not -1"),
        (
            {"linear": 1.2},
            "linear is a part of a page's largest numbers, 0 to 1, where 0 scores by",
        ),
        ({"linear": float("nan")}, "linear is a part"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(IRError, match=said):
        Quest(**options)
    with pytest.raises(RecipeError, match=r"cache\.read"):
        Recipe.build({"cache": {"read": {"method": "quest", **options}}})


def test_slots_of_another_layer_have_no_bounds() -> None:
    first, second = common.layout_of(Full()).layers
    (group,) = second.groups
    with pytest.raises(IRError, match="keeps statistics of pages of slots, so these must be of"):
        replace(group, reader=Quest(), owner=first.layer)
    with pytest.raises(IRError):
        parse_reader("quest(page=8,share=x,tokens=0,spread=1.0)")


BODY = """
    input %ids "input_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    input %j "j" : f32[B, S, 2, 8]
    call %o = einfold.attention(%q, %k, %k, none, 0, 0.25, WINDOW, 0.0) : f32[B, S, 4, 8]
    call %p = einfold.attention(%o, %j, %j, none, 1, 0.25, 0, 0.0) : f32[B, S, 4, 8]
    output "o" = %p
"""


def read(reader: Quest, window: int = 0, **group: Any) -> tuple[Any, list[tuple[str, str]]]:
    """Two layers, of which the second is cached in this way, and what the pass says of them."""
    found = program(BODY.replace("WINDOW", str(window)))
    PlanCache().run(found)
    first, second = found.layout.layers
    changed = replace(second, groups=tuple(replace(each, **group) for each in second.groups))
    found.layout = CacheLayout((first, changed))
    result = ReadByReader(reader).run(found)
    return found, [(note.action, note.what) for note in result.notes]


def test_layers_behind_the_first_get_the_reader_and_its_bounds() -> None:
    found, notes = read(Quest(4, 0.25, 12, skip_layers=1))
    assert notes == [
        ("skipped", "heads 0,1 are of the first 1 layers, which read everything"),
        (
            "applied",
            "heads 0,1 read 0.25 of the tokens or 12 tokens, or what is more, in pages of 4",
        ),
    ]
    text = "read=quest(page=4,share=0.25,tokens=12,spread=0.5,alike=0,linear=0.0)"
    assert [text in line for line in found.layout.lines()] == [False, True]
    AttachCache().run(found)
    verify(found, deep=True)
    assert [call.split("(")[0] for call in calls(found) if "attention" in call] == [
        "einfold.cached_attention",
        "einfold.bounded_attention",
    ]
    lines = print_program(found)
    assert '"cache.1.0.bounds" : f32[B, 2, P4, 16]' in lines
    assert '"cache.1.0.key" : f32[B, 2, CP4, 8]' in lines
    assert 'output "cache.1.0.bounds"' in lines
    assert found.layout.slot_dims(30) == {"C": 30, "P4": 9, "CP4": 32}


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ({"policy": Window(2, 5, 4)}, "heads 0,1 keep 11 tokens, and a query reads as many"),
        ({"storage": Kivi()}, "heads 0,1 are stored as kivi, which is read whole"),
        (
            {"owner": 0},
            "heads 0,1 read the cache of layer 0, and statistics of pages are kept with",
        ),
    ],
    ids=["few", "packed", "another's"],
)
def test_what_is_left_alone_says_so(group: dict[str, Any], reason: str) -> None:
    _, notes = read(Quest(4, 0.25, 12, skip_layers=0), 9, **group)
    assert [action for action, _ in notes] == ["skipped", "skipped"]
    assert notes[0][1] == "heads 0,1 have a sliding window of 9 tokens of their own"
    assert notes[1][1].startswith(reason)
