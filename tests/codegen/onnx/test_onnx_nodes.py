"""ONNX's public tests of its nodes Attention and TensorScatter, written in plain torch and exported.

Each is rebuilt from its node's attributes (`node_modules.py`), and what onnxruntime makes of the export is
compared with the numbers that come with the test, within the test's own tolerance. Those were made by onnx's
reference evaluator. It rounds to float16 and bfloat16 behind every step and an export does not, so two of the
last places of bfloat16 are allowed, as onnx's own runner of these tests allows them.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.backend.test.case import node as cases
from torch import Tensor

import einfold

from . import node_modules

OPERATORS = ("Attention", "TensorScatter")
FLAVOURS = pytest.mark.parametrize("portable", [False, True], ids=["ort", "portable"])

#: Whether what the tests of this release hold is what `node_modules.py` computes.
SAME = tuple(map(int, onnx.__version__.split(".")[:2])) >= (1, 23)

pytestmark = pytest.mark.skipif(
    not SAME,
    reason="before 1.23 onnx specified softcaps, causal masks and rows that see nothing differently",
)


def collect() -> dict[str, Any]:
    """The tests of single nodes by name; `_expanded` ones are the same numbers again.

    onnx makes a test when its module is imported. `collect_testcases` imports those of all operators.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in OPERATORS:
            import_module(f"{cases.__name__}.{name.lower()}")
    return {
        case.name.removeprefix("test_"): case
        for case in cases._NodeTestCases
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in OPERATORS
    }


CASES = collect() if SAME else {}

#: One of each kind. All others are slow, together.
QUICK = {
    "attention_4d_gqa_scaled",
    "attention_4d_diff_heads_sizes_attn_mask",
    "attention_4d_attn_mask_bool_4d",
    "attention_4d_gqa_with_past_and_present_fp16",
    "attention_4d_with_qk_matmul_softcap",
    "attention_3d_gqa_causal",
    "attention_3d_with_past_and_present_qk_matmul_bias",
    "attention_4d_causal_padded_kv_bf16",
    "attention_4d_softcap_neginf_mask_poison",
    "attention_24_fullymasked_qk_matmul_output_mode3_zero",
    "attention_causal_boolmask_nan_robustness",
    "attention_4d_causal_nonpad_negative_offset_structural_empty",
    "attention_bidirectional_window",
    "attention_local_window_ext_cache_rank3_head_mask",
    "attention_local_window_gqa_rank4_mask",
    "tensorscatter_circular",
    "tensorscatter_3d",
}


def named(names: set[str]) -> list[str]:
    return [name for name in CASES if name in names]


def tensor(array: Any) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def run(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """What onnxruntime gives; of bfloat16, which numpy does not know, the bits are handed over."""
    session = onnxruntime.InferenceSession(str(path))
    feeds = {}
    for node in session.get_inputs():
        given = inputs[
            int(node.name.rpartition("_")[2])
        ]  # inputs are tensors_0, tensors_1 and so on
        if given.dtype == torch.bfloat16:
            bits = given.view(torch.int16).numpy().view(np.uint16)
            number = onnx.TensorProto.BFLOAT16
            make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
            feeds[node.name] = make(bits, number)
        else:
            feeds[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(given.numpy())
    return [torch.from_dlpack(found) for found in session.run_with_ort_values(None, feeds)]


def check(name: str, portable: bool, folder: Path) -> None:
    case = CASES[name]
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    names = [n for n in node.input if n], [n for n in node.output if n]
    module = getattr(node_modules, node.op_type)(*names, **attributes).eval()
    ((given, wanted),) = case.data_sets
    inputs = [tensor(array) for array in given]
    path = einfold.export_onnx(module, folder / "a", tuple(inputs), portable=portable)
    found = run(path, inputs)
    for got, want in zip(found, map(tensor, wanted), strict=True):
        rtol = 2**-6 if want.dtype == torch.bfloat16 else case.rtol
        torch.testing.assert_close(got, want, rtol=rtol, atol=case.atol, equal_nan=True)


@FLAVOURS
@pytest.mark.parametrize("name", named(QUICK))
def test_one_of_each_kind(name: str, portable: bool, tmp_path: Path) -> None:
    check(name, portable, tmp_path)


@pytest.mark.slow
@FLAVOURS
@pytest.mark.parametrize("name", named(set(CASES) - QUICK))
def test_all_others(name: str, portable: bool, tmp_path: Path) -> None:
    check(name, portable, tmp_path)


def test_none_is_missing() -> None:
    """What this release of onnx brings, and no misspelt name among the quick ones."""
    assert set(CASES) >= QUICK
    kinds = [case.model.graph.node[0].op_type for case in CASES.values()]
    assert kinds.count("Attention") >= 90
    assert kinds.count("TensorScatter") >= 3
