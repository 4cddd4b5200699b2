"""One layer of an einfold cache for transformers: a program of its own over the runtime's cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compiler.ir.cache.layout import Buffer, CacheLayout
from .compiler.ir.interpreter import Interpreter
from .compiler.ir.ops import IN_PLACE
from .compiler.ir.program import Program
from .compiler.ir.types import DTYPES
from .errors import PromptError, UnsupportedError
from .runtime.cache import Cache, Counts
from .runtime.engine import CHUNK

#: Tokens that a growing cache takes room for at a time, at least; a long one takes an eighth of what it has.
STEP = 64


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer: a program, and the runtime's cache once the batch is known."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, program: Program, layer: int) -> None:
        super().__init__()
        assert program.layout is not None
        self.layout: CacheLayout = program.layout
        self.context = program.model.context
        """Tokens that a row may see at most."""
        self.layer = layer
        self.seen = 0
        """Tokens of the batch so far, padding among them."""
        self.stored = 0
        """The most slots that any row uses."""
        self.cache: Cache | None = None
        self._interpreter = Interpreter(program, instead=IN_PLACE)

    def attend(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, real_BS: Tensor | None, sinks_H: Any
    ) -> Tensor:
        """Puts new tokens behind those that the cache has seen and attends; [B, S, H, D].

        `real` tells tokens from padding, which the cache never sees: its queries get zeros.
        """
        batch, new = q_BSHD.shape[:2]
        if self.cache is not None and batch != self.cache.batch:
            raise PromptError(
                f"a batch of {batch} does not go into a cache of {self.cache.batch} rows; reset() it first"
            )
        coming_B = np.full(batch, new) if real_BS is None else real_BS.sum(1).cpu().numpy()
        cache = self._with_room(coming_B, q_BSHD.device)
        if real_BS is None or bool(real_BS.all()):
            out = self._run(cache, q_BSHD, k_BSKD, v_BSKD, sinks_H)
        else:
            out = (
                torch.zeros_like(q_BSHD[..., :1]).expand(*q_BSHD.shape[:3], v_BSKD.shape[3]).clone()
            )
            for row in range(cache.batch):
                at = real_BS[row].nonzero()[:, 0]
                if len(at):
                    q, k, v = (x[row : row + 1, at] for x in (q_BSHD, k_BSKD, v_BSKD))
                    out[row, at] = self._run(cache.row(row), q, k, v, sinks_H)[0]
        cache.settle()  # the first step is the prompt
        self.seen += new
        self._count()
        return out

    def _count(self) -> None:
        """Notes how full the cache is, in a plain number: compiled models read it."""
        if self.cache is None:
            self.stored = 0
        else:
            clocks = {self.layout.clock(group) for _, _, group in self.layout.groups()}
            self.stored = max(int(self.cache.counters[clock].max()) for clock in clocks)

    def _with_room(self, coming_B: Counts, device: torch.device) -> Cache:
        """The cache with room for so many more tokens of each row; the first step takes the first memory.

        Raises PromptError where the tokens are more than the context.
        """
        longest = int((coming_B if self.cache is None else self.cache.lengths + coming_B).max())
        if longest > self.context:
            raise PromptError(
                f"{longest} tokens do not fit the context of {self.context} that the cache was made for; "
                "give cache_for a larger context"
            )
        if self.cache is None:

            def make(spec: Buffer) -> Tensor:
                shape = [int(size) for size in spec.shape]
                return torch.zeros(shape, dtype=DTYPES[spec.dtype], device=device)

            room = grown(0, longest, self.context)
            self.cache = Cache.allocate(self.layout, len(coming_B), room, longest, make)
        elif longest > self.cache.capacity:
            self.cache.grow(grown(self.cache.capacity, longest, self.context))
        return self.cache

    def _run(self, cache: Cache, q: Tensor, k: Tensor, v: Tensor, sinks_H: Any) -> Tensor:
        parts, start = [], 0
        while start < q.shape[1]:
            size = min(CHUNK, cache.step_limit(), q.shape[1] - start)
            cache.make_room(size)
            chosen = slice(start, start + size)
            inputs = {"q": q[:, chosen], "k": k[:, chosen], "v": v[:, chosen], **cache.buffers}
            if sinks_H is not None:
                inputs["sinks"] = sinks_H
            for name, counts in cache.counters.items():
                inputs[name] = torch.tensor(counts, device=q.device)
            found = self._interpreter.run(inputs)
            parts.append(found.pop("out"))
            observed: dict[str, Any] = {n: x for n, x in found.items() if n not in cache.buffers}
            cache.advance(size, observed)
            start += size
        return torch.cat(parts, dim=1)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored + query_length, self.seen - self.stored

    def get_max_length(self) -> int:
        return self.context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is taken by the first step."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("a layer of an einfold cache is updated through the whole cache")

    def reset(self) -> None:
        self.cache, self.seen, self.stored = None, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens, given as a negative number; refused where tokens leave the slots.

        Of a row with padding in front these may be more than it has: then it is empty.
        """
        if tokens_to_remove > 0:
            raise UnsupportedError("crop takes the tokens to remove as a negative number")
        if self.layout.clocks():
            raise UnsupportedError(
                f"layer {self.layer}: crop cannot bring back tokens that left the cache; use a cache "
                "without prune and quant, or generate without assisted decoding"
            )
        if self.cache is not None and tokens_to_remove:
            np.maximum(self.cache.lengths + tokens_to_remove, 0, out=self.cache.lengths)
            self.seen = max(0, self.seen + tokens_to_remove)
            self._count()

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        if self.cache is not None:
            self.cache = self.cache.select(rows.cpu().numpy())


def grown(capacity: int, needed: int, context: int) -> int:
    """The room that a cache of `capacity` tokens takes when `needed` are to fit, within the context.

    It grows by an eighth, so that copying costs a bounded share of what reading the tokens does.
    """
    wanted = max(needed, capacity + max(STEP, capacity // 8) if capacity else 0)
    return min(context, -(-wanted // STEP) * STEP)
