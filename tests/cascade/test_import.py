"""Graphs to cascades: ranks follow the values, whatever their sizes, and what does not fit is an input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from einfold.compiler.frontend.cascade.imported import Imported
from einfold.compiler.frontend.cascade.importer import import_graph
from einfold.compiler.frontend.cascade.trace import import_function
from einfold.compiler.fuse.explain import explain_function
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.cascade.printer import print_statement
from einfold.errors import UnsupportedError


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(function: Callable[..., Any], *inputs: Tensor) -> Imported:
    """Imports, and compares with torch on the same inputs."""
    imported = import_function(function, inputs)
    assert not imported.opaque
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    arrays = imported.arrays({n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    expected = function(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = imported.restored(evaluate(imported.cascade, arrays, imported.sizes))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == tuple(theirs.shape)
        np.testing.assert_allclose(mine, theirs.double().numpy(), rtol=1e-9, atol=1e-12)
    return imported


def lines(imported: Imported) -> list[str]:
    return [print_statement(item) for item in imported.cascade.statements]


def test_equal_sizes_are_not_one_rank() -> None:
    imported = check(lambda q, k: q @ k.mT, random(4, 4), random(4, 4))
    assert lines(imported) == ["matmul[b, s] = q[b, h] * k[s, h] :: sum(h)"]


def test_one_tensor_twice_is_two_ranks() -> None:
    imported = check(lambda x: (x @ x.mT) @ x, random(3, 5))
    assert lines(imported) == [
        "matmul[b, s] = x[b, h] * x_1[s, h] :: sum(h)",
        "matmul_1[b, h] = matmul[b, s] * x_1[s, h] :: sum(s)",
    ]


def test_a_merged_dimension_is_cut_where_it_meets_two() -> None:
    def grouped(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.repeat_interleave(3, dim=0).mT

    imported = check(grouped, random(6, 4, 5), random(2, 7, 5))
    assert lines(imported) == ["matmul[b, g, s, t] = q[b, g, s, h] * k[b, t, h] :: sum(h)"] or (
        len(imported.inputs[0].dims[0]) == 2
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, 3, 8).permute(1, 0, 2).flatten(1),
        lambda x: x.reshape(6, 2, 4).sum(1),
        lambda x: x.unsqueeze(1).expand(-1, 5, -1).sum((1, 2)),
        lambda x: x.repeat(2, 3).mean(0),
        lambda x: torch.softmax(x.reshape(2, 3, 2, 4), dim=1).flatten(),
        lambda x: x.std(-1, keepdim=True) + x.var(0, correction=0),
        lambda x: (
            torch.linalg.vector_norm(x, 3, dim=-1) * x.norm(dim=1) / x.norm(float("inf"), dim=1)
        ),
        lambda x: x.amin(0) + x.max() - x.sum(),
        lambda x: torch.nn.functional.normalize(x, dim=0).pow(3).clamp(-0.1, 0.2),
        lambda x: torch.triu(x[:, :6], 1) if x.shape[1] == 6 else torch.triu(x, 1),
        lambda x: torch.einsum("ij,ik->jk", x, x),
        lambda x: torch.einsum("ij->i", x) + torch.einsum("ij,ij,kj->ik", x, x, x).mean(),
        lambda x: torch.nn.functional.gelu(x) + torch.nn.functional.softplus(x) + torch.expm1(x),
        lambda x: torch.logsumexp(x, (0, 1)) + torch.special.entr(x.abs()).sum(),
        lambda x: x.movedim(0, 1) @ x,
        lambda x: torch.maximum(x, x.mean(1, keepdim=True)).nan_to_num(),
        lambda x: torch.var_mean(x, dim=1),
        lambda x: (x * torch.arange(x.shape[1])).sum(-1) + torch.full((6,), 2.0),
        lambda x: (
            torch.rms_norm(x, (8,)) + torch.baddbmm(x[None], x[None], torch.eye(8)[None].double())
        ),
        lambda x: (
            torch.where(x > 0, x, -1.0).log_softmax(-1).gather(1, x.argmax(1, keepdim=True) * 0)
        ),
    ],
)
def test_operators(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    inputs = (random(6, 8),)
    imported = import_function(function, inputs)
    if imported.opaque:
        assert set(imported.opaque) <= {"eye", "argmax", "slice_1", "slice_2"}
        return
    check(function, *inputs)


def test_what_has_no_form_is_an_input_and_its_source_an_output() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.cumsum(q @ k.mT, dim=-1)
        return torch.softmax(scores, dim=-1) @ v

    imported = import_function(function, (random(3, 4), random(5, 4), random(5, 2)))
    assert imported.opaque == {"cumsum": "aten.cumsum has no form as a cascade"}
    assert [b.node for b in imported.inputs] == ["q", "k", "v", "cumsum"]
    assert [b.node for b in imported.outputs] == ["matmul_1", "matmul"]


def test_dynamic_sizes_name_their_extents() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v

    keys = torch.export.Dim("keys", min=2)
    exported: Any = torch.export.export(
        Attention(),
        (random(2, 4), random(7, 4), random(7, 3)),
        dynamic_shapes=({}, {0: keys}, {0: keys}),
        strict=False,
    )
    cascade = import_graph(exported.graph).cascade
    extents = {rank.extent for rank in cascade.ranks.values()}
    assert {"2", "4", "3"} < extents and len(extents) == 4


def test_options_without_a_rule_are_not_passed_over() -> None:
    imported = import_function(lambda x: torch.round(x, decimals=2).sum(0), (random(3, 4),))
    assert imported.opaque == {"round_1": "aten.round with decimals"}


def test_a_graph_that_writes_in_place_is_refused() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x.mT
            y.mul_(2)
            return y.sum(0)

    exported: Any = torch.export.export(Scaled(), (random(3, 4),), strict=False)
    with pytest.raises(UnsupportedError, match="functionalize"):
        import_graph(exported.graph)


def test_in_place_operators() -> None:
    def function(q: Tensor, k: Tensor, live: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.mul_(0.5)
        scores.masked_fill_(~live, -math.inf)
        return torch.softmax(scores, dim=-1).sum(0)

    report = explain_function(function, (random(3, 4), random(5, 4), torch.rand(3, 5) < 2))
    assert not report.imported.opaque


def test_attention_after_dispatch() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q.mul_(0.5)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    report = explain_function(function, [random(1, 2, 6, 8) for _ in range(3)])
    assert not report.imported.opaque
    assert (report.passes_before, report.passes_after) == (3, 1)


def test_a_joined_tensor_cannot_be_an_output() -> None:
    def function(x: Tensor, sink: Tensor) -> Tensor:
        return torch.softmax(torch.cat([x, sink], dim=-1), dim=-1)

    with pytest.raises(UnsupportedError, match="joined"):
        import_function(function, (random(3, 4), random(3, 1)))


def test_what_cannot_be_traced_is_said() -> None:
    def function(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace"):
        import_function(function, (random(3),))


def test_nothing_to_fold_is_said() -> None:
    with pytest.raises(UnsupportedError, match="nothing is reduced"):
        explain_function(lambda x: x + 1, (random(3),))
