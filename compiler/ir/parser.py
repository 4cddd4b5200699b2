"""Reads the textual form of a program back. It builds nodes and evaluates nothing.

Types are not taken on trust: each node's type is inferred again from its arguments, and a line whose
printed type differs is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from torch import fx

from ...errors import IRError
from .cache.layout import CacheLayout
from .printer import FORMAT
from .program import Editor, ModelInfo, Program, find_op
from .types import DTYPES
from .weights import Weight

_TOKEN = re.compile(
    r"\s*(?:(?P<node>%[A-Za-z_][\w]*)|(?P<string>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<number>-?(?:inf|nan|\d+\.?\d*(?:e[+-]?\d+)?))"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>[\[\](),=]))"
)
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]$")


def parse(text: str, load: Callable[[str, Weight], Weight] | None = None) -> Program:
    """The program that `text` prints.

    `load(name, declared)` gives the data of a declared weight; without it weights have shapes only.
    Raises IRError with the line number for anything that does not read.
    """
    lines = text.splitlines()
    if not lines or lines[0] != FORMAT:
        raise IRError(f"not a program in the form {FORMAT!r}: the first line is {lines[:1]}")
    return _Parser(load or (lambda name, declared: declared)).run(lines)


class _Parser:
    def __init__(self, load: Callable[[str, Weight], Weight]) -> None:
        self.load = load
        self.cache_lines: list[str] = []
        self.nodes: dict[str, fx.Node] = {}
        self.outputs: list[tuple[str, fx.Node]] = []

    def run(self, lines: list[str]) -> Program:
        for number, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            word, _, rest = line.partition(" ")
            handler = getattr(self, f"_on_{word}", None) if word.isalpha() else None
            if handler is None:
                raise IRError(f"line {number}: expected a statement, found {line!r}")
            if word != "model" and not hasattr(self, "program"):
                raise IRError(f"line {number}: 'model' must come before {word!r}")
            try:
                handler(rest)
            except (IRError, ValueError, KeyError, TypeError, IndexError) as error:
                raise IRError(f"line {number}: {error}") from error
        if not self.outputs:
            raise IRError("the program has no output")
        self.program.layout = CacheLayout.parse(self.cache_lines)
        names, values = zip(*self.outputs, strict=True)
        self.editor.set_output(values, names)
        return self.program

    def _on_model(self, rest: str) -> None:
        pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\d+)', rest)
        self.program = Program(ModelInfo(**{key: json.loads(value) for key, value in pairs}))
        self.editor = Editor(self.program)

    def _on_cache(self, rest: str) -> None:
        self.cache_lines.append(f"cache {rest}")

    def _on_weight(self, rest: str) -> None:
        name, _, kind = rest.rpartition(" : ")
        shape, dtype = _read_type(kind)
        if not all(isinstance(size, int) for size in shape):
            raise IRError(f"a weight's shape must be numbers, found {kind!r}")
        name = name.removeprefix("@")
        declared = Weight.absent([int(size) for size in shape], dtype, name)
        if name in self.program.weights:
            raise IRError(f"weight {name!r} is declared twice")
        self.program.weights.add(name, self.load(name, declared))

    def _on_input(self, rest: str) -> None:
        head, _, kind = rest.partition(" : ")
        node_name, _, name = head.partition(" ")
        shape, dtype = _read_type(kind)
        self._define(
            node_name[1:], self.editor.input(json.loads(name), shape, dtype, node_name[1:])
        )

    def _on_read(self, rest: str) -> None:
        head, _, kind = rest.partition(" : ")
        node_name, _, name = head.partition(" ")
        self._define(node_name[1:], self.editor.read(json.loads(name), node_name[1:]), kind)

    def _on_call(self, rest: str) -> None:
        left, _, right = rest.partition(" = ")
        op, _, tail = right.partition("(")
        body, separator, kind = tail.rpartition(") : ")
        if not separator:
            raise IRError(f"a call needs arguments and a type, found {rest!r}")
        args, kwargs = self._arguments(body)
        node = self.editor.call(find_op(op), *args, name=left[1:], **kwargs)
        self._define(left[1:], node, kind)

    def _on_output(self, rest: str) -> None:
        name, _, value = rest.partition(" = ")
        self.outputs.append((json.loads(name), self._node(value)))

    def _define(self, name: str, node: fx.Node, kind: str | None = None) -> None:
        if node.name != name:
            raise IRError(f"%{name} is defined twice, or is no valid name")
        if kind is not None and (found := self.program.shapes.describe(node.meta["val"])) != kind:
            raise IRError(f"%{name} is declared {kind}, but its arguments give {found}")
        self.nodes[name] = node

    def _node(self, text: str) -> fx.Node:
        try:
            return self.nodes[text.removeprefix("%")]
        except KeyError:
            raise IRError(f"{text} is used before it is defined") from None

    def _arguments(self, body: str) -> tuple[list[Any], dict[str, Any]]:
        tokens = _tokens(body)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while tokens:
            if len(tokens) > 1 and tokens[0][0] == "word" and tokens[1][1] == "=":
                key = tokens[0][1]
                del tokens[:2]
                kwargs[key] = self._value(tokens)
            else:
                args.append(self._value(tokens))
            if tokens and tokens.pop(0)[1] != ",":
                raise IRError(f"expected ',' in the arguments {body!r}")
        return args, kwargs

    def _value(self, tokens: list[tuple[str, str]]) -> Any:
        kind, text = tokens.pop(0)
        if kind == "node":
            return self._node(text)
        if kind == "string":
            return json.loads(text)
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if kind == "word" and text in _WORDS:
            return _WORDS[text]
        if kind == "word" and text in DTYPES:
            return DTYPES[text]
        if text == "[":
            items: list[Any] = []
            while tokens[0][1] != "]":
                items.append(self._value(tokens))
                if tokens[0][1] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return items
        raise IRError(f"{text!r} is no value")


_WORDS: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "inf": float("inf"),
    "nan": float("nan"),
}


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise IRError(f"cannot read {text[place:]!r}")
        tokens.append((str(match.lastgroup), match.group(str(match.lastgroup))))
        place = match.end()
    return tokens


def _read_type(text: str) -> tuple[list[int | str], Any]:
    match = _TYPE.match(text)
    if match is None or match.group(1) not in DTYPES:
        raise IRError(f"{text!r} is no tensor type")
    sizes = [size.strip() for size in match.group(2).split(",") if size.strip()]
    return [int(size) if size.isdigit() else size for size in sizes], DTYPES[match.group(1)]
