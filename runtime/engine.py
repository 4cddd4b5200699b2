"""The engine: prefill in chunks, decode in batches, over one runner and one cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..compiler.ir.kv.layout import CacheLayout
from ..compiler.ir.manifest import EMBEDDINGS
from ..errors import NotFiniteError, PromptError, pass_on
from .buffers import Array, Make, empty
from .cache import Cache
from .embeddings import no_table
from .runner import Flags, Floats, Ints, Runner
from .sampling import Sampler, Sampling

#: Tokens of a prefill step: bounds the memory of activations at any context.
CHUNK = 512


@dataclass
class Generated:
    """What one row wrote: its new tokens, and why it ended ("stop", "length" or "context")."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timings:
    """Seconds of the two phases, and the tokens that went through each, over all rows."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0


#: Told of each new token: (row, token). Gives True to end the row.
OnToken = Callable[[int, int], bool]

#: Fewer tokens than so many are stepped one by one where the runner makes numbers of all pairs of a new and a
#: packed token: behind 65,536 packed ones four together took twice as long as one after the other, behind
#: 32,768 eight together three quarters.
_FEWEST_TOGETHER = 8


class Engine:
    """Generates with a runner. `context` bounds prompt and new tokens together."""

    def __init__(
        self,
        runner: Runner,
        layout: CacheLayout,
        vocabulary: int,
        context: int,
        chunk: int = CHUNK,
        make: Make = empty,
        never: Sequence[int] = (),
        never_first: Sequence[int] = (),
        embeds: int = 0,
        key_scales: Mapping[str, Array] | None = None,
    ) -> None:
        """`make` makes the cache's buffers where the runner wants them. The tokens `never` are not chosen,
        those `never_first` not behind the prompt. `embeds` is the width of the table of embeddings that a
        model takes beside its tokens, 0 where it takes none. `key_scales` are those of `CacheBuffers`."""
        if chunk < 1:
            raise PromptError(f"the prefill chunk must be 1 token or more, not {chunk}")
        self.runner = runner
        self.layout = layout
        self.vocabulary = vocabulary
        self.context = context
        self.chunk = chunk
        self.make = make
        self.never = np.asarray(never, np.int64)
        self.never_first = np.asarray(never_first, np.int64)
        self.embeds = embeds
        self.key_scales = key_scales
        self.timings = Timings()
        self.cache: Cache | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
        on_token: OnToken | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> list[Generated]:
        """Continues each prompt. Rows of unequal length run together, right-padded inside. `given` is what
        every step reads beside them, a row for each prompt.

        Raises PromptError for an empty prompt, a token out of range, or a prompt that leaves no room.
        """
        below = 0 if given is None or not self.embeds else given[EMBEDDINGS].shape[1]
        rows = [self.check_prompt(prompt, below) for prompt in prompts]
        if max_new_tokens < 0:
            raise PromptError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        self.timings = Timings()
        if not rows or not max_new_tokens:
            return [Generated() for _ in rows]
        samplers = [Sampler(sampling or Sampling(), row) for row in range(len(rows))]
        longest = max(len(row) for row in rows)
        # The last token written is never read back, so it needs no slot.
        capacity = min(longest + max_new_tokens - 1, self.context)
        self.cache = None  # the last one is let go before the next is taken
        cache = self.cache = self.allocate(len(rows), capacity, longest, given)
        logits = self._timed_prefill(cache, rows)
        return self._decode(
            cache, rows, logits, max_new_tokens, frozenset(stop_tokens), samplers, on_token
        )

    def allocate(
        self,
        batch: int,
        capacity: int,
        prompt: int | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> Cache:
        """An empty cache that the runner can step over; see `Cache.allocate`.

        It has room for more tokens, to the next whole block of slots, where the runner is faster so and the
        context has them. Raises OutOfMemoryError where the runner has no room for it.
        """
        block, fewest = getattr(self.runner, "blocks", (1, 0))
        if given is None and self.embeds:
            given = no_table(batch, self.embeds)
        whole = -(-capacity // block) * block
        if fewest <= capacity and whole <= self.context:
            capacity = whole
        check = getattr(self.runner, "check_room", None)
        if check is not None:
            check(batch, capacity, prompt)
        return Cache.allocate(
            self.layout, batch, capacity, prompt, self.make, given, self.key_scales
        )

    def check_prompt(self, prompt: Sequence[int] | Ints, below: int = 0) -> Ints:
        """The prompt as an array; raises PromptError with the position of what is wrong. `below` are the rows
        of embeddings that are given with it."""
        row = self.check_tokens(prompt, below)
        if row.size >= self.context:
            raise PromptError(
                f"the prompt has {row.size} tokens, but the artifact was compiled for a context "
                f"of {self.context}, which must also hold the answer; "
                "shorten the prompt or compile with a larger --context"
            )
        return row

    def check_tokens(self, tokens: Sequence[int] | Ints, below: int = 0) -> Ints:
        """Token ids as an array; raises PromptError where there are none, or one is out of range."""
        row = np.asarray(tokens)
        if row.size == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if row.ndim != 1 or row.dtype.kind not in "iuO":
            raise PromptError("a prompt is a text, or a flat list of token ids (whole numbers)")
        wrong = np.flatnonzero((row < -below) | (row >= self.vocabulary))
        if wrong.size:
            raise PromptError(
                f"token {row[wrong[0]]} at position {wrong[0]} is out of range: "
                f"the vocabulary has {self.vocabulary} tokens"
                + (f", and {below} rows of embeddings are given" if self.embeds else "")
            )
        return row.astype(np.int64)

    def _timed_prefill(self, cache: Cache, rows: list[Ints]) -> Floats:
        started = time.perf_counter()
        logits = self.prefill(cache, rows)
        self.timings.prefill_seconds = time.perf_counter() - started
        self.timings.prefill_tokens = sum(len(row) for row in rows)
        return logits

    def prefill(self, cache: Cache, rows: list[Ints]) -> Floats:
        """Runs the prompts into an empty cache and settles it; gives the logits behind each row's last
        token, [B, V].

        A batch that fits in one chunk runs at once, padded on the right: causality keeps the padding
        out of every real token's sight, and decoding writes over it. A larger one runs row by row, in
        chunks, each into its own slice of the cache; so does one over slots that are in use from the start
        (a compensation token's), which GroupQueryAttention does not take for rows together.
        """
        longest = max(len(row) for row in rows)
        together = len(rows) > 1 and len(rows) * longest <= self.chunk
        if together and cache.untouched and longest <= cache.step_limit():
            out = self._prefill_together(cache, rows, longest)
        else:
            out = np.empty((len(rows), self.vocabulary), np.float32)
            for index, row in enumerate(rows):
                for _, logits in self.stream(cache.row(index), row, all_logits=False):
                    out[index] = logits[-1]
        cache.settle()
        return out

    def _prefill_together(self, cache: Cache, rows: list[Ints], longest: int) -> Floats:
        padded = np.zeros((len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        positions = np.broadcast_to(np.arange(longest), padded.shape)
        lengths = np.array([len(row) for row in rows])
        last = np.arange(len(rows)) * longest + lengths - 1
        logits: Floats = self.step(cache, padded, positions, last).copy()
        cache.advance(lengths, self.runner.observed)
        return logits

    def stream(
        self, cache: Cache, row: Ints, all_logits: bool, start: int = 0
    ) -> Iterator[tuple[int, Floats]]:
        """Runs tokens from `start` on through in chunks, behind those that the cache has seen.

        Yields (start, logits) of each chunk, or of the last one only. Where a step of one token reads what a
        reader chooses, logits that are all asked for come of such steps: longer ones may read everything.
        """
        most = self.chunk
        if all_logits:
            most = (
                1 if self.layout.chooses else min(most, getattr(self.runner, "most_logits", most))
            )
        place = start
        while place < len(row):
            size = min(most, self._step_limit(cache), len(row) - place)
            ids = row[None, place : place + size]
            positions = np.arange(place, place + size)[None]
            final = place + size == len(row)
            wanted = (
                np.arange(size) if all_logits else np.arange(size - 1, size)[: 1 if final else 0]
            )
            cache.make_room(size)
            logits = self.step(cache, ids, positions, wanted)
            cache.advance(size, self.runner.observed)
            if all_logits or final:
                # Runners use the buffer of a step of one token again.
                yield place, logits.copy() if size == 1 else logits
            place += size

    def _step_limit(self, cache: Cache) -> int:
        """The most tokens of a step, by the slots and by what the runner makes of packed tokens."""
        limit = cache.step_limit()
        pairs, packed = getattr(self.runner, "most_pairs", 0), cache.most_packed()
        if not pairs or not packed:
            return limit
        together = pairs // packed
        return min(limit, together) if together >= _FEWEST_TOGETHER else 1

    def step(
        self,
        cache: Cache,
        input_ids: Ints,
        position_ids: Ints,
        logit_rows: Ints,
        asked: Flags | None = None,
    ) -> Floats:
        """The runner's step, see `Runner.step`; what logits hold that were not `asked` for does not matter.

        Raises OutOfMemoryError, and NotFiniteError, which names the step.
        """
        try:
            logits = self.runner.step(cache, input_ids, position_ids, logit_rows)
        except Exception as error:
            pass_on(error)
            raise
        if not logits.size:
            return logits
        largest = logits.max(axis=-1)  # -inf is how a model may rule a token out
        wrong = np.flatnonzero(~np.isfinite(largest) & (True if asked is None else asked))
        if wrong.size:
            row, place = divmod(int(logit_rows[wrong[0]]), input_ids.shape[1])
            token, position = input_ids[row, place], position_ids[row, place]
            raise NotFiniteError(
                f"the logits behind token {token} at position {position} of row {row} are not finite "
                f"({largest[wrong[0]]}): the model's weights are damaged, or its numbers overflow; "
                "`einfold eval` beside the original model tells which"
            )
        return logits

    def _decode(
        self,
        cache: Cache,
        rows: list[Ints],
        logits: Floats,
        max_new_tokens: int,
        stop: frozenset[int],
        samplers: list[Sampler],
        on_token: OnToken | None,
    ) -> list[Generated]:
        results = [Generated() for _ in rows]
        running = np.ones(len(rows), bool)
        ids = np.zeros((len(rows), 1), np.int64)
        every_row = np.arange(len(rows))
        started = time.perf_counter()
        if self.never_first.size:
            logits[:, self.never_first] = -np.inf
        while True:
            if self.never.size:
                logits[:, self.never] = -np.inf
            for index in np.flatnonzero(running):
                token = samplers[index].pick(logits[index], rows[index], results[index].tokens)
                ids[index] = token
                reason = self._accept(
                    results[index], token, cache.lengths[index], max_new_tokens, stop
                )
                ended = (
                    on_token(int(index), token)
                    if on_token is not None and reason != "stop"
                    else False
                )
                if reason or ended:
                    results[index].finish_reason = "stop" if ended else reason
                    running[index] = False
            if not running.any():
                break
            # A row that has ended stays where it is and writes one slot again and again.
            np.minimum(cache.lengths, cache.capacity - 1, out=cache.lengths)
            cache.make_room(1)
            logits = self.step(cache, ids, cache.lengths[:, None], every_row, running)
            cache.advance(running.astype(np.int64), self.runner.observed)
            self.timings.decode_tokens += int(running.sum())
        self.timings.decode_seconds = time.perf_counter() - started
        return results

    def _accept(
        self, result: Generated, token: int, length: int, limit: int, stop: frozenset[int]
    ) -> str:
        """Adds a token to a row; gives why the row ends with it, or nothing."""
        if token in stop:
            return "stop"
        result.tokens.append(token)
        if len(result.tokens) >= limit:
            return "length"
        # The next step writes this token to the slot `length`.
        return "context" if length >= self.context else ""
