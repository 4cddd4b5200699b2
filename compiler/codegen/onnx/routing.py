"""Finds in a graph which weights are of which expert, and what says which experts a token has chosen.

    Equal(index, 3) -> Cast -> NonZero -> Gather -> MatMulNBits(x, W3) -> .. -> ScatterElements(sum, ..)

An expert's nodes are those between what finds its tokens and what adds its result to the sum (experts.py
writes them so). A product of no rows reads no weights: of experts that nobody chose nothing is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What finds the tokens of an expert, and what adds what it gives for them to the others' results.
_FINDS, _ADDS = "NonZero", "ScatterElements"

#: More than any layer has.
_MANY = 1 << 20


@dataclass(frozen=True)
class Routing:
    """Experts of one layer, as its nodes choose between them."""

    index: str
    """The value that says of each token which experts it chose, [T, choices]."""
    choices: int
    """Experts that a token chooses."""
    of: int
    """From so many, of which others may be in another super-op."""
    experts: Mapping[int, tuple[str, ...]]
    """Names of the weights of each expert, by its number."""

    @property
    def most(self) -> int:
        """How many of these experts a token chooses at most."""
        return min(self.choices, len(self.experts))


def beginnings(
    nodes: Sequence[Any], sizes: Mapping[str, int], most: int, constants: Mapping[str, Any]
) -> dict[str, int]:
    """Where experts of a layer begin, and where more than `most` bytes of their weights have come since, of
    `sizes` by name: the results of the nodes that ask, with the number of the expert that they ask for."""
    asks = {node.output[0]: node for node in _questions(nodes)}
    seen, found, held, own = set[str](), dict[str, int](), 0, 0
    for node in nodes:
        if node.output and node.output[0] in asks:
            if node.input[0] not in seen or held + own > most:
                seen.add(node.input[0])
                found[node.output[0]], held = _number(node.input[1], constants), 0
            own = 0
        size = sum(sizes.get(name, 0) for name in node.input)
        held, own = held + size, own + size
    return found


def choices_of(nodes: Sequence[Any], constants: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Of each value in a model that says which experts its tokens chose: how many a token chooses, and from
    how many."""
    makes = {name: node for node in nodes for name in node.output if name}
    asked = Counter(node.input[0] for node in _questions(nodes))
    return {index: (min(_choices(index, makes, constants), of), of) for index, of in asked.items()}


def routing_of(
    nodes: Sequence[Any],
    choices: Mapping[str, tuple[int, int]],
    weights: Iterable[str],
    constants: Mapping[str, Any],
) -> Routing | None:
    """The experts among nodes of one layer; None where there are none, or they are asked for in another way.
    `choices` are the model's, `weights` names of weights that lie in a file, `constants` tensors that lie in
    the model."""
    questions = {node.output[0]: node for node in _questions(nodes)}
    owner = {name: _number(node.input[1], constants) for name, node in questions.items()}
    stored = frozenset(weights)
    indices = {node.input[0] for node in questions.values()}
    if len(indices) != 1 or min(owner.values()) < 0 or len({*owner.values()}) < len(owner):
        return None
    names: dict[int, list[str]] = {number: [] for number in sorted(owner.values())}
    for node in nodes:
        owners = {owner[name] for name in node.input if name in owner}
        if len(owners) == 1 and node.op_type != _ADDS and node.output[0] not in questions:
            expert = owners.pop()
            owner.update(dict.fromkeys((name for name in node.output if name), expert))
            names[expert] += [name for name in node.input if name in stored]
    index = indices.pop()
    return Routing(index, *choices[index], {n: tuple(each) for n, each in names.items()})


def _questions(nodes: Sequence[Any]) -> list[Any]:
    """The nodes `Equal(index, expert)` whose truths are looked for, in order."""
    makes = {name: node for node in nodes for name in node.output if name}
    found = []
    for node in nodes:
        cast = makes.get(node.input[0]) if node.op_type == _FINDS else None
        asks = makes.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if asks is not None and asks.op_type == "Equal":
            found.append(asks)
    return found


def _choices(index: str, makes: Mapping[str, Any], constants: Mapping[str, Any]) -> int:
    """How many experts a token chooses: what the TopK behind `index` gives, by the node that makes each
    value; a large number without one."""
    while (node := makes.get(index)) is not None and node.input:
        if node.op_type == "TopK":
            found = _number(node.input[1], constants)
            return found if found > 0 else _MANY
        index = node.input[0]
    return _MANY


def _number(name: str, constants: Mapping[str, Any]) -> int:
    """The number that a constant holds; -1 where it is none, or holds more."""
    from onnx import numpy_helper

    found = numpy_helper.to_array(constants[name]) if name in constants else np.zeros(0)
    return int(found.item()) if found.size == 1 else -1
