"""A reader that lives in this file alone: queries read a few pages of what is kept, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import einfold
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.kv.read.everything import Everything
from einfold.compiler.ir.kv.read.reader import READERS, Reader, parse_reader
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.ops.attention import CachedAttention, masked_attention
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError, RecipeError
from einfold.runtime.artifact import Artifact

from .. import models
from ..quick import rarely
from . import common

TOKENS = [3 + (7 * place) % 90 for place in range(60)]


class Choosing:
    @staticmethod
    def chosen(reader: Pages, q_BKGSD: Tensor, keys_BKCD: Tensor, visible_BSC: Tensor) -> Tensor:
        """The pages whose visible keys have the largest product with any query; the newest is one of them."""
        logits_BKSC = (q_BKGSD @ keys_BKCD[:, :, None].mT).amax(2)
        logits_BKSC = logits_BKSC.masked_fill(~visible_BSC[:, None], -torch.inf)
        slots = logits_BKSC.shape[-1]
        padded = functional.pad(logits_BKSC, (0, -slots % reader.page), value=-torch.inf)
        best_BKSP = padded.unflatten(-1, (-1, reader.page)).amax(-1)
        newest_BS = (visible_BSC.sum(-1) - 1) // reader.page  # the texts here have no window
        newest = functional.one_hot(newest_BS, best_BKSP.shape[-1]).bool()[:, None]
        best_BKSP = best_BKSP.masked_fill(newest, torch.inf)
        count = min(reader.count, best_BKSP.shape[-1])
        read_BKSP = torch.zeros_like(best_BKSP, dtype=torch.bool)
        read_BKSP.scatter_(-1, best_BKSP.topk(count).indices, True)
        read_BKSC = read_BKSP.repeat_interleave(reader.page, -1)[..., :slots]
        return read_BKSC & visible_BSC[:, None]


@dataclass(frozen=True)
class Pages(Reader):
    """Reads the pages whose keys a query is most like, and that of the newest token."""

    page: int = 4
    count: int = 3

    name = method = "toy_pages"

    def __post_init__(self) -> None:
        if self.page < 1 or self.count < 1:
            raise IRError(f"{self.name} reads pages of 1 or more tokens, and one at least")

    def says(self) -> str:
        return f"{self.count} pages of {self.page} tokens"

    @property
    def choosing(self) -> Any:
        return Choosing


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with READERS.with_one_more(Pages):
        yield


@pytest.mark.parametrize("policy", [Full(), Window(2, 5, 4)], ids=["full", "window"])
def test_it_keeps_to_what_holds_for_all(policy: Any) -> None:
    layout = common.layout_of(policy, reader=Pages(2, 5))
    assert "read=toy_pages(page=2,count=5)" in "".join(layout.lines())
    common.check_text(layout)
    common.check_account(layout)
    common.check_method("read", "toy_pages", page=8)


def test_what_is_held_is_the_same_bytes() -> None:
    whole, paged = (common.layout_of(Full(), reader=each) for each in (Everything(), Pages()))
    assert whole.account() == paged.account()
    assert whole.clocks().keys() == paged.clocks().keys()


def test_a_query_reads_what_was_chosen_and_no_more() -> None:
    """Against attention over those keys alone, taken out by hand; values elsewhere are not seen."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, heads, 8, generator=generator) for heads in (4, 2, 2))
    keys, values = (torch.randn(1, 2, 21, 8, generator=generator) for _ in range(2))
    none = dict.fromkeys(
        (
            "count_BK",
            "sinks_H",
            "positions_BS",
            "cos_PR",
            "sin_PR",
            "key_scale_KD",
            "value_scale_KD",
        )
    )
    call = CachedAttention(
        q_BSHD=q,
        k_BSKD=k,
        v_BSKD=v,
        key_cache_BKCD=keys,
        value_cache_BKCD=values,
        used_B=torch.tensor([17]),
        **none,  # type: ignore[arg-type]
        layer=0,
        scale=0.3,
        window=0,
        softcap=0.0,
        interleaved=False,
        read=Pages(4, 2).text,
    )
    found = call.run()
    for head in range(4):
        of_keys = keys[0, head // 2, :18]
        scores = (q[0, 0, head] @ of_keys.T, q[0, 0, head ^ 1] @ of_keys.T)
        best = torch.maximum(*scores)[:16].unflatten(0, (4, 4)).amax(1).argmax()
        slots = [*range(4 * int(best), 4 * int(best) + 4), 16, 17]
        alone = masked_attention(
            q[:, :, head : head + 1],
            keys[:, head // 2 : head // 2 + 1, slots],
            values[:, head // 2 : head // 2 + 1, slots],
            torch.ones(1, 1, len(slots), dtype=torch.bool),
            None,
            0.3,
            0.0,
        )
        torch.testing.assert_close(found[:, :, head : head + 1], alone)


@pytest.mark.parametrize(
    "cache",
    [
        {},
        rarely({"storage": "f16"}),
        rarely({"share": "cross_layer:layers=1"}),
    ],
    ids=str,
)
def test_by_the_reference_few_pages_are_near_and_all_are_the_same(
    cache: dict[str, Any], tmp_path: Path
) -> None:
    folder = models.save("llama", tmp_path / "model")
    few, every = ({"method": "toy_pages", "page": 4, "count": count} for count in (2, 99))
    found = {
        name: common.logits_of(folder, tmp_path / name, "reference", cache | table, TOKENS)
        for name, table in {"few": {"read": few}, "every": {"read": every}, "none": {}}.items()
    }
    # Sums of another order turn a key of a later layer to its neighbour in float16, 5e-4 away.
    lost = 1e-3 if cache.get("storage") == "f16" else 1e-5
    np.testing.assert_allclose(found["every"], found["none"], rtol=lost, atol=lost)
    assert np.abs(found["few"] - found["none"]).max() > 10 * lost
    program = (tmp_path / "few" / "graph.eir").read_text()
    assert print_program(parse(program)) == program
    layout = Artifact.open(tmp_path / "few").manifest.layout()
    assert {group.reader for _, _, group in layout.groups()} == {Pages(4, 2)}


@pytest.mark.slow
def test_int8_slots_are_read_so_too(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    cache = {"storage": "int8", "read": {"method": "toy_pages", "count": 99}}
    found = common.logits_of(folder, tmp_path / "a", "reference", cache, TOKENS)
    whole = common.logits_of(folder, tmp_path / "b", "reference", {"storage": "int8"}, TOKENS)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["onnx", "triton"])
def test_targets_without_it_refuse(target: str, text_model: Path, tmp_path: Path) -> None:
    recipe = {"target": target, "cache": {"read": "toy_pages"}}
    with pytest.raises(
        RecipeError, match=f"cache.read toy_pages: no .* target {target} reads what"
    ):
        einfold.compile(text_model, tmp_path / "a", recipe=recipe)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ({"quant": "kivi:group=8,residual=8,slack=8"}, "are stored as kivi, which is read whole"),
        (
            {"prune": "razor_attention:recent=8,slack=8,induction=0,echo=0"},
            "a slot that stands for many tokens",
        ),
    ],
    ids=["packed", "compensated"],
)
def test_what_has_nothing_to_choose_says_so(
    cache: dict[str, str], reason: str, text_model: Path, tmp_path: Path
) -> None:
    recipe = {"target": "reference", "cache": cache | {"read": "toy_pages"}}
    with pytest.raises(RecipeError, match=f"toy_pages was asked for and found nothing.*{reason}"):
        einfold.compile(text_model, tmp_path / "a", recipe=recipe, context=128)


def test_wrong_readers_are_refused() -> None:
    with pytest.raises(
        IRError, match="chooses among tokens in plain slots, and kivi is read whole"
    ):
        common.layout_of(Full(), Kivi(), Pages())
    for text, said in (
        (
            "nothing",
            "unknown cache reader 'nothing'; known: everything, quest, shadowkv, toy_pages",
        ),
        ("toy_pages(page=0,count=1)", "pages of 1 or more tokens"),
        ("toy_pages(page=1,count=1,x=1)", "unknown or repeated field 'x'"),
    ):
        with pytest.raises(IRError, match=said.replace("(", r"\(")):
            parse_reader(text)
    lines = list(common.layout_of(Full(), Plain()).lines())
    with pytest.raises(IRError, match="cannot read the cache line"):
        CacheLayout.parse([f"{lines[0]} read=nothing", lines[1]])
    with pytest.raises(
        RecipeError, match=r"cache\.read\.method is one of quest, shadowkv, toy_pages, not 'x'"
    ):
        Recipe.build({"cache": {"read": "x"}})
    with pytest.raises(RecipeError, match="unknown key 'pages'; toy_pages takes page, count"):
        Recipe.build({"cache": {"read": {"method": "toy_pages", "pages": 1}}})


def test_without_any_method_the_family_says_so() -> None:
    known = dict(READERS._found)
    READERS._found.clear()
    try:
        with pytest.raises(RecipeError, match=r"cache\.read\.method has no name yet"):
            Recipe.build({"cache": {"read": "toy_pages"}})
    finally:
        READERS._found.update(known)
