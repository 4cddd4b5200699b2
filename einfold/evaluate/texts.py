"""Evaluation texts: documents, and the pass keys that are hidden in them and asked for later."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import PromptError, pass_on

#: `What is the pass key? The pass key is 48213.`, or `... pass key of NAME ...` both times.
QUESTION = re.compile(r"What is the pass key((?: of \w+)?)\? The pass key\1 is (\d+)")

#: A line with a form feed alone ends a document.
_BREAK = re.compile(r"^\f[ \t]*$\n?", re.MULTILINE)

DEFAULT = Path(__file__).with_name("default.txt")


@dataclass(frozen=True)
class Key:
    """A pass key that a text states and asks for, by characters."""

    stated: int
    """Where its statement begins."""
    asked: int
    """Where its question begins."""
    answer: tuple[int, int]
    """Start and end of the digits to recall."""


@dataclass(frozen=True)
class Document:
    """One text and the pass keys that it asks for."""

    text: str
    keys: tuple[Key, ...]


def read_documents(path: Path) -> list[Document]:
    """The documents of a text file. Raises PromptError where it is missing, empty or no UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        pass_on(error)
        raise PromptError(f"cannot read the text {path}: {error}") from error
    documents = [document(part.strip("\n")) for part in _BREAK.split(text) if part.strip()]
    if not documents:
        raise PromptError(f"the text {path} is empty")
    return documents


def document(text: str) -> Document:
    """A text with its pass-key questions found."""
    keys = []
    for found in QUESTION.finditer(text):
        statement = f"The pass key{found.group(1)} is {found.group(2)}"
        stated = text.find(statement, 0, found.start())
        if stated >= 0:  # only a key that was stated before can be recalled
            keys.append(Key(stated, found.start(), found.span(2)))
    return Document(text, tuple(keys))
