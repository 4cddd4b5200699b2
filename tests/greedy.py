"""Greedy continuations by Hugging Face, and the rule by which others are compared with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import einfold

NEAR_TIE = 1e-4


def greedy_batch(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What `generate` continues the prompts with: one batch, padded on the left, no early end."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[:, longest:].tolist()  # type: ignore[no-any-return]


def all_logits(model: einfold.Model, tokens: list[int]) -> npt.NDArray[np.float32]:
    """An artifact's logits behind every token of a text, [tokens, V]."""
    return np.concatenate([logits.copy() for _, logits in model.logits(tokens)])


def check_tokens(model: Any, prompt: list[int], expected: list[int], found: list[int]) -> None:
    """Equal tokens; a difference only where the reference's two best logits are a near-tie."""
    assert len(found) == len(expected)
    for place, (want, got) in enumerate(zip(expected, found, strict=True)):
        if want == got:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected[:place]])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] < NEAR_TIE, f"token {place}: {got} where {want} was expected"
        return  # after a near-tie the texts may part
