"""The models that quality is measured on, with what they read and what they are asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from einfold.evaluate.recall import windows
from einfold.evaluate.texts import read_documents
from einfold.runtime.tokenizer import Tokenizer

from .. import real_model
from ..fetch import Package

ROOT = Path(__file__).parents[2]

#: Tokens of a window; the first half is read as a prompt, the second is measured.
WINDOW = 1024
_WINDOWS = 8

#: The Canterbury corpus: old prose and verse, and minutes of a workshop, as a package carries it.
_CORPUS = Package(
    "cramjam",
    "cramjam-2.4.0.tar.gz",
    "3bb30a3498bdb3fb9e69f8c772794f3d77fb78f68b325e76ae17c5cf73525cbf",
)
_TEXTS = ("lcet10.txt", "alice29.txt", "asyoulik.txt", "plrabn12.txt")

#: Where recall begins in the workshop's minutes: behind what the windows read.
_BEHIND = 60_000


@dataclass(frozen=True)
class Questions:
    """A text and questions about it: the first `prompt` tokens are read, then what is asked goes through
    the cache.

    Every answer stands in the text that follows, so that one reading asks all; it was recalled where each
    of its tokens was the likeliest.
    """

    tokens: list[int]
    prompt: int
    answers: tuple[range, ...]
    label: int
    """Tokens of the prompt, roughly: 1,000 or 4,000."""


@dataclass(frozen=True)
class Subject:
    """One model."""

    name: str
    folder: Path
    windows: list[list[int]]
    questions: list[Questions]


def toy() -> Subject:
    """The shipped model of 4 layers, on its own evaluation text and pass keys."""
    folder = ROOT / "examples" / "tiny_llama"
    encode = Tokenizer(folder).encode_with_offsets
    documents = read_documents(folder / "eval.txt")
    pieces = [piece.tokens for piece in windows(encode, documents, WINDOW)]
    asked = [
        Questions(piece.tokens[: key.answer[-1] + 1], key.asked, (_range(key.answer),), 1000)
        for piece in windows(encode, documents[::3], 2 * WINDOW)
        for key in piece.keys
    ]
    whole = [piece for piece in pieces if len(piece) == WINDOW]
    return Subject(folder.name, folder, whole[:_WINDOWS], asked)


def _range(answer: tuple[int, ...]) -> range:
    return range(answer[0], answer[-1] + 1)


def real(name: str = real_model.NAME) -> Subject:
    """SmolLM2-135M-Instruct, on prose and on lists of things in prose. Raises FetchError."""
    folder = real_model.folder(name)
    corpus = _CORPUS.unpacked(_TEXTS)
    encode = Tokenizer(folder).encode
    pieces = []
    for text in _TEXTS:
        start = len(_read(corpus / text)) // 8  # behind title pages and lists of persons
        tokens = encode(_read(corpus / text)[start : start + 8 * 2 * WINDOW])
        pieces += [tokens[:WINDOW], tokens[WINDOW : 2 * WINDOW]]
    prose = paragraphs(_read(corpus / _TEXTS[0])[_BEHIND:])
    asked = [list_of_things(encode, prose, length, seed) for length, seed in LISTS]
    return Subject(name, folder, pieces[:_WINDOWS], asked)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "toy": toy,
    "real": real,
    "off-grid": lambda: real(real_model.OFF_GRID),
}


def corpus_text(name: str) -> str:
    """A text of the Canterbury corpus. Raises FetchError."""
    return _read(_CORPUS.unpacked(_TEXTS) / name)


def _read(path: Path) -> str:
    return path.read_text(encoding="latin-1")


def paragraphs(text: str) -> Iterator[str]:
    for part in text.split("\n\n"):
        words = part.split()
        if len(words) > 20:
            yield " ".join(words)


_THINGS = (
    *(
        "umbrella",
        "passport",
        "guitar",
        "lantern",
        "hammer",
        "camera",
        "blanket",
        "kettle",
        "bicycle",
        "ladder",
    ),
    *(
        "notebook",
        "helmet",
        "violin",
        "basket",
        "mirror",
        "tent",
        "wallet",
        "clock",
        "scissors",
        "candle",
    ),
)
_PLACES = (
    *(
        "garage",
        "drawer",
        "attic",
        "cellar",
        "shed",
        "office",
        "bedroom",
        "kitchen",
        "barn",
        "garden",
    ),
    *(
        "library",
        "hall",
        "studio",
        "porch",
        "bathroom",
        "car",
        "closet",
        "pantry",
        "tower",
        "cabin",
    ),
)
_HEADING = "Where things are:\n"
_GROUPS = 4

#: Tokens of prose that the real model's lists are spread over, and the seed of their places.
LISTS = ((1000, 0), (1000, 1), (4000, 2))


def _dealt(seed: int) -> tuple[dict[str, str], list[str]]:
    """The place of each thing, and the things in the order in which they are asked for."""
    shuffled = random.Random(seed)
    places = shuffled.sample(_PLACES, len(_PLACES))
    return dict(zip(_THINGS, places, strict=True)), shuffled.sample(_THINGS, len(_THINGS))


def quarters(label: int) -> list[int]:
    """Where the answers of the lists of so many tokens stand, 0 for the first quarter of the text to 3 for
    the last: in the order in which they are asked for, as `hits` has them."""
    size = len(_THINGS) // _GROUPS
    return [
        _THINGS.index(thing) // size
        for length, seed in LISTS
        if length == label
        for thing in _dealt(seed)[1]
    ]


def list_of_things(
    encode: Callable[[str], list[int]], prose: Iterator[str], length: int, seed: int
) -> Questions:
    """Things and their places, in four lists spread over `length` tokens of prose; then each is asked for."""
    places, order = _dealt(seed)
    parts: list[str] = []
    size = len(_THINGS) // _GROUPS
    for group in range(_GROUPS):
        things = _THINGS[group * size : (group + 1) * size]
        parts.append(_HEADING + "\n".join(f"{thing}: {places[thing]}" for thing in things))
        while sum(len(encode(part)) for part in parts) < (group + 1) * length // _GROUPS:
            parts.append(next(prose))
    tokens = encode("\n\n".join(parts) + "\n\n" + _HEADING)
    prompt, answers = len(tokens), []
    for thing in order:
        tokens += encode(f"{thing}:")
        answer = encode(f" {places[thing]}")
        answers.append(range(len(tokens), len(tokens) + len(answer)))
        tokens += answer + encode("\n")
    return Questions(tokens, prompt, tuple(answers), length)
