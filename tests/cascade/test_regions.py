"""The cascade of a whole layer is cut into an attention and two norms, and each computes its part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from einfold.compiler.analysis.cascade.check import run_plans
from einfold.compiler.analysis.cascade.regions import regions
from einfold.compiler.frontend.cascade.trace import import_function
from einfold.compiler.fuse.explain import explain_regions
from einfold.compiler.ir.cascade.cascade import Cascade
from einfold.compiler.ir.cascade.evaluate import evaluate

HIDDEN, HEADS, GROUPS, HEAD, TOKENS = 16, 4, 2, 8, 7


class Layer(nn.Module):
    """A decoder layer: RMSNorm, grouped causal attention, residual, RMSNorm, gated MLP, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * HEAD, bias=False)
        self.k = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.v = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.o = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)
        self.up, self.gate = nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 24)
        self.down = nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        q = self.q(normed).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        k, v = (w(normed).unflatten(-1, (GROUPS, HEAD)).transpose(1, 2) for w in (self.k, self.v))
        k, v = (y.repeat_interleave(HEADS // GROUPS, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
        live = torch.tril(torch.ones(TOKENS, TOKENS, dtype=torch.bool))
        weights = torch.softmax(scores.masked_fill(~live, -math.inf), dim=-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        normed = self.second(x)
        return x + self.down(self.up(normed) * torch.nn.functional.silu(self.gate(normed)))


def of_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within a window, on queries and keys of length one."""
    q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    live = (column <= row) & (column > row - 3)
    return torch.softmax((q @ k.mT).masked_fill(~live, -math.inf), dim=-1) @ v


def test_no_reduction_is_in_two_regions(plan_cache: Path) -> None:
    """Scores follow from the norms along the head and feed the softmax along the keys: one has them."""
    inputs = tuple(torch.randn(2, 3, TOKENS, HEAD, dtype=torch.float64) for _ in range(3))
    imported = import_function(of_normalised, inputs)
    (attention,) = explain_regions(imported, plan_cache)
    assert imported.sizes[attention.rank] == TOKENS
    assert (attention.status, attention.passes_before, attention.passes_after) == ("fused", 3, 1)
    scores = [
        s for s in attention.cascade.statements if s.op == "sum" and attention.rank in s.ranks
    ]
    assert len(scores) == 1


def test_what_a_region_leaves_is_cut_again() -> None:
    """A norm along the head with two passes of its own stays a region beside the attention."""

    def centred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q - q.mean(-1, keepdim=True)
        return of_normalised(q, k, v)

    inputs = tuple(torch.randn(2, 3, TOKENS, HEAD, dtype=torch.float64) for _ in range(3))
    imported = import_function(centred, inputs)
    found = regions(imported.cascade)
    assert {imported.sizes[part.rank] for part in found} == {TOKENS, HEAD}
    first, second = (part.reductions for part in found)
    assert not first & second


def test_a_layer_has_an_attention_and_two_norms(plan_cache: Path) -> None:
    torch.manual_seed(0)
    layer = Layer().double().eval()
    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    imported = import_function(layer, (x,))
    assert len(imported.weights) == 12
    reports = explain_regions(imported, plan_cache)
    assert all(report.status == "fused" and report.passes_after == 1 for report in reports)
    attention = [r for r in reports if imported.sizes[r.rank] == TOKENS]
    assert len(attention) == 1
    assert attention[0].passes_before == 3
    assert not set(attention[0].cascade.inputs) & imported.weights
    nodes = {imported.nodes[name].node for name in attention[0].cascade.inputs}
    assert len(nodes) == 3  # q, k, v as the graph has them
    norms = [r for r in reports if imported.sizes[r.rank] == HIDDEN]
    assert {r.passes_before for r in norms} == {2}

    given = {"x": x.numpy()}
    for name, parameter in layer.named_parameters():
        given[f"p_inner_{name.replace('.', '_')}"] = parameter.detach().numpy()
    whole = imported.cascade
    everything = Cascade(
        whole.ranks, whole.inputs, whole.statements, tuple(s.name for s in whole.statements)
    )
    values = evaluate(everything, imported.arrays(given), imported.sizes)
    random = np.random.default_rng(0)
    for report in reports:
        values |= {name: imported.arrays(given)[name] for name in whole.inputs}
        arrays = {name: values[name] for name in report.cascade.inputs}
        found = run_plans(report.folding.plans, arrays, random, "tree", imported.sizes)
        for name in report.cascade.outputs:
            np.testing.assert_allclose(found[name], values[name], rtol=1e-9, atol=1e-12)
    mine = imported.restored({n: values[n] for n in whole.outputs})[0]
    np.testing.assert_allclose(mine, layer(x).detach().numpy(), rtol=1e-9, atol=1e-12)
