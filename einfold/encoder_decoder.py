"""A compiled encoder-decoder, loaded: a text or an array in, a text out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .compiler.ir.manifest import TensorEntry
from .completion import Completion, Listeners
from .encoder import tokens_of
from .errors import PromptError
from .runtime.artifact import Artifact
from .runtime.buffers import Array
from .runtime.encoding import EncoderEngine
from .runtime.engine import Engine, Timings
from .runtime.runner import Floats
from .runtime.sampling import Sampling
from .runtime.tokenizer import Tokenizer

#: What an encoder is given: a text or token ids for each row, or arrays by the names of its inputs.
Inputs = Sequence[str | Sequence[int]] | Mapping[str, npt.ArrayLike]


@dataclass
class EncoderDecoder:
    """A loaded artifact of an encoder-decoder: T5, BART, Whisper. Make it with `load`. One thread at a
    time."""

    artifact: Artifact
    reader: EncoderEngine
    engine: Engine

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """What the encoder takes: names, types and sizes, B rows of S tokens."""
        return self.artifact.manifest.inputs

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises PromptError where it has none."""
        return Tokenizer.of(self.artifact)

    @property
    def timings(self) -> Timings:
        """Times of the last generation's decoder."""
        return self.engine.timings

    def tokens(self, texts: Sequence[str | Sequence[int]]) -> dict[str, Array]:
        """Texts, or rows of token ids, as the encoder's inputs: int64 arrays [B, S] by name, padded behind.

        Raises PromptError where the model reads no text, or a text has no tokens.
        """
        return tokens_of(self.reader, texts, lambda: self.tokenizer)

    def read(self, inputs: Inputs) -> dict[str, Array]:
        """What the encoder gives its decoder, by name: keys and values [B, K, T, D] of each cross-attention,
        and where texts are read which of their tokens are there.

        Raises PromptError for what does not fit the model, NotFiniteError for results that are not finite.
        """
        given = inputs if isinstance(inputs, Mapping) else self.tokens(inputs)
        return self.reader.run(given)  # type: ignore[arg-type]

    def generate(
        self,
        inputs: str | Sequence[int] | Mapping[str, npt.ArrayLike],
        *,
        prefix: str | Sequence[int] = (),
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        on_text: Callable[[str], None] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Completion:
        """Writes behind one input: a text, token ids, or arrays of one row by name.

        `prefix` stands behind the tokens that the model begins with, such as the language that Whisper is to
        write. The other options are those of `Model.generate`.
        """
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
        given = inputs if isinstance(inputs, Mapping) else [inputs]
        found = self.generate_batch(
            given,
            prefix=prefix,
            max_new_tokens=max_new_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            sampling=sampling,
            on_text=None if on_text is None else lambda row, piece: on_text(piece),
        )
        if len(found) != 1:
            raise PromptError(
                f"generate takes one row, and there are {len(found)}; use generate_batch"
            )
        return found[0]

    def generate_batch(
        self,
        inputs: Inputs,
        *,
        prefix: str | Sequence[int] = (),
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Writes behind several inputs together."""
        given = self.read(inputs)
        rows = len(next(iter(given.values())))
        start = self.start(prefix)
        listeners = Listeners.of(self.artifact, lambda: self.tokenizer, rows, stop, on_text)
        results = self.engine.generate(
            [start] * rows,
            max_new_tokens,
            () if ignore_eos else self.artifact.manifest.model.eos_ids,
            sampling,
            listeners.on_token,
            given,
        )
        return listeners.completions(results, [len(start)] * rows)

    def logits(self, inputs: Inputs, answers: Sequence[Sequence[int]] | npt.ArrayLike) -> Floats:
        """Logits [B, S, V] behind each token of answers of one length, the tokens that they begin with among
        them, each row beside its input."""
        given = self.read(inputs)
        rows = [self.engine.check_tokens(row) for row in np.asarray(answers)]
        if len({len(row) for row in rows}) != 1 or len(rows) != len(next(iter(given.values()))):
            raise PromptError("answers are rows of one length, as many as the inputs are")
        if len(rows[0]) > self.engine.context:
            raise PromptError(
                f"{len(rows[0])} tokens do not fit the context of {self.engine.context}"
            )
        self.engine.cache = None  # the last one is let go before the next is taken
        cache = self.engine.cache = self.engine.allocate(len(rows), len(rows[0]), None, given)
        found = [
            np.concatenate([part for _, part in self.engine.stream(cache.row(place), row, True)])
            for place, row in enumerate(rows)
        ]
        return np.stack(found)

    def start(self, prefix: str | Sequence[int] = ()) -> list[int]:
        """The tokens that an answer begins with: the model's own, and the prefix."""
        begin = self.artifact.manifest.begin
        assert begin is not None
        if isinstance(prefix, str):
            prefix = self.tokenizer.encode(prefix, special=False) if prefix else ()
        return [*begin.tokens, *prefix]
