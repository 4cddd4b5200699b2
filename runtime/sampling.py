"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError
from .runner import Floats, Ints


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the likeliest; filters apply in the order of the fields.

    `repetition_penalty` divides positive and multiplies negative logits of tokens seen before
    (Keskar et al. 2019, CTRL, section 4.1). `top_p` keeps the smallest set of tokens that holds that
    probability (Holtzman et al. 2020); `min_p` drops tokens under that share of the likeliest one's
    (Nguyen et al. 2024).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            (0 <= self.temperature < np.inf, "temperature must be 0 or more, and finite"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (
                0 < self.repetition_penalty < np.inf,
                "repetition_penalty must be above 0, and finite",
            ),
            (self.seed is None or self.seed >= 0, "seed must be 0 or more"),
        ]
        for good, message in checks:
            if not good:
                raise RecipeError(message)


class Sampler:
    """Draws the tokens of one row. With a seed, what it draws depends on no other row."""

    def __init__(self, settings: Sampling, row: int = 0) -> None:
        self.settings = settings
        seed = settings.seed
        self._random = np.random.default_rng(None if seed is None else (seed, row))

    def pick(self, logits: Floats, prompt: Ints, written: Sequence[int]) -> int:
        """The next token for logits [V], behind a prompt and the tokens written since."""
        settings = self.settings
        if settings.repetition_penalty != 1.0:
            # Below 0 are rows of embeddings, which are no tokens.
            seen = np.concatenate((prompt[prompt >= 0], np.asarray(written, np.int64)))
            logits = _penalised(logits, seen, settings.repetition_penalty)
        if settings.temperature == 0:
            return int(np.argmax(logits))
        # float64: the sum of the probabilities must be 1 for the draw
        scaled = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature leaves only the likeliest
            scaled = (scaled - scaled.max()) / settings.temperature
        keep = np.argsort(-scaled, kind="stable")
        if settings.top_k:
            keep = keep[: settings.top_k]
        probabilities = _softmax(scaled[keep])
        if settings.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            count = max(1, int((before < settings.top_p).sum()))
            keep, probabilities = keep[:count], _softmax(scaled[keep[:count]])
        if settings.min_p > 0:
            inside = probabilities >= settings.min_p * probabilities[0]
            keep, probabilities = keep[inside], _softmax(scaled[keep[inside]])
        return int(self._random.choice(keep, p=probabilities))


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def _penalised(logits: Floats, seen: Ints, penalty: float) -> Floats:
    logits = logits.copy()
    tokens = np.unique(seen)
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)
    return logits
