"""A compiled encoder, loaded: texts or arrays in, named tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy.typing as npt

from .compiler.ir.manifest import TensorEntry
from .errors import PromptError
from .runtime.artifact import Artifact
from .runtime.buffers import Array
from .runtime.encoding import ROWS, EncoderEngine
from .runtime.tokenizer import Tokenizer


@dataclass
class Encoder:
    """A loaded artifact of an encoder: BERT, an embedder of sentences, an image classifier. Make it with
    `load`. One thread at a time.
    """

    artifact: Artifact
    engine: EncoderEngine

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """What the model takes: names, types and sizes, B rows of S tokens."""
        return self.artifact.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """What it gives, in the same terms."""
        return self.artifact.manifest.outputs

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises PromptError where it has none."""
        return Tokenizer.of(self.artifact)

    def tokens(self, texts: Sequence[str | Sequence[int]]) -> dict[str, Array]:
        """Texts, or rows of token ids, as the model's inputs: int64 arrays [B, S] by name, with padding
        behind the shorter rows that `attention_mask` tells of.

        Raises PromptError where the model reads no text, or a text has no tokens.
        """
        return tokens_of(self.engine, texts, lambda: self.tokenizer)

    def run(
        self,
        inputs: Sequence[str | Sequence[int]] | Mapping[str, npt.ArrayLike],
        *,
        rows: int = ROWS,
    ) -> dict[str, Array]:
        """The model's results by name, arrays whose first axis is the rows of the batch.

        `inputs` are texts, rows of token ids, or a table of arrays by the names of the model's inputs; of a
        text's only `input_ids` must be there. `rows` at most run together. Where a result has a row for each
        token, what stands at padding means nothing. No texts give arrays of no rows.

        Raises PromptError for what does not fit the model, NotFiniteError for results that are not finite.
        """
        if isinstance(inputs, Mapping):
            return self.engine.run(inputs, rows)  # type: ignore[arg-type]
        return self.engine.run(self.tokens(inputs), rows)


def tokens_of(
    engine: EncoderEngine,
    texts: Sequence[str | Sequence[int]],
    tokenizer: Callable[[], Tokenizer],
) -> dict[str, Array]:
    """Texts, or rows of token ids, as what an encoder takes; raises PromptError for one text alone."""
    if isinstance(texts, str):
        raise PromptError("an encoder takes a list of texts; this is one text")
    reads = "input_ids" in engine.inputs
    rows = [tokenizer().encode(text) if isinstance(text, str) and reads else text for text in texts]
    return engine.tokens(rows)  # type: ignore[arg-type]
