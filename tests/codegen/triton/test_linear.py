"""Products with stored weights by kernels: against float64, in graphs, in artifacts, and ahead of time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import einfold
from einfold.compiler.codegen.triton.linear import kernels as module
from einfold.compiler.codegen.triton.linear.bound import readers
from einfold.compiler.codegen.triton.linear.cubins import PRODUCTS, variants
from einfold.compiler.codegen.triton.linear.decoder import decoder_of
from einfold.compiler.codegen.triton.linear.kernels import (
    TILES,
    LinearWeight,
    linear_kernel,
    product,
    split_count,
)
from einfold.compiler.codegen.triton.linear.kinds import LinearKind
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.plain import Half
from einfold.compiler.ir.quant.schemes.qserve import QServe
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import UnsupportedError

from ...programs import program
from ...quant.common import LINEAR
from ...quick import rarely
from .conftest import Ask, needs_triton
from .levels import Mxfp4, Nf4

#: Against float64, relative to the largest value: sums and results in the type, nothing for the weights,
#: which are exact operands but for nf4's. The interpreter cuts what it rounds to bfloat16.
TOLERANCE = {"fp32": 1e-6, "fp16": 6e-4, "bf16": 8e-3}


#: Activations in 8 bits.
INT8 = {"activations": "int8"}


@pytest.fixture(scope="module")
def asked(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("linear_worker")


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "kind", "shape", "parts", "more"),
    [
        ("grouped(bits=4,block=32,symmetric=1)", "fp32", ([], 75, 150), 1, {"bias": True}),
        ("grouped(bits=4,block=32,symmetric=1)", "fp32", ([3], 130, 160), 2, {"bias": True}),
        ("grouped(bits=4,block=128,symmetric=0)", "fp16", ([17], 64, 96), 1, {}),
        ("grouped(bits=8,block=16,symmetric=0)", "fp16", ([3], 64, 150), 3, {}),
        ("grouped(bits=8,block=128,symmetric=1)", "bf16", ([], 64, 100), 1, {"scales": "fp16"}),
        ("grouped(bits=2,block=16,symmetric=1)", "bf16", ([2, 2], 75, 64), 1, {}),
        ("grouped(bits=2,block=64,symmetric=0)", "fp32", ([], 64, 300), 2, {}),
        ("nf4", "fp32", ([3], 75, 150), 1, {}),
        ("nf4 in groups of 16", "fp16", ([3], 64, 80), 1, {}),
        ("mxfp4", "fp32", ([17], 75, 150), 1, {}),
        ("mxfp4", "fp16", ([], 64, 160), 2, {"bias": True}),
        ("mxfp4", "fp16", ([3], 64, 64), 1, {}),
        ("grouped(bits=4,block=0)", "fp32", ([3], 75, 150), 1, {}),
        ("grouped(bits=8,block=0,symmetric=0)", "fp16", ([], 64, 100), 1, {}),
        ("grouped(bits=8,block=0)", "fp32", ([3], 75, 150), 1, {"bias": True, **INT8}),
        ("grouped(bits=8,block=0)", "fp16", ([17], 130, 300), 3, {**INT8}),
        ("grouped(bits=4,block=0,scales=f16)", "bf16", ([], 64, 150), 1, {**INT8}),
        ("grouped(bits=2,block=0)", "fp32", ([2, 2], 64, 600), 2, {**INT8}),
        ("qserve", "fp32", ([], 75, 300), 2, {"bias": True, **INT8}),
        ("qserve(block=64)", "fp16", ([3], 130, 150), 1, {**INT8}),
    ],
)
def test_a_product_is_that_of_the_widened_weight(
    asked: Ask,
    scheme: str,
    kind: str,
    shape: tuple[list[int], int, int],
    parts: int,
    more: dict[str, Any],
) -> None:
    """Odd shapes, one row and several, whole and in parts of the columns."""
    rows, outs, width = shape
    given = {"scheme": scheme, "type": kind, "rows": rows or [1], "outs": outs, "width": width}
    found = asked(**given, parts=parts, **more)
    assert found["error"] < TOLERANCE[kind]
    assert found["same"], "parts are added in their order"
    assert (
        found["type"]
        == {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}[kind]
    )


@needs_triton
def test_a_graph_runs_by_kernels(asked: Ask) -> None:
    """A head that is an embedding too, a linear, and experts, each on its tokens; not the router."""
    found = asked(graph="grouped(bits=4,block=32,symmetric=0)")
    assert found["calls"] == [
        "einfold.quantized_embedding.default",
        "einfold.quantized_experts.default",
        "einfold.quantized_linear.default",
        "einfold.quantized_linear.default",
    ]
    assert found["kernels"] == 1, "they are of one kind"
    assert max(found["errors"].values()) < 1e-6
    assert found["accounted"] and 1 < found["grown"] < 3, "rows of 40 and 24 fill segments of 128"


@needs_triton
def test_a_graph_multiplies_integers(asked: Ask) -> None:
    """Three linears, whose kernels round what they read; the head reads floats."""
    found = asked(graph="grouped(bits=8,block=0)", activations="int8")
    assert found["calls"] == [
        *["einfold.round_to_int8.default"] * 2,
        "einfold.stored_embedding.default",
        *["einfold.stored_linear.default"] * 4,
    ]
    assert found["kernels"] == 3, "without a bias, with one, and the head's"
    assert max(found["errors"].values()) < 1e-6
    assert found["accounted"]


@pytest.mark.parametrize("width", [1, 64, 150, 600])
@pytest.mark.parametrize(
    ("scheme", "integers"),
    [
        (Grouped(2, 16, False), False),
        (Grouped(4, 32, False), False),
        (Grouped(4, 256, False), False),
        (Grouped(8, 64, False), False),
        (Grouped(4, 0, False), False),
        (Grouped(8, 0), True),
        (Grouped(2, 0), True),
        (QServe(), True),
    ],
    ids=str,
)
def test_the_order_of_kernels_is_a_permutation(scheme: Any, integers: bool, width: int) -> None:
    layout = LinearKind(scheme, "fp32", product="i8" if integers else "").layout(width)
    weight = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    shapes = layout.shapes((3,), 5)
    for name, piece in pieces.items():
        ready = layout.repacked(name, piece)
        assert tuple(ready.shape) == shapes[name] and ready.is_contiguous()
        assert torch.equal(layout.restored(name, ready), piece)
        assert ones(ready) == ones(piece) or name == "scales", "nothing is added but zeros"
    if width == 600 and scheme == Grouped(8, 64, False):
        packed = pieces["packed"]
        assert layout.repacked("packed", packed).nbytes == packed.nbytes


def ones(tensor: Tensor) -> int:
    """Bits that are set."""
    flat = tensor.contiguous().view(torch.uint8).int()
    return sum(int(((flat >> bit) & 1).sum()) for bit in range(8))


def weight_in(scheme: Any, rows: int, width: int) -> tuple[LinearWeight, Tensor]:
    pieces = RoundToNearest().solve(torch.randn(rows, width), scheme, {}).pieces
    layout = LinearKind(scheme, "fp32").layout(width)
    ready = {name: layout.repacked(name, piece) for name, piece in pieces.items()}
    return LinearWeight.of_pieces(ready), scheme.dequantize(pieces, width)


def test_many_rows_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share what widening costs; no kernel is launched."""
    monkeypatch.setattr(module, "WIDE", 4)
    scheme = Grouped(4, 32, False)
    weight, wide = weight_in(scheme, 24, 70)
    x, bias = torch.randn(5, 70), torch.randn(24)
    found = product(linear_kernel(LinearKind(scheme, "fp32", "fp32")), weight, x, bias)
    torch.testing.assert_close(found, x @ wide.T + bias)
    assert product(linear_kernel(LinearKind(scheme, "fp32")), weight, x[:0]).shape == (0, 24)


