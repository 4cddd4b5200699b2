"""Which KV heads' full caches recall needs on SmolLM2-135M-Instruct: `python -m benchmarks.head_ablation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from einfold.compiler.ir.kv.keep.window import Window

from .quality.subjects import Questions


@dataclass
class Prompt:
    """A text that was read whole: of every layer its keys and values [K, T, D]."""

    questions: Questions
    keys: list[Tensor]
    values: list[Tensor]


class Ablated:
    """A model whose KV heads are gated: 1 attends to everything, 0 as a head with a window does, and between
    them the outputs are mixed (DuoAttention, section 2.2)."""

    def __init__(self, model: Any, window: Window) -> None:
        self.model, self.window = model, window
        config = model.config
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.gates_LK = torch.ones(self.layers, self.kv_heads)
        self._prompt: Prompt | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []
        AttentionInterface.register("ablated", self._attention)
        AttentionMaskInterface.register("ablated", lambda *given, **options: None)
        model.set_attn_implementation("ablated")
        model.requires_grad_(False)

    @torch.no_grad()
    def read(self, questions: Questions) -> Prompt:
        self._prompt, self._seen = None, []
        self.model(torch.tensor([questions.tokens[: questions.prompt]]), use_cache=False, logits_to_keep=1)
        keys, values = zip(*self._seen, strict=True)
        return Prompt(questions, list(keys), list(values))

    def answers(self, prompt: Prompt, gates_LK: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of every answer's tokens in nats, whether all of them were the likeliest), [answers] each."""
        asked = prompt.questions
        self._prompt, self.gates_LK = prompt, gates_LK
        tokens = torch.tensor(asked.tokens)
        places = torch.arange(asked.prompt - 1, len(tokens) - 1)
        # The prompt's last token is asked of the pruned cache too.
        logits = self.model(
            tokens[None, asked.prompt - 1 : -1], position_ids=places[None], use_cache=False
        ).logits[0]
        shares = torch.log_softmax(logits.float(), -1)
        loss, right = [], []
        for answer in asked.answers:
            rows = shares[answer.start - asked.prompt : answer.stop - asked.prompt]
            wanted = tokens[answer.start : answer.stop]
            loss.append(-rows.gather(1, wanted[:, None]).sum())
            right.append((rows.argmax(-1) == wanted).all())
        return torch.stack(loss), torch.stack(right)

    def _attention(
        self, module: Any, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, prompt = module.layer_idx, self._prompt
        if prompt is None:
            self._seen.append((k_BKSD[0], v_BKSD[0]))
            out = functional.scaled_dot_product_attention(
                q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2).contiguous(), None
        old = prompt.questions.prompt - 1
        keys = torch.cat((prompt.keys[layer][None, :, :old], k_BKSD), 2)
        values = torch.cat((prompt.values[layer][None, :, :old], v_BKSD), 2)
        gate_K = self.gates_LK[layer]
        each = q_BHSD.shape[1] // self.kv_heads
        outs = []
        for head in range(self.kv_heads):
            q = q_BHSD[:, head * each : (head + 1) * each]
            k, v, gate = keys[:, head : head + 1], values[:, head : head + 1], gate_K[head]
            soft = gate.requires_grad
            full = self._full(q, k, v, scaling, old) if soft or gate > 0 else None
            part = self._windowed(q, k, v, scaling, old) if soft or gate < 1 else None
            if full is None or part is None:
                outs.append(part if full is None else full)
            else:
                outs.append(gate * full + (1 - gate) * part)
        return torch.cat(outs, 1).transpose(1, 2).contiguous(), None

    def _full(self, q: Tensor, k: Tensor, v: Tensor, scale: float, old: int) -> Tensor:
        row = torch.arange(old, old + q.shape[2])
        mask = row[:, None] >= torch.arange(k.shape[2])
        return self._attend(q, k, v, scale, mask.float().log())

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, scale: float, old: int) -> Tensor:
        """Sinks, the newest `recent` tokens, and the mean of the prompt's that lie between them."""
        sinks, recent = self.window.sinks, self.window.recent
        begin = old + 1 - recent
        if begin <= sinks:
            begin = sinks
        row, place = torch.arange(old, old + q.shape[2])[:, None], torch.arange(begin, k.shape[2])
        near = (place <= row) & (place > row - recent)
        mask = torch.cat((torch.ones(len(row), sinks, dtype=torch.bool), near), 1).float().log()
        keys = torch.cat((k[:, :, :sinks], k[:, :, begin:]), 2)
        values = torch.cat((v[:, :, :sinks], v[:, :, begin:]), 2)
        gone = begin - sinks
        if self.window.compensation and gone > 0:
            keys = torch.cat((k[:, :, sinks:begin].mean(2, keepdim=True), keys), 2)
            values = torch.cat((v[:, :, sinks:begin].mean(2, keepdim=True), values), 2)
            mask = torch.cat((torch.full((len(row), 1), math.log(gone)), mask), 1)
        return self._attend(q, keys, values, scale, mask)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * scale + mask, -1) @ v


def recall(model: Ablated, prompts: Sequence[Prompt], gates_LK: Tensor) -> tuple[float, float]:
    """(share of answers recalled, mean loss of an answer in nats)."""
    with torch.no_grad():
        found = [model.answers(prompt, gates_LK) for prompt in prompts]
    loss, right = (torch.cat(part) for part in zip(*found, strict=True))
    return float(right.float().mean()), float(loss.mean())


def gradient(model: Ablated, prompts: Sequence[Prompt], gates_LK: Tensor) -> tuple[Tensor, float]:
    """(how the mean loss of an answer changes with each gate, that loss), by one pass backwards a prompt."""
    gates = gates_LK.clone().requires_grad_()
    total, count = 0.0, sum(len(prompt.questions.answers) for prompt in prompts)
    for prompt in prompts:
        loss = model.answers(prompt, gates)[0].sum() / count
        loss.backward()
        total += float(loss.detach())
    assert gates.grad is not None
    return gates.grad, total
