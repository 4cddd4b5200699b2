"""Kernels in Triton's interpreter against float64: every form, odd shapes, edges, and wrong plans."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ...cascade.conftest import load
from .conftest import needs_triton

Ask = Callable[..., dict[str, float]]

pytestmark = needs_triton

FORMS = [form.name for form in load("attention_forms").FORMS]
#: Forms without a kernel, and why.
WITHOUT = {"talking heads": "its state is a tile of four axes"}
#: One of each kind, for what costs more to run.
KINDS = [
    "softmax",
    "causal by positions",
    "sliding window",
    "softcap",
    "ALiBi",
    "sinks by concatenation",
    "GQA by reshaped queries",
    "sigmoid attention",
    "linear attention, causal",
    "log-sum-exp as an output",
    "mean and variance under the attention",
    "K/V dequantized, per token",
    "K/V dequantized, per channel",
    "document mask",
    "RMS-normed queries and keys",
]


@pytest.mark.parametrize("form", [name for name in FORMS if name not in WITHOUT])
def test_every_form_whole_and_in_parts(interpreted: Ask, form: str) -> None:
    for way, error in interpreted(form).items():
        assert error < 2e-5, way


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_odd_shapes(interpreted: Ask, form: str, dtype: str) -> None:
    sizes = {"H": 4, "K": 2, "S": 19, "T": 37, "D": 20}
    tolerance = 2e-5 if dtype == "fp32" else 6e-3
    parts = [1] if dtype == "fp32" else [2]
    found = interpreted(form, sizes=sizes, dtype=dtype, tiles=[16, 16], parts=parts)
    for way, error in found.items():
        assert error < tolerance, way


@pytest.mark.parametrize("form", ["softmax", "causal by tril", "GQA by repeat_interleave"])
def test_one_query_and_one_key(interpreted: Ask, form: str) -> None:
    sizes = {"H": 4, "K": 2, "S": 1, "T": 1}
    assert max(interpreted(form, sizes=sizes).values()) < 2e-5


@pytest.mark.parametrize("form", ["softmax", "document mask", "K/V dequantized, per token"])
def test_strided_inputs(interpreted: Ask, form: str) -> None:
    assert max(interpreted(form, strided=True).values()) < 2e-5


@pytest.mark.parametrize(
    "form", ["boolean mask, -inf", "boolean mask, -1e30", "scaled_dot_product_attention"]
)
def test_dead_rows(interpreted: Ask, form: str) -> None:
    """NaN, the mean of the values or 0, as the graph has it, and its neighbours unharmed."""
    fill = {"mask": {"row": 2, "value": 0}}
    assert max(interpreted(form, fill=fill).values()) < 2e-5


@pytest.mark.parametrize("value", ["nan", "inf", "3e38"])
@pytest.mark.parametrize("form", ["boolean mask, -inf", "boolean mask, -1e30"])
def test_what_a_mask_hides(interpreted: Ask, form: str, value: str) -> None:
    """A key that no row sees."""
    fill = {"mask": {"column": 3, "value": 0}, "k": {"row": 3, "value": value}}
    assert max(interpreted(form, fill=fill).values()) < 2e-5


@pytest.mark.parametrize("value", [-3.4028234663852886e38, -math.inf])
def test_rows_of_the_least_float(interpreted: Ask, value: float) -> None:
    fill = {"mask": {"row": 1, "value": str(value)}}
    assert max(interpreted("additive mask", fill=fill).values()) < 2e-5


@pytest.mark.parametrize("form", ["softmax", "log-sum-exp as an output", "causal by tril"])
def test_large_logits(interpreted: Ask, form: str) -> None:
    """Logits in the thousands: nothing overflows, and the error is that of the logits in float32."""
    assert max(interpreted(form, scale=40.0).values()) < 5e-3


@pytest.mark.parametrize("form", ["softmax", "softcap", "causal by tril", "sinks in front"])
def test_lazy_references(interpreted: Ask, form: str) -> None:
    assert max(interpreted(form, lazy=8.0, scale=3.0).values()) < 2e-5


def test_static_references(interpreted: Ask) -> None:
    assert max(interpreted("softcap", static=True, scale=3.0).values()) < 2e-5


def test_exponentials_of_base_e(interpreted: Ask) -> None:
    assert max(interpreted("softmax", base_two=False).values()) < 2e-5


@pytest.mark.parametrize("how", ["drop", "swap"])
@pytest.mark.parametrize("form", ["softmax", "log-sum-exp as an output", "causal by positions"])
def test_a_wrong_plan_is_seen(interpreted: Ask, form: str, how: str) -> None:
    """A correction dropped or a monoid swapped: if this passed, the tests above would prove nothing."""
    errors = interpreted(form, mutate=how, scale=4.0)
    assert min(errors.values()) > 1e-3