def test_a_weight_that_others_read_too_stays_in_its_order() -> None:
    """Here the table of an embedding, widened for a reader that no kernel stands for."""
    text = """
        weight @w.packed : u8[24, 2, 16]
        weight @w.scales : f32[24, 2]
        weight @v.packed : u8[24, 2, 16]
        weight @v.scales : f32[24, 2]
        input %x "x" : f32[B, 40]
        read %p "w.packed" : u8[24, 2, 16]
        read %s "w.scales" : f32[24, 2]
        read %q "v.packed" : u8[24, 2, 16]
        read %t "v.scales" : f32[24, 2]
        call %a = einfold.quantized_linear(%x, %p, %s, none, none, 4, 32) : f32[B, 24]
        call %b = einfold.quantized_linear(%x, %q, %t, none, none, 4, 32) : f32[B, 24]
        call %w = einfold.dequantize([%p, %s], "grouped(bits=4,block=32,symmetric=1)", [24, 40]) : f32[24, 40]
        output "a" = %a
        output "b" = %b
        output "w" = %w
    """
    found = readers(program(text))
    assert [node.name for node in found] == ["b"]
    (stored,) = found[next(iter(found))]
    assert stored.names == {"packed": "v.packed", "scales": "v.scales"} and stored.width == 40


def test_what_no_kernel_reads() -> None:
    assert decoder_of(Half()) is None
    with pytest.raises(UnsupportedError, match="no kernel multiplies fp32 by weights in half"):
        linear_kernel(LinearKind(Half(), "fp32"))
    with pytest.raises(UnsupportedError, match="no kernel multiplies i8 by weights in grouped"):
        linear_kernel(LinearKind(Grouped(), "i8"))
    found = program(LINEAR)
    QuantizeWeights(Half()).run(found)
    assert readers(found) == {}


