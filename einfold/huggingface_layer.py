"""One layer of an einfold cache for transformers: a program of its own over the runtime's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compiler.ir.interpreter import Interpreter
from .compiler.ir.kv.layout import Buffer, CacheLayout, HeadGroup, cache_name
from .compiler.ir.ops.attention import CachedAttention, OverOwnSlots
from .compiler.ir.ops.bounded import BoundedAttention
from .compiler.ir.ops.record import in_place
from .compiler.ir.program import Program, call_arguments
from .compiler.ir.types import DTYPES
from .compiler.layer_program import packed, unpacked
from .errors import PromptError, UnsupportedError
from .huggingface_masks import read_mask
from .runtime.buffers import Counts
from .runtime.cache import Cache
from .runtime.engine import CHUNK

#: Tokens that a growing cache takes room for at a time, at least; a long one takes an eighth of what it has.
STEP = 64

#: What attends over slots that hold tokens in their order, so that a mask may hide some.
_MASKED: tuple[type[OverOwnSlots], ...] = (CachedAttention, BoundedAttention)


@dataclass(frozen=True)
class OnDevice:
    """Makes buffers as tensors on a device."""

    device: torch.device

    def __call__(self, spec: Buffer) -> Tensor:
        shape = [int(size) for size in spec.shape]
        return torch.zeros(shape, dtype=DTYPES[spec.dtype], device=self.device)


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer: a program, and the runtime's cache once the batch is known."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, program: Program, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.seen = 0
        """Tokens of the batch so far, padding among them."""
        self.stored = 0
        """The most slots that any row uses."""
        self.cache: Cache | None = None
        self.known: Tensor | None = None
        """Which of the tokens so far are real and not padding, [B, seen]."""
        self._read(program)

    def _read(self, program: Program) -> None:
        assert program.layout is not None
        self.program = program
        self.layout: CacheLayout = program.layout
        self.context = program.model.context
        """Tokens that a row may see at most."""
        kinds = (kind.overload() for kind in _MASKED)
        calls = map(call_arguments, program.nodes(*kinds))
        self._window = max((int(found["window"]) for found in calls), default=0)
        self._interpreter = Interpreter(program, instead=in_place())

    def attend(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, sinks_H: Any
    ) -> Tensor:
        """Puts new tokens behind those that the cache has seen and attends; [B, S, H, D].

        The mask is as transformers gives it, [B, T] or [B, 1, S, T] over all tokens, or none. Padding never
        enters the cache, and its queries get zeros.
        """
        batch, new = q_BSHD.shape[:2]
        if self.cache is not None and batch != self.cache.batch:
            raise PromptError(
                f"a batch of {batch} does not go into a cache of {self.cache.batch} rows; reset() it first"
            )
        out = q_BSHD.new_zeros((*q_BSHD.shape[:3], v_BSKD.shape[3]))
        if not batch or not new:
            self.seen += new
            return out
        known = q_BSHD.new_ones((batch, 0), dtype=torch.bool) if self.known is None else self.known
        asked = read_mask(mask, known, new, self._window)
        if asked.shown_BST is not None:
            self._check_told_apart()
        cache = self._with_room(asked.real_BS.sum(1).cpu().numpy(), q_BSHD.device)
        if asked.shown_BST is None and bool(asked.real_BS.all()):
            out = self._run(cache, q_BSHD, k_BSKD, v_BSKD, sinks_H)
        else:
            real_BT = torch.cat((known, asked.real_BS), 1)
            for row in range(batch):
                at = asked.real_BS[row].nonzero()[:, 0]
                if not len(at):
                    continue
                q, k, v = (x[row : row + 1, at] for x in (q_BSHD, k_BSKD, v_BSKD))
                shown = None
                if asked.shown_BST is not None:
                    shown = asked.shown_BST[row][at][:, real_BT[row]]
                out[row, at] = self._run(cache.row(row), q, k, v, sinks_H, shown)[0]
        cache.settle()  # the first step is the prompt
        self.seen += new
        self.known = torch.cat((known, asked.real_BS), 1)
        self._count()
        return out

    def check_new(self, new: int, positions: Tensor | None) -> None:
        """Raises PromptError where the whole text comes again: `generate(use_cache=False)` feeds it so."""
        if not 0 < self.seen < new or positions is None or positions.dim() != 2:
            return
        if bool((positions[:, 0] == 0).all()) and int(positions.max()) >= self.seen:
            raise PromptError(
                f"{new} tokens from position 0 on came to a cache that has seen {self.seen}: the text is fed "
                "again; generate with use_cache=True, or reset() the cache first"
            )

    def _check_told_apart(self) -> None:
        """Raises UnsupportedError where slots do not hold tokens in their order, each as it came."""
        for _, _, group in self.layout.groups():
            if group.reader.reorders:
                raise UnsupportedError(
                    f"layer {self.layer}: the mask hides some tokens from others, but "
                    f"{group.reader.name} puts tokens into other slots; give a mask of "
                    "padding alone, or leave alike out of cache.read"
                )
            if not in_order(group):
                raise UnsupportedError(
                    f"layer {self.layer}: the mask hides some tokens from others, but a cache that keeps "
                    f"{group.describe()} does not tell tokens apart once they have left its slots; give a "
                    "mask of padding alone, or a cache without prune, quant and share"
                )

    def _count(self) -> None:
        """Notes how full the cache is, in a plain number: compiled models read it."""
        if self.cache is None or not self.cache.batch:
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
            room = grown(0, longest, self.context)
            make = OnDevice(device)
            self.cache = Cache.allocate(
                self.layout, len(coming_B), room, longest, make, key_scales=self._key_scales()
            )
        elif longest > self.cache.capacity:
            self.cache.grow(grown(self.cache.capacity, longest, self.context))
        return self.cache

    def _key_scales(self) -> dict[str, Any]:
        """What the codes of keys stand for, as `runtime/key_scales.py` has it of an artifact."""
        names = {cache_name(layer.layer, index) for layer, index, _ in self.layout.reordered}
        weights = self.program.weights
        scaled = [name for name in names if f"{name}.key_scale" in weights]
        return {name: weights[f"{name}.key_scale"].load().cpu().numpy() for name in scaled}

    def _run(
        self,
        cache: Cache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Any,
        shown_ST: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens, in chunks; of one row where `shown` says which tokens each one sees."""
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
            interpreter = self._interpreter
            if shown_ST is not None:
                interpreter = self._masked(shown_ST[chosen], int(cache.lengths[0]) + size)
            found = interpreter.run(inputs)
            parts.append(found.pop("out"))
            observed: dict[str, Any] = {n: x for n, x in found.items() if n not in cache.buffers}
            cache.advance(size, observed)
            start += size
        return torch.cat(parts, dim=1)

    def _masked(self, shown_ST: Tensor, total: int) -> Interpreter:
        """Runs the layer for new tokens of one row that see some of its `total` tokens, as they say.

        Raises UnsupportedError where one of these has left the slots, or is still to come.
        """

        def attend(call: OverOwnSlots) -> Tensor:
            held = int(call.used_B[0]) + len(shown_ST)
            gone = shown_ST[:, : total - held].any() or shown_ST[:, total:].any()
            if bool(gone):
                raise UnsupportedError(
                    f"layer {self.layer}: the mask shows a token that the cache does not hold: it left "
                    "behind the layer's own window, or is fed in a later chunk"
                )
            shown_SC = shown_ST.new_zeros((len(shown_ST), call.slots))
            shown_SC[:, :held] = shown_ST[:, total - held : total]
            return call.seeing(shown_SC[None])

        replaced = {kind.overload(): kind.standing_in(attend) for kind in _MASKED}
        return Interpreter(self.program, instead=in_place() | replaced)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """A layer with a cache of its own; the program, which nothing changes, is shared."""
        made = Layer.__new__(Layer)
        made.__dict__.update(self.__dict__)
        if self.cache is not None:
            made.cache = self.cache.copy()
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["layout"], state["_interpreter"]
        return state | {"program": packed(state["program"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        program = unpacked(state.pop("program"))
        self.__dict__.update(state)
        self._read(program)
        if self.cache is not None:
            self.cache.layout = self.layout

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
        self.cache, self.known, self.seen, self.stored = None, None, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens, given as a negative number; refused where tokens leave the slots.

        Of a row with padding in front these may be more than it has: then it is empty.
        """
        if tokens_to_remove > 0:
            raise UnsupportedError("crop takes the tokens to remove as a negative number")
        if self.cache is None or not tokens_to_remove:
            return
        assert self.known is not None
        left = max(0, self.seen + tokens_to_remove)
        removed_B = self.known[:, left:].sum(1).cpu().numpy()
        for _, _, group in self.layout.reordered:
            for length, removed in zip(
                self.cache.lengths.tolist(), removed_B.tolist(), strict=True
            ):
                chunks = group.reader.chunks(length)
                if removed and chunks and length - removed < chunks[-1] + chunks.step:
                    raise UnsupportedError(
                        f"layer {self.layer}: crop cannot tell the newest tokens once {group.reader.name} "
                        "has put them into other slots; leave alike out of cache.read, or generate without "
                        "assisted decoding"
                    )
        for clock, used in self.cache.clocks.items() if removed_B.any() else ():
            group = self.cache.groups[clock]
            whole = used == self.cache.lengths
            if not in_order(group) or not (whole | (used - removed_B >= group.newest)).all():
                raise UnsupportedError(
                    f"layer {self.layer}: crop cannot bring back tokens that left the cache, which keeps "
                    f"{group.describe()}; use a cache without prune and quant, or generate without assisted "
                    "decoding"
                )
        for used in (self.cache.lengths, *self.cache.clocks.values()):
            used -= removed_B
        self.seen, self.known = left, self.known[:, :left]
        self._count()

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        if self.cache is not None and self.known is not None:
            self.cache = self.cache.select(rows.cpu().numpy())
            self.known = self.known[rows.to(self.known.device)]


def in_order(group: HeadGroup) -> bool:
    """Whether the slots hold the newest tokens, all of them at best, in their order and as they came."""
    kept = group.policy.whole or (group.policy.sliding and not group.policy.lead)
    return kept and group.storage.plain


def grown(capacity: int, needed: int, context: int) -> int:
    """The room that a cache of `capacity` tokens takes when `needed` are to fit, within the context.

    It grows by an eighth, so that copying costs a bounded share of what reading the tokens does.
    """
    wanted = max(needed, capacity + max(STEP, capacity // 8) if capacity else 0)
    return min(context, -(-wanted // STEP) * STEP)
