"""Pages that a query chooses, in Triton: the choice, the bounds and the attention over what was chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch import fx

from einfold.compiler.codegen.triton.ahead import compile_ahead
from einfold.compiler.codegen.triton.attention.choosing import ChoosingKernel
from einfold.compiler.codegen.triton.attention.choosing_cubins import CHOICES, signature_of
from einfold.compiler.codegen.triton.attention.choosing_cubins import variants as choices_of
from einfold.compiler.codegen.triton.attention.choosing_kinds import ChoosingKind, choosing_kind
from einfold.compiler.codegen.triton.attention.choosing_source import STRIDES, choosing_source
from einfold.compiler.codegen.triton.attention.cubins import variants
from einfold.compiler.codegen.triton.attention.kernels import attention_kernel, kinds_at
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.limits import exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.codegen.triton.shipped import triton_version
from einfold.compiler.ir.kv.read.pages.paged import Paged
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.read.shadowkv.reader import ShadowKV
from einfold.compiler.ir.ops import einfold_ops
from einfold.errors import UnsupportedError

from ...programs import program
from ..onnx.test_page_attention import layer
from .conftest import Ask, needs_triton

PLAIN = AttentionKind(1, 2, 16, 16, 0.25, 0, 0.0, False, "fp32", "fp32", False)
LANDMARKS = ShadowKV(4, 0.25, 12, outliers=3)
BETWEEN = Quest(4, 0.25, 12, linear=0.6)
FEW = {"slots": 64, "new": 1, "parts": 1, "read": Quest(4, 0.25, 12).text}

#: A kind, and what is asked of it beside `FEW`.
CASES: dict[str, tuple[AttentionKind, dict[str, Any]]] = {
    "rows of many lengths": (PLAIN, {"used": [0, 11, 62], "parts": 3}),
    "int8": (
        replace(PLAIN, kv_heads=2, group=3, key_size=24, value_size=8, cache="i8", scaled=True),
        {"used": [47, 63, 30]},
    ),
    "float16, sinks, capped": (
        replace(PLAIN, cache="fp16", sinks=True, softcap=3.0),
        {"used": [48, 63], "parts": 3, "read": Quest(4, 0.1, 20, spread=1.0).text, "loud": 4.0},
    ),
    "pages of equal scores": (PLAIN, {"used": [44, 60, 63], "ties": True}),
    "tiles of pages": (
        replace(PLAIN, group=4, key_size=130, scale=0.3),
        {"used": [157], "slots": 160, "read": Quest(2, 0.1, 8).text},
    ),
    "long pages": (PLAIN, {"used": [150], "slots": 160, "read": Quest(32, 0.2, 0).text}),
    "landmarks": (PLAIN, {"used": [0, 11, 62], "parts": 3, "read": LANDMARKS.text}),
    "landmarks of codes": (
        replace(PLAIN, kv_heads=2, group=3, key_size=24, value_size=8, cache="i8", scaled=True),
        {"used": [47, 63, 30], "read": LANDMARKS.text},
    ),
    "landmarks of equal pages": (
        PLAIN,
        {"used": [44, 60, 63], "ties": True, "read": LANDMARKS.text},
    ),
    "landmarks of float16, all apart": (
        replace(PLAIN, cache="fp16"),
        {"used": [150], "slots": 160, "read": ShadowKV(2, 0.0, 6, outliers=20).text},
    ),
    "between": (PLAIN, {"used": [0, 11, 62], "parts": 3, "read": BETWEEN.text}),
    "between codes": (
        replace(PLAIN, kv_heads=2, group=3, key_size=24, value_size=8, cache="i8", scaled=True),
        {"used": [47, 63, 30], "read": BETWEEN.text},
    ),
    "landmarks alone": (
        PLAIN,
        {"used": [150], "slots": 160, "read": ShadowKV(32, 0.2, 0, outliers=0).text},
    ),
}


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("pages_worker")


@needs_triton
@pytest.mark.parametrize(("kind", "asked"), CASES.values(), ids=CASES)
def test_one_token_reads_what_the_reference_chooses(
    interpreter: Ask, kind: AttentionKind, asked: dict[str, Any]
) -> None:
    """The same pages, numbers, slots and bounds; of the longest row few pages are read, of short ones all."""
    found = interpreter(kind=asdict(kind), **FEW | asked)
    assert found["error"] < 2e-5
    assert found["same caches"] and found["same choice"]
    assert found["score error"] < 1e-5
    longest, shortest = max(asked["used"]), min(asked["used"])
    assert max(found["read"]) < 0.75 * longest
    assert shortest > 11 or min(found["read"]) == shortest + 1


@needs_triton
def test_several_tokens_read_everything_and_their_bounds_are_kept(interpreter: Ask) -> None:
    """From inside a page over several into another, behind no token too."""
    asked = {"new": 7, "used": [30, 0], "read": Quest(4, 1.0, 0).text}
    found = interpreter(kind=asdict(PLAIN), **FEW | asked)
    assert found["error"] < 2e-5 and found["same caches"]


KIND = ChoosingKind(2, 4, 128, 0.09, "fp32", "i8", True, Quest().text)
MADE = ChoosingKernel(KIND, "choosing", (0,), choosing_source(KIND))


@needs_triton
def test_compiled_choices_are_found_again(tmp_path: Path) -> None:
    """For one GPU as files of an artifact, read for what they were made for alone."""
    files = {}
    for name, data in CHOICES.files([MADE], "sm_90").items():
        files[name] = tmp_path / name.replace("/", "_")
        files[name].write_bytes(data)
    (found,), missing = CHOICES.given([MADE], "sm_90", files)
    assert not missing
    for name in MADE.functions:
        (one,) = found.function(name).compiled
        assert one.handle.metadata.name == name
        assert found.arguments(name)[min(one.aligned)] in ("keys", "query", "uppers")
    other = replace(MADE, source=f"{MADE.source}\n")
    for made, architecture in ((MADE, "sm_80"), (other, "sm_90")):
        _, missing = CHOICES.given([made], architecture, files)
        assert len(missing) == 3


@needs_triton
@pytest.mark.parametrize("capability", [80, 100])
def test_choices_compile_for_other_gpus(capability: int) -> None:
    (upper,) = (variant for variant in choices_of(MADE) if variant.function == "upper")
    assert CHOICES.compiled(MADE, upper, capability).spills == 0


@needs_triton
@pytest.mark.parametrize("cache", ["i8", "fp32"])
@pytest.mark.parametrize("reader", [ShadowKV(), Quest(linear=0.6)], ids=["landmarks", "between"])
def test_choices_by_other_statistics_compile(cache: str, reader: Paged) -> None:
    """Every function; landmarks on strides that are no multiples of 16 where those of keys are."""
    kind = replace(KIND, bounds=cache, scaled=cache == "i8", reader=reader.text)
    made = ChoosingKernel(kind, "choosing", (0,), choosing_source(kind))
    odd = bool(kind.numbers % 16)
    for variant in choices_of(made):
        _, _, attributes = signature_of(made, variant)
        aligned = {made.arguments(variant.function)[at] for (at,) in attributes}
        assert odd or variant.function == "order" or "bounds_p" in aligned
        assert not odd or ("bounds" in aligned and not aligned & set(STRIDES))
        assert variant.function != "refresh" or "keys_c" in aligned
        assert CHOICES.compiled(made, variant, 90).spills == 0


@needs_triton
def test_a_kernel_over_pages_fits_its_gpu(plan_cache: Path) -> None:
    """With matrix instructions; of a prompt nothing is compiled, for which nothing is chosen."""
    kind = AttentionKind(2, 4, 128, 128, 0.09, 0, 0.0, False, "fp32", "i8", True, page=4)
    made = attention_kernel(kind, "tested", (0,), 8192, DEVICES[90], plan_cache)
    names = [variant.name for variant in variants(made)]
    assert names == ["decode", "part8", "merge8", "part32", "merge32"]
    found = compile_ahead(made.kernel, 90, "part", made.decode)
    assert sum(found.matrix.values()) > 0
    assert exceeded(made.kernel, found, limits_of(triton_version(), 90)) == []


def test_a_loop_over_pages_ends_where_their_list_does(plan_cache: Path) -> None:
    made = attention_kernel(replace(PLAIN, page=4), "tested", (0,), 64, cache=plan_cache)
    text = made.kernel.functions["part"].text
    assert "end = tl.load(chosen_at) * 4" in text and "n_c" not in text
    assert "# It walks pages of 4 along c: the first chosen of pages." in made.kernel.source
    assert made.name == "tested" and made.kind.name == "attention_h2_kv1_d16_pages4_fp32"


def node_of(**options: Any) -> fx.Node:
    """A call over bounds with some of its arguments changed."""
    (node,) = layer().nodes(einfold_ops.bounded_attention.default)
    names = [argument.name for argument in node.target._schema.arguments]
    node.args = tuple(
        options.get(name, value) for name, value in zip(names, node.args, strict=True)
    )
    return node


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 9}, "layer 0: kernels choose pages among all tokens"),
        ({"read": ""}, "layer 0: no kernel reads what everything chooses"),
    ],
)
def test_what_no_kernel_chooses_is_refused(options: dict[str, Any], reason: str) -> None:
    assert [kind.page for kind in kinds_at(node_of())] == [0, 4]
    with pytest.raises(UnsupportedError, match=reason):
        choosing_kind(node_of(**options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            f'"{Quest().text}", none',
            "layer 3: no kernel has a reader where no statistics of pages are",
        ),
        ('"", %bias', "layer 3: no kernel has numbers that are added to logits by distance"),
    ],
)
def test_what_a_graph_says_is_not_passed_over(options: str, reason: str) -> None:
    """Whatever a compile refuses: all slots would be read as if it did not stand there."""
    found = program(f"""
        input %ids "input_ids" : i64[B, S]
        input %q "q" : f32[B, S, 4, 8]
        input %k "k" : f32[B, S, 2, 8]
        input %kc "kc" : f32[B, 2, C, 8]
        input %vc "vc" : f32[B, 2, C, 8]
        input %past "lengths" : i64[B]
        input %bias "bias" : f32[4, 9]
        call %a = einfold.cached_attention(%q, %k, %k, %kc, %vc, %past, {"none, " * 7}3, 0.25, 0, \
0.0, false, {options}) : (f32[B, S, 4, 8], f32[B, 2, C, 8], f32[B, 2, C, 8])
        call %o = builtin.getitem(%a, 0) : f32[B, S, 4, 8]
        output "o" = %o
    """)
    (node,) = found.nodes(einfold_ops.cached_attention.default)
    with pytest.raises(UnsupportedError, match=reason):
        kinds_at(node)
