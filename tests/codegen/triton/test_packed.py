"""Kernels over packed tokens: the codes are read where they lie, and mean what the operator says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from einfold.compiler.codegen.triton.ahead import compile_ahead
from einfold.compiler.codegen.triton.attention.kernels import attention_kernel
from einfold.compiler.codegen.triton.attention.packed import PackedKind, packed_kinds
from einfold.compiler.ir.kv.store.gear.storage import Gear
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.minicache.stream import RETAINED
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.compiler.ir.kv.store.storage import read_storage
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError, UnsupportedError

from ...quick import rarely
from .conftest import Ask, needs_triton
from .packed_worker import node_of

PRESSED = {"softcap": 5.0, "sinks": True}


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("packed_worker")


@needs_triton
@pytest.mark.parametrize(
    ("storage", "options"),
    [
        ("kivi(slack=8,residual=8,group=8,key_bits=4,value_bits=4)", {}),
        rarely("kivi(slack=8,residual=8,group=8,key_bits=2,value_bits=2)", PRESSED),
        rarely("kivi(slack=8,residual=16,group=16,key_bits=3,value_bits=8)", {}),
        rarely("kivi(slack=8,residual=8,group=8,key_bits=8,value_bits=3,keys=token)", {}),
        rarely("turboquant(slack=8,residual=8,group=8,key_bits=4,value_bits=3,levels=normal)", {}),
        ("turboquant(slack=8,residual=8,group=8,key_bits=4,value_bits=3,levels=even)", {}),
        ("turboquant(slack=8,residual=8,group=6,key_bits=2,value_bits=8,levels=normal)", PRESSED),
        ("gear(slack=8,residual=8,group=8,tokens=16,rank=2,share=0.13)", {}),
        rarely("zipcache(slack=8,residual=0,tokens=16,salient=8)", {}),
        rarely("mikv(slack=8,residual=0,tokens=24,salient=8,group=8)", {}),
        ("mikv(slack=8,residual=0,tokens=24,salient=8,group=8)", {"reader": True}),
        ("abq(slack=8,tokens=4,block=8,order=none,key_bits=4,value_bits=6)", {}),
        rarely("abq(slack=8,tokens=6,block=16,order=none,key_bits=3,value_bits=8)", PRESSED),
        rarely("minicache(slack=8,residual=8,group=8,rows=2)", {"sizes": (13, 7)}),
        ("minicache(slack=8,residual=8,group=6,rows=3,gamma=0.5,dtype=f16)", PRESSED),
        rarely("minicache(slack=8,residual=8,group=8,rows=0)", {}),
    ],
)
def test_kernels_do_what_the_operator_does(
    interpreter: Ask, storage: str, options: dict[str, Any]
) -> None:
    """Rows with all, none and some of their granules packed; one token whole, several in parts.

    A reader writes nothing; what is shared by a pair is read as its deeper layer reads it.
    """
    for new, parts in ((1, 1), (3, 2)):
        found = interpreter(storage=storage, new=new, parts=parts, **options)
        assert found["error"] < 2e-5, (new, parts)
        assert found["same slots"]
        assert found["kernels"] == (3 if storage.startswith(("zip", "mikv")) else 2)


@needs_triton
@pytest.mark.parametrize("storage", [Kivi(bits=4), Kivi(), TurboQuant()], ids=str)
def test_a_decode_kernel_compiles_for_a_gpu(storage: Packed, plan_cache: Any) -> None:
    """The products go to matrix instructions, and nothing is spilled."""
    kind = PackedKind(8, 4, 64, 64, 0.125, 0.0, "fp16", storage.text)
    made = attention_kernel(kind, "packed", (0,), 4096, cache=plan_cache)
    compiled = compile_ahead(made.kernel, 90, "part", made.decode)
    assert sum(compiled.matrix.values()) > 0
    assert compiled.spills == 0


def test_a_kernel_reads_no_more_than_the_codes(plan_cache: Any) -> None:
    """Every input is a view of a packed piece: nothing of the size of the keys is made ahead of it."""
    storage = Gear(group=32, residual=128, bits=4, rank=2).text
    kind = PackedKind(8, 4, 64, 64, 0.125, 0.0, "fp16", storage)
    made = attention_kernel(kind, "gear", (0,), 4096, cache=plan_cache)
    assert not made.kernel.division.ahead and not made.kernel.division.after
    shared = made.kernel.shared
    assert shared["key_codes", "t"] == 2 and shared["key_scale", "t"] == 32
    assert shared["key_right0", "t"] == 128 and shared["value_codes", "f"] == 2


@pytest.mark.slow
def test_more_retained_rows_than_a_kernel_takes_are_refused() -> None:
    sizes = "minicache(slack=8,residual=8,group=16,rows={})"
    assert len(packed_kinds(node_of(read(sizes.format(RETAINED)), {}))) == 1
    with pytest.raises(
        UnsupportedError, match=r"layer 1: up to 9 of 16 tokens are retained, .* lower retained"
    ):
        packed_kinds(node_of(read(sizes.format(RETAINED + 1)), {}))


def test_what_is_scattered_is_refused() -> None:
    """Where a recipe is read already, and where a kernel would be made."""
    with pytest.raises(RecipeError, match=r"mustafar: no kernel reads .* for the target reference"):
        Recipe.build({"target": "triton", "cache": {"quant": "mustafar"}})
    with pytest.raises(UnsupportedError, match="layer 1: no kernel reads what mustafar stores"):
        packed_kinds(node_of(read("mustafar(slack=8,tokens=4)"), {}))


def read(text: str) -> Packed:
    storage = read_storage(text)
    assert isinstance(storage, Packed)
    return storage
