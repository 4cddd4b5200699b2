"""Pass keys in windows of text: where they stand, and the shares of them that were recalled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from .texts import Document

#: Recall by depth is given for so many parts of the text before the question.
_DEPTHS = 4


@dataclass(frozen=True)
class KeyPlace:
    """A pass key in a window, by tokens."""

    stated: int
    asked: int
    """The first token of the question."""
    answer: tuple[int, ...]

    @property
    def depth(self) -> float:
        """Where the statement stands in the text before the question, 0 (its start) to 1."""
        return self.stated / self.asked


@dataclass(frozen=True)
class Window:
    """Tokens that are read at a stretch, and the pass keys that are stated and asked for among them."""

    tokens: list[int]
    keys: tuple[KeyPlace, ...] = ()


def windows(
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]],
    documents: Iterable[Document],
    limit: int,
) -> Iterator[Window]:
    """Documents cut into windows of `limit` tokens at most; single tokens are left out."""
    for document in documents:
        tokens, offsets = encode(document.text)
        for start in range(0, len(tokens), limit):
            part = offsets[start : start + limit]
            if len(part) > 1:
                keys = tuple(_places(document, part))
                yield Window(tokens[start : start + limit], keys)


def _places(document: Document, offsets: list[tuple[int, int]]) -> Iterator[KeyPlace]:
    for key in document.keys:
        low, high = key.answer
        answer = tuple(i for i, (a, b) in enumerate(offsets) if a < high and b > low)
        before = [i for i, (_, b) in enumerate(offsets) if b <= key.stated]
        asked = [i for i, (_, b) in enumerate(offsets) if b > key.asked]
        inside = offsets[0][0] <= key.stated and max(b for _, b in offsets) >= high
        if inside and answer and asked[0] > 0:
            yield KeyPlace(len(before), asked[0], answer)


@dataclass(frozen=True)
class Share:
    """Recall of the keys whose depth, or whose text's tokens, lie above `above` and up to `to`."""

    above: float
    to: float
    keys: int
    recall: float
    reference_recall: float


@dataclass
class Recall:
    """Which keys the compiled model and the original recalled, every token of them."""

    places: list[KeyPlace] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    reference_hits: list[bool] = field(default_factory=list)

    def add(self, place: KeyPlace, hit: bool, reference_hit: bool) -> None:
        self.places.append(place)
        self.hits.append(hit)
        self.reference_hits.append(reference_hit)

    @property
    def share(self) -> float | None:
        """Of all keys; None where there are none."""
        return _mean(self.hits) if self.hits else None

    @property
    def reference_share(self) -> float | None:
        return _mean(self.reference_hits) if self.hits else None

    def by_depth(self) -> list[dict[str, Any]]:
        """By where the key stands in the text before its question, in quarters."""
        edges = [part / _DEPTHS for part in range(_DEPTHS + 1)]
        return self._shares(edges, lambda place: place.depth)

    def by_length(self) -> list[dict[str, Any]]:
        """By the tokens before the question, doubling from 128."""
        longest = max((place.asked for place in self.places), default=0)
        edges = [0.0, 128.0]
        while edges[-1] < longest:
            edges.append(2 * edges[-1])
        return self._shares(edges, lambda place: place.asked)

    def _shares(
        self, edges: list[float], measure: Callable[[KeyPlace], float]
    ) -> list[dict[str, Any]]:
        found = []
        for above, to in pairwise(edges):
            # the first part takes what lies on its lower edge too: a key may be the first thing said
            chosen = [
                i
                for i, place in enumerate(self.places)
                if above < measure(place) <= to or (above == edges[0] == measure(place))
            ]
            if chosen:
                hits = _mean([self.hits[i] for i in chosen])
                reference = _mean([self.reference_hits[i] for i in chosen])
                found.append(asdict(Share(above, to, len(chosen), hits, reference)))
        return found


def _mean(hits: list[bool]) -> float:
    return sum(hits) / len(hits)