def test_parts_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 of 4096 x 4096 has 32 tiles of 32 segments: cut until 132 multiprocessors have four each."""

    class OnGpu:
        device = torch.device("cuda")

    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    def count(programs: int, segments: int) -> int:
        return split_count(programs, segments, OnGpu())  # type: ignore[arg-type]

    assert count(32, 32) == 16
    assert count(1187, 32) == 1, "a vocabulary fills it"
    assert count(1, 1) == 1 and count(1, 7) == 3 and count(1, 1000) == 32


@needs_triton
@pytest.mark.parametrize(
    ("weights", "stored"),
    [
        # The head and the table that is one with it have 8 bits.
        (
            "int4:head=int8",
            [f"grouped_bits_{bits}_block_32_symmetric_1_scales_f32_fp32" for bits in (4, 8)],
        ),
        rarely(
            "qserve:block=64",
            ["grouped_bits_8_block_64_symmetric_1_scales_f32_fp32", "qserve_block_64_fp32_as_i8"],
        ),
    ],
)
def test_an_artifact_runs_its_weights_by_kernels(
    weights: str,
    stored: list[str],
    interpreting: Callable[[str], Ask],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "llama"
    einfold.compile(model_folder("llama"), out, target="triton", weights=weights)
    names = sorted(p.name for p in (out / "kernels").glob("linear*"))
    assert names == [f"linear_{name}.py" for name in stored]
    texts = [(out / "kernels" / name).read_text() for name in names]
    assert "def matvec(" in texts[0] and ("int8" in texts[1]) == weights.startswith("qserve")
    ask = interpreting("artifact_worker")
    found = ask(artifact=str(out), prompts=[[5, 6, 7]], new=1)
    assert found["found"] == found["expected"] and not found["warnings"]


@needs_triton
def test_compiled_products_are_read_again(tmp_path: Path) -> None:
    kernel = linear_kernel(LinearKind(Grouped(), "fp16"))
    few = [v for v in variants(kernel) if v.name in ("matvec", "merge")]
    cubins = replace(PRODUCTS, variants=lambda kernel: few)
    files = {}
    for name, data in cubins.files([kernel], "sm_90").items():
        files[name] = tmp_path / Path(name).name
        files[name].write_bytes(data)
    assert len(files) == 4
    (found,), missing = cubins.given([kernel], "sm_90", files)
    assert not missing
    (one,) = found.function("matvec").compiled
    assert one.handle.metadata.name == "matvec" and one.handle.metadata.target.arch == 90
    given = torch.zeros(64, dtype=torch.float16)
    values = [given, given, given, given, 1, 4096, 32, 8]
    tile = TILES[1]
    assert one.serves(values, {**tile.constants, "WHOLE": True})
    assert not one.serves(values, {**tile.constants, "WHOLE": False})
    assert not one.serves([*values[:5], 4095, 32, 8], {**tile.constants, "WHOLE": True})
    _, missing = cubins.given([kernel], "sm_80", files)
    assert missing == [f"kernels/{kernel.name}.sm_80.{name}.cubin" for name in ("matvec", "merge")]
    other = linear_kernel(LinearKind(Grouped(4, 64), "fp16"))
    renamed = {name.replace(kernel.name, other.name): path for name, path in files.items()}
    _, missing = cubins.given([other], "sm_90", renamed)
    assert len(missing) == 2, "they are of another source"
    assert (
        json.loads(files[f"kernels/{kernel.name}.sm_90.merge.json"].read_text())["einfold"]["kind"]
        == "merge"
    )


#: Bytes a thread: int8 over bfloat16 spills 4 on sm_90, MXFP4 over float16 8 on sm_100.
SPILLS = 16
ALL = [
    (scheme, kind, capability)
    for scheme in (
        Grouped(),
        Grouped(4, 128, False),
        Grouped(8, 32),
        Grouped(2, 64),
        Nf4(),
        Mxfp4(),
    )
    for kind in ("fp16", "bf16", "fp32")
    for capability in (80, 90, 100)
]
OF_INTEGERS = [
    (scheme, kind, capability)
    for scheme in (Grouped(8, 0), Grouped(4, 0), QServe())
    for kind in ("fp16", "bf16", "fp32")
    for capability in (80, 90, 100)
]


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "kind", "capability"),
    [
        pytest.param(
            *each,
            marks=[] if each == (Grouped(), "fp16", 90) else [pytest.mark.slow],
            id=" ".join(map(str, each)),
        )
        for each in ALL
    ],
)
def test_products_compile_within_limits(scheme: Any, kind: str, capability: int) -> None:
    """Weights are operands that matrix instructions take from registers, of the newest kind that there is."""
    kernel = linear_kernel(LinearKind(scheme, kind, kind))
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for variant in variants(kernel):
        if variant.name in ("matvec", "matmul16", "matmul64_part"):
            made = PRODUCTS.compiled(kernel, variant, capability)
            assert made.spills <= SPILLS, variant.name
            assert made.shared <= DEVICES[capability].shared_bytes
            assert list(made.matrix) == ([newest] if variant.function == "matmul" else [])
            assert "cp.async.cg" in made.ptx, "codes are loaded by 16 bytes"
            assert ".ftz" not in made.ptx, "subnormal numbers count"


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "kind", "capability"),
    [
        pytest.param(
            *each,
            marks=[] if each == (QServe(), "fp16", 90) else [pytest.mark.slow],
            id=" ".join(map(str, each)),
        )
        for each in OF_INTEGERS
    ],
)
def test_products_of_integers_compile_within_limits(
    scheme: Any, kind: str, capability: int
) -> None:
    """Bytes are multiplied by instructions for bytes, of the newest kind that there is; nothing spills."""
    kernel = linear_kernel(LinearKind(scheme, kind, kind, "i8"))
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    of_bytes = {80: "s32.s8.s8.s32", 90: "s32.s8.s8", 100: "kind::i8"}[capability]
    names = ("quantize", "matmul16", "matmul64", "matmul128", "merge")
    some = {variant.name: variant for variant in variants(kernel)}
    for name in names if kind == "fp16" else ("quantize", "matmul64_part"):
        made = PRODUCTS.compiled(kernel, some[name], capability)
        assert made.spills == 0, name
        assert made.shared <= DEVICES[capability].shared_bytes
        assert list(made.matrix) == ([newest] if "matmul" in name else [])
        assert "trap" not in made.ptx
        if "matmul" in name:
            assert of_bytes in made.ptx and "cp.async.cg" in made.ptx
        if name == "quantize":
            assert "div.rn.f32" in made.ptx, "as torch divides"
