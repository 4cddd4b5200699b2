"""What the model is to learn beyond text: to find a pass key again, and to copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Filler of about so many characters, ending in an end of line (or empty).
Filler = Callable[[int], str]

#: Two letters each.
_SYLLABLES = "babebodadofigakalalelilomamemimonanenopararerirosasetato"


@dataclass(frozen=True)
class KeyDocument:
    """A text and the spans (start, end) of the digits of its answers, in characters."""

    text: str
    answers: tuple[tuple[int, int], ...]


def key(rng: np.random.Generator) -> str:
    """Five digits, the first of them not zero."""
    return str(rng.integers(10000, 100000))


def name(rng: np.random.Generator) -> str:
    """A made-up name, such as Kalemo."""
    starts = 2 * rng.integers(len(_SYLLABLES) // 2, size=int(rng.integers(2, 4)))
    return "".join(_SYLLABLES[start : start + 2] for start in starts).capitalize()


def statement(of: str, digits: str) -> str:
    """What the text says of a key; `of` is empty or ` of NAME`."""
    return f"The pass key{of} is {digits}. Remember it.\n"


def question(of: str) -> str:
    """What the text asks, up to the answer."""
    return f"What is the pass key{of}? The pass key{of} is "


def key_examples(rng: np.random.Generator) -> str:
    """A statement and its question, for the tokenizer."""
    of = f" of {name(rng)}" if rng.random() < 0.5 else ""
    digits = key(rng)
    return f"{statement(of, digits)}{question(of)}{digits}.\n"


def key_document(
    rng: np.random.Generator,
    filler: Filler,
    characters: int,
    depths: list[float],
    asked: list[float],
    named: bool,
) -> KeyDocument:
    """Keys stated at the given depths (0 to 1) of the filler, and asked for at other depths.

    At every depth of `asked` the text asks for one of the keys stated before, and at its end for
    each of the keys. With one key and not `named` the key has no name.
    """
    keys: list[tuple[str, str]] = []
    for _ in depths:
        of = f" of {name(rng)}" if named or keys else ""
        while any(of == other for other, _ in keys):
            of = f" of {name(rng)}"
        keys.append((of, key(rng)))
    rng.shuffle(keys)
    events = [(depth, index) for index, depth in enumerate(sorted(depths))]
    events += [(depth, -1) for depth in asked]
    parts: list[str] = []
    answers: list[tuple[int, int]] = []
    stated: list[int] = []
    position, length = 0.0, 0

    def add(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(text)

    def ask(index: int) -> None:
        of, digits = keys[index]
        add(question(of))
        answers.append((length, length + len(digits)))
        add(f"{digits}.\n")

    for depth, index in sorted(events):
        add(filler(round((depth - position) * characters)))
        position = depth
        if index >= 0:
            add(statement(*keys[index]))
            stated.append(index)
        elif stated:
            ask(int(rng.choice(stated)))
    add(filler(round((1 - position) * characters)))
    for index in rng.permutation(len(keys)):
        ask(int(index))
    return KeyDocument("".join(parts), tuple(answers))


def repeated(
    rng: np.random.Generator, length: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random segments, each repeated: token ids, and which of them can be known (1) or not (0).

    Half of the rows draw on all tokens of the vocabulary, the others on a random part of it.
    """
    ids = np.empty(0, dtype=np.int64)
    known = np.empty(0, dtype=np.float32)
    top = max(9, length // 2)
    pool = np.arange(1, vocabulary)
    if rng.random() < 0.5:
        pool = rng.choice(pool, size=int(np.exp(rng.uniform(np.log(16), np.log(len(pool))))))

    def add(part: np.ndarray, is_known: bool) -> None:
        nonlocal ids, known
        flags = np.full(len(part), float(is_known), dtype=np.float32)
        flags[:1] = 0.0  # where a copy starts cannot be known
        ids, known = np.concatenate([ids, part]), np.concatenate([known, flags])

    def fresh(count: int) -> np.ndarray:
        return rng.choice(pool, size=count)

    add(fresh(int(rng.integers(0, length // 8 + 1))), False)
    while len(ids) < length:
        segment = fresh(int(np.exp(rng.uniform(np.log(6), np.log(top)))))
        add(segment, False)
        for _ in range(int(rng.integers(1, 4))):
            if rng.random() < 0.2:
                add(fresh(int(rng.integers(1, length // 8 + 2))), False)
            add(segment, True)
    return ids[:length], known[:length]
