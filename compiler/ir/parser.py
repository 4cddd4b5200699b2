"""Reads the textual form of a program back. It builds nodes and evaluates nothing but shapes.

A text may be anybody's. Types are not taken on trust: each node's type is inferred again from its arguments,
and a line whose printed type differs is refused. Operators are those of `allowed`. Reading takes time that
grows with the text alone: numbers, lines, nesting, and the sizes that shapes come to have bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from torch import fx

from ...errors import IRError
from .allowed import check_call
from .interrupts import Later, tracing
from .kv.layout import CacheLayout
from .printer import FORMAT
from .program import Editor, ModelInfo, Program, find_op
from .types import DTYPES, check_size
from .weights import Weight

#: Bounds of a text: lines, characters of one, digits of a number, lists in lists, dims.
LINES, LINE, DIGITS, DEPTH, RANK = 100_000, 1 << 16, 32, 8, 8

_TOKEN = re.compile(
    r"\s*(?:(?P<node>%[A-Za-z_][\w]*)|(?P<string>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<number>-?(?:inf|nan|[0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?))"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>[\[\](),=]))"
)
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]$")
_SIZE = re.compile(r"[0-9]{1,15}|[A-Za-z][A-Za-z0-9_.]{0,31}")


def parse(
    text: str,
    load: Callable[[str, Weight], Weight] | None = None,
    any_operator: bool = False,
) -> Program:
    """The program that `text` prints.

    `load(name, declared)` gives the data of a declared weight; without it weights have shapes only. With
    `any_operator` all of torch's are let through: for texts of one's own, never for an artifact's.
    Raises IRError with the line number for anything that does not read.
    """
    lines = text.splitlines()
    if not lines or lines[0] != FORMAT:
        raise IRError(
            f"not a program in the form {FORMAT!r}: the first line is {text[:80].splitlines()[:1]}"
        )
    if len(lines) > LINES:
        raise IRError(
            f"the program has {len(lines):,} lines, more than the {LINES:,} that are read"
        )
    with tracing(), Later():  # half of reading is done by fake tensors
        return _Parser(load or (lambda name, declared: declared), any_operator).run(lines)


class _Parser:
    def __init__(self, load: Callable[[str, Weight], Weight], any_operator: bool) -> None:
        self.load = load
        self.any_operator = any_operator
        self.cache_lines: list[str] = []
        self.nodes: dict[str, fx.Node] = {}
        self.outputs: list[tuple[str, fx.Node]] = []

    def run(self, lines: list[str]) -> Program:
        for number, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            try:
                self._statement(line)
            except _ANY_FAULT as error:
                raise IRError(
                    f"line {number}: {_cut(str(error) or type(error).__name__)}"
                ) from error
        if not self.outputs:
            raise IRError("the program has no output")
        self.program.layout = CacheLayout.parse(self.cache_lines)
        names, values = zip(*self.outputs, strict=True)
        self.editor.set_output(values, names)
        return self.program

    def _statement(self, line: str) -> None:
        if len(line) > LINE:
            raise IRError(f"it has {len(line):,} characters, more than the {LINE:,} that are read")
        word, _, rest = line.partition(" ")
        handler = _STATEMENTS.get(word)
        if handler is None:
            raise IRError(f"expected a statement, found {line!r}")
        if (word == "model") == hasattr(self, "program"):
            raise IRError(f"one 'model' must come before all else, found {word!r}")
        handler(self, rest)

    def _on_model(self, rest: str) -> None:
        pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[0-9]{1,15})', rest)
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
        self._define(node_name[1:], self.editor.input(_quoted(name), shape, dtype, node_name[1:]))

    def _on_read(self, rest: str) -> None:
        head, _, kind = rest.partition(" : ")
        node_name, _, name = head.partition(" ")
        self._define(node_name[1:], self.editor.read(_quoted(name), node_name[1:]), kind)

    def _on_call(self, rest: str) -> None:
        left, _, right = rest.partition(" = ")
        op, _, tail = right.partition("(")
        body, separator, kind = tail.rpartition(") : ")
        if not separator:
            raise IRError(f"a call needs arguments and a type, found {rest!r}")
        args, kwargs = self._arguments(body)
        target = find_op(op)
        if not self.any_operator:
            check_call(target, args, kwargs)
        node = self.editor.call(target, *args, name=left[1:], **kwargs)
        self._define(left[1:], node, kind)

    def _on_output(self, rest: str) -> None:
        name, _, value = rest.partition(" = ")
        self.outputs.append((_quoted(name), self._node(value)))

    def _define(self, name: str, node: fx.Node, kind: str | None = None) -> None:
        if node.name != name:
            raise IRError(f"%{name} is defined twice, or is no valid name")
        check_size(node.meta["val"])
        if kind is not None and (found := self.program.shapes.describe(node.meta["val"])) != kind:
            raise IRError(f"%{name} is declared {kind}, but its arguments give {found}")
        self.nodes[name] = node

    def _node(self, text: str) -> fx.Node:
        try:
            return self.nodes[text.removeprefix("%")]
        except KeyError:
            raise IRError(f"{text} is used before it is defined") from None

    def _arguments(self, body: str) -> tuple[list[Any], dict[str, Any]]:
        tokens = _Tokens(body)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while tokens.left:
            key = tokens.keyword()
            value = self._value(tokens, 0)
            if key is None:
                args.append(value)
            elif key in kwargs:
                raise IRError(f"the argument {key!r} is given twice")
            else:
                kwargs[key] = value
            if tokens.left and tokens.next()[1] != ",":
                raise IRError(f"expected ',' in the arguments {body!r}")
        return args, kwargs

    def _value(self, tokens: _Tokens, depth: int) -> Any:
        kind, text = tokens.next()
        if kind == "node":
            return self._node(text)
        if kind == "string":
            return _quoted(text)
        if kind == "number":
            return _number(text)
        if kind == "word" and text in _WORDS:
            return _WORDS[text]
        if kind == "word" and text in DTYPES:
            return DTYPES[text]
        if text == "[" and depth < DEPTH:
            items: list[Any] = []
            while tokens.peek() != "]":
                items.append(self._value(tokens, depth + 1))
                if tokens.peek() == ",":
                    tokens.next()
            tokens.next()
            return items
        raise IRError(f"{text!r} is no value")


#: What a line can raise: its own errors, and those of functions that meet values of a wrong type or size.
_ANY_FAULT = (IRError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError)

_STATEMENTS: dict[str, Callable[[_Parser, str], None]] = {
    "model": _Parser._on_model,
    "cache": _Parser._on_cache,
    "weight": _Parser._on_weight,
    "input": _Parser._on_input,
    "read": _Parser._on_read,
    "call": _Parser._on_call,
    "output": _Parser._on_output,
}

_WORDS: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "inf": float("inf"),
    "nan": float("nan"),
}


class _Tokens:
    """The tokens of a call's arguments, read one behind the other."""

    def __init__(self, text: str) -> None:
        self._all: list[tuple[str, str]] = []
        self._place = 0
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise IRError(f"cannot read {text[place : place + 80]!r}")
            self._all.append((str(match.lastgroup), match.group(str(match.lastgroup))))
            place = match.end()

    @property
    def left(self) -> bool:
        return self._place < len(self._all)

    def peek(self) -> str:
        return self._all[self._place][1]

    def next(self) -> tuple[str, str]:
        if not self.left:
            raise IRError("the arguments end too early")
        self._place += 1
        return self._all[self._place - 1]

    def keyword(self) -> str | None:
        """The name before `=` where the next argument has one."""
        two = self._all[self._place : self._place + 2]
        if len(two) < 2 or two[0][0] != "word" or two[1][1] != "=":
            return None
        self._place += 2
        return two[0][1]


def _quoted(text: str) -> str:
    if not text.startswith('"'):
        raise IRError(f"expected a name in quotes, found {text!r}")
    found: str = json.loads(text)
    return found


def _number(text: str) -> int | float:
    if len(text) > DIGITS:
        raise IRError(f"a number of {len(text):,} characters is none that a program holds")
    value = int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise IRError(f"{text} does not fit in 64 bits")
    return value


def _cut(message: str) -> str:
    """On one line, with its beginning and its end."""
    message = " ".join(message.split())
    return message if len(message) <= 800 else f"{message[:400]} ... {message[-400:]}"


def _read_type(text: str) -> tuple[list[int | str], Any]:
    match = _TYPE.match(text)
    if match is None or match.group(1) not in DTYPES:
        raise IRError(f"{text!r} is no tensor type")
    sizes = [size.strip() for size in match.group(2).split(",") if size.strip()]
    if len(sizes) > RANK or not all(map(_SIZE.fullmatch, sizes)):
        raise IRError(f"{text!r} has sizes that are neither numbers nor names, or too many")
    return [int(size) if size.isdecimal() else size for size in sizes], DTYPES[match.group(1)]
