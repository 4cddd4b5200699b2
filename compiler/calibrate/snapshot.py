"""A copy of a program's graph as it is now, for measuring the model before later passes change it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.weights import WeightStore


def snapshot(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """(a program with the same inputs, calls and weights, and no output yet; each node's copy)."""
    weights = WeightStore()
    for name in program.weights:
        weights.add(name, program.weights[name])
    cut = Program(program.model, program.shapes, weights=weights, beside=program.beside)
    copies: dict[fx.Node, fx.Node] = {}
    cut.graph.graph_copy(program.graph, copies)
    return cut, copies


def copied(program: Program) -> Program:
    """The same program once more, to be changed for a trial."""
    cut, copies = snapshot(program)
    output = program.output
    results = tuple(copies[node] for node in output.args[0])  # type: ignore[union-attr, index]
    cut.graph.output(results).meta["names"] = list(output.meta["names"])
    return cut


def text_inputs(tokens_BS: Tensor, logit_rows: Tensor | None = None) -> dict[str, Tensor]:
    """The inputs of a language model without a cache for rows of text from position 0 on."""
    return {
        "input_ids": tokens_BS,
        "position_ids": torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous(),
        "logit_rows": torch.zeros(1, dtype=torch.long) if logit_rows is None else logit_rows,
    }


def all_inputs(program: Program, tokens_BS: Tensor) -> dict[str, Tensor]:
    """The inputs of a program for rows of text, with the logits behind every token asked for."""
    rows = torch.arange(tokens_BS.numel())
    return text_inputs(tokens_BS, rows) | program.beside(tokens_BS)
