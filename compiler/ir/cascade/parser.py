"""Reads the textual form of cascades and expressions: recursive descent, nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from ....errors import IRError
from .cascade import Cascade, Rank, Statement, Tensor
from .expr import NAN, Apply, Const, Expr, Index, Pos, Ref, Size, Virtual
from .operators import OPERATORS, REDUCTIONS, SYMBOLS
from .printer import FORMAT

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*(?:e[+-]?\d+)?))|(?P<word>[A-Za-z_][\w.]*)"
    r"|(?P<mark>::|\*\*|//|<=|>=|==|!=|[-+*/%<>&|()\[\],=:#]))"
)
_CONSTANTS = {"true": True, "false": False, "inf": float("inf"), "nan": NAN.value}
#: Deeper text than any graph gives would exhaust the stack.
_DEPTH = 200

T = TypeVar("T")


def parse(text: str) -> Cascade:
    """The cascade that `text` prints. Raises IRError with the line for anything that does not read."""
    lines = text.splitlines()
    if not lines or lines[0] != FORMAT:
        raise IRError(f"not a cascade in the form {FORMAT!r}: the first line is {lines[:1]}")
    ranks: dict[str, Rank] = {}
    inputs: dict[str, Tensor] = {}
    statements: list[Statement] = []
    outputs: list[str] = []
    dead = "as written"
    for number, line in enumerate(lines[1:], start=2):
        word, _, rest = line.strip().partition(" ")
        try:
            if not word:
                continue
            if word == "rank":
                rank = _whole(rest, _Parser.rank)
                ranks[rank.name] = rank
            elif word == "input":
                tensor = _whole(rest, _Parser.tensor)
                inputs[tensor.name] = tensor
            elif word == "output":
                outputs.append(_whole(rest, _Parser.word))
            elif line.strip() == "dead rows zero":
                dead = "zero"
            else:
                statements.append(parse_statement(line))
        except IRError as error:
            raise IRError(f"line {number}: {error}") from error
    return Cascade(ranks, inputs, tuple(statements), tuple(outputs), dead)


def parse_statement(text: str) -> Statement:
    """One statement's line."""
    return _whole(text, _Parser.statement)


def parse_expr(text: str) -> Expr:
    """An expression."""
    return _whole(text, _Parser.expr)


def _whole(text: str, rule: Callable[[_Parser], T]) -> T:
    parser = _Parser(text)
    found = rule(parser)
    if parser.place < len(parser.tokens):
        raise IRError(f"{parser.peek()!r} is left over in {text!r}")
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0
        self.tokens: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise IRError(f"cannot read {text[at:]!r}")
            self.tokens.append((str(match.lastgroup), match.group(str(match.lastgroup))))
            at = match.end()

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else "end"

    def take(self, wanted: str | None = None, kind: str | None = None) -> str:
        found = self.peek()
        if (wanted is not None and found != wanted) or (kind is not None and self.kind() != kind):
            raise IRError(f"expected {wanted or kind!r}, found {found!r} in {self.text!r}")
        self.place += 1
        return found

    def accept(self, wanted: str) -> bool:
        if self.peek() == wanted:
            self.place += 1
            return True
        return False

    def word(self) -> str:
        return self.take(kind="word")

    def integer(self) -> int:
        text = self.take(kind="number")
        if not text.isdigit():
            raise IRError(f"expected a whole number, found {text!r}")
        return int(text)

    def rank(self) -> Rank:
        name = self.word()
        self.take(":")
        extent = self.take()
        virtual = self.integer() if self.accept("virtual") else 0
        return Rank(name, extent, virtual, self.accept("iterative"))

    def tensor(self) -> Tensor:
        name = self.word()
        ranks = tuple(index.rank for index in self.indices())
        kind = self.word() if self.accept(":") else "real"
        if kind not in ("real", "integer", "bool"):
            raise IRError(f"{kind!r} is no kind of input")
        return Tensor(name, ranks, kind)

    def statement(self) -> Statement:
        name, indices = self.word(), self.indices()
        self.take("=")
        expr = self.expr()
        if not self.accept("::"):
            return Statement(name, indices, expr)
        op = self.word()
        if op not in REDUCTIONS:
            raise IRError(f"{op!r} is no reduction; there are {', '.join(REDUCTIONS)}")
        return Statement(name, indices, expr, op, tuple(self.list("(", ")", self.word)))

    def indices(self) -> tuple[Index, ...]:
        return tuple(self.list("[", "]", self.index))

    def index(self) -> Index:
        if self.accept("#"):
            return Index(self.word(), end=True)
        if self.kind() == "number":
            return Index(offset=self.integer())
        rank = self.word()
        return Index(rank, self.integer() if self.accept("+") else 0)

    def list(self, left: str, right: str, item: Callable[[], T]) -> list[T]:
        self.take(left)
        found: list[T] = []
        while not self.accept(right):
            if found:
                self.take(",")
            found.append(item())
        return found

    def expr(self, above: int = 1) -> Expr:
        self.depth += 1
        if self.depth > _DEPTH:
            raise IRError("the expression is nested too deeply")
        left = self.factor()
        while (op := SYMBOLS.get(self.peek())) is not None and op.precedence >= above:
            self.take()
            left = Apply(op.name, (left, self.expr(op.precedence + 1)))
        self.depth -= 1
        return left

    def factor(self) -> Expr:
        if self.accept("("):
            inside = self.expr()
            self.take(")")
            return inside
        if self.accept("-"):
            inside = self.expr(7)
            if isinstance(inside, Const):
                return Const(-inside.value)
            return Apply("neg", (inside,))
        if self.kind() == "number":
            return Const(float(self.take()))
        name = self.word()
        if name in _CONSTANTS:
            return Const(_CONSTANTS[name])
        if self.peek() == "[":
            return Ref(name, self.indices())
        return self.call(name)

    def call(self, name: str) -> Expr:
        if name in ("pos", "size"):
            (rank,) = self.list("(", ")", self.word)
            return Pos(rank) if name == "pos" else Size(rank)
        if name == "virtual":
            self.take("(")
            rank = self.word()
            self.take(",")
            number = self.integer()
            self.take(")")
            return Virtual(rank, number)
        args = tuple(self.list("(", ")", self.expr))
        if name not in OPERATORS or OPERATORS[name].arity != len(args):
            raise IRError(f"no function {name!r} of {len(args)} arguments")
        return Apply(name, args)
