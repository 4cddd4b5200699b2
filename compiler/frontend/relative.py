"""Relative positions as tables by distance: what T5 and its kin add to the logits of attention.

Such a module has `compute_bias`, which looks a bucket of distances up for every pair of a query and a key.
Which bucket a distance is in depends on no weight: a probe reads it off once, and the rest is a table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def by_distance(decoder: nn.Module, reach: int) -> Iterator[list[Tensor]]:
    """While the block runs, each `compute_bias` of a causal decoder gives [H, R]: what is added for a key
    that is 0, 1, .. tokens behind the query. The list is of the tables that were given."""
    given: list[Tensor] = []

    def replacement(module: Any) -> Callable[..., Tensor]:
        buckets = _buckets(module, reach).flip(0)

        def table(*_: Any, **__: Any) -> Tensor:
            given.append(module.relative_attention_bias.weight[buckets].transpose(0, 1))
            return given[-1]

        return table

    with _replaced(decoder, replacement):
        yield given


@contextmanager
def by_pair(encoder: nn.Module, reach: int) -> Iterator[None]:
    """While the block runs, each `compute_bias` of an encoder reads [1, H, S, T] from such a table, of at
    most so many tokens before the query and behind it."""

    def replacement(module: Any) -> Callable[..., Tensor]:
        buckets = _buckets(module, reach, reach - 1)

        def bias(queries: int, keys: int, *_: Any, **__: Any) -> Tensor:
            table_HR = module.relative_attention_bias.weight[buckets].transpose(0, 1)
            apart = torch.arange(keys)[None] - torch.arange(queries)[:, None] + (reach - 1)
            found: Tensor = table_HR[:, apart][None]
            return found

        return bias

    with _replaced(encoder, replacement):
        yield


@contextmanager
def _replaced(
    part: nn.Module, replacement: Callable[[Any], Callable[..., Tensor]]
) -> Iterator[None]:
    changed: list[Any] = [module for module in part.modules() if _is_relative(module)]
    for module in changed:
        module.compute_bias = replacement(module)
    try:
        yield
    finally:
        for module in changed:
            del module.compute_bias


def _is_relative(module: Any) -> bool:
    """Whether a module looks its bias up by pairs of tokens; LongT5's looks it up by blocks of them."""
    if not getattr(module, "has_relative_attention_bias", False):
        return False
    compute = getattr(module, "compute_bias", None)
    return compute is not None and "past_seen_tokens" in inspect.signature(compute).parameters


def _buckets(module: Any, behind: int, ahead: int = 0) -> Tensor:
    """The bucket of each of the keys around a query, from the farthest behind it on, [behind + ahead]."""
    table = module.relative_attention_bias
    numbers = torch.arange(table.num_embeddings, dtype=torch.float32)[:, None]
    probe = nn.Embedding.from_pretrained(numbers.expand(table.weight.shape).contiguous())
    module.relative_attention_bias = probe
    try:
        with torch.no_grad():
            row = module.compute_bias(1, behind + ahead, past_seen_tokens=behind - 1)
    finally:
        module.relative_attention_bias = table
    found: Tensor = row[0, 0, 0].round().long()
    return found


__all__ = ["by_distance", "by_pair"]
