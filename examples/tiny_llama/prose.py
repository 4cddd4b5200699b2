"""Filler in plain English, from a small grammar."""

from __future__ import annotations

import numpy as np


def _parts(text: str) -> list[str]:
    """The parts between the bars."""
    return text.split("|")


_SUBJECTS = _parts(
    "the river|the old harbour|a tired clerk|the night train|my neighbour|the museum|a small dog|"
    "the committee|the gardener|an engineer|the teacher|the baker|a quiet street|the library|"
    "the lighthouse|a merchant|the orchestra|her brother|the captain|a young painter|the market|"
    "the station|the mountain|a group of students|the farmer|the doctor|the village|the archive"
)
_VERBS = _parts(
    "watched|remembered|crossed|painted|described|repaired|visited|counted|ignored|followed|"
    "measured|carried|discovered|left|closed|opened|sold|borrowed|mentioned|studied|moved|drew|"
    "cleaned|found|photographed|praised|planned|reached|surrounded|hid"
)
_OBJECTS = _parts(
    "the bridge|a wooden box|the long letter|three lamps|the garden wall|an empty house|the map|"
    "a broken clock|the green field|two heavy books|the last ship|the winter coat|a glass of water|"
    "the narrow path|the stone tower|a basket of apples|the morning paper|the big window|"
    "a pair of boots|the silent hall|the copper kettle|a row of trees|the iron gate|the blue door"
)
_PLACES = _parts(
    "near the station|behind the church|in the valley|by the sea|across the square|under the roof|"
    "at the edge of town|on the hill|along the canal|inside the workshop|next to the mill|"
    "above the harbour|between the hills|in the north|outside the theatre"
)
_TIMES = _parts(
    "early in the morning|after the storm|late in autumn|on a cold evening|before the war|"
    "once a year|during the festival|at noon|some days later|in the spring|without a word|"
    "for the first time|as usual|for many years|on the following day"
)
_LINKS = _parts("and then|but|while|because|although|so|until|after which|and")


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _clause(rng: np.random.Generator) -> str:
    words = [_pick(rng, _SUBJECTS), _pick(rng, _VERBS), _pick(rng, _OBJECTS)]
    if rng.random() < 0.5:
        words.append(_pick(rng, _PLACES))
    return " ".join(words)


def sentence(rng: np.random.Generator) -> str:
    """One sentence."""
    text = _clause(rng)
    if rng.random() < 0.4:
        text = f"{_pick(rng, _TIMES)}, {text}"
    if rng.random() < 0.3:
        text = f"{text}, {_pick(rng, _LINKS)} {_clause(rng)}"
    return f"{text[0].upper()}{text[1:]}."


def prose(rng: np.random.Generator, characters: int) -> str:
    """Paragraphs of about that many characters, with an end of line after each."""
    lines: list[str] = []
    left = characters
    while left > 0:
        line = " ".join(sentence(rng) for _ in range(int(rng.integers(1, 5))))
        lines.append(line)
        left -= len(line) + 1
    return "".join(f"{line}\n" for line in lines)
