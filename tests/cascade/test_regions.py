"""The cascade of a whole layer is cut into an attention and two norms, and each computes its part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from einfold.compiler.analysis.cascade.check import run_plans
from einfold.compiler.explain import explain_regions
from einfold.compiler.frontend.cascade.trace import import_function
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
