"""The glossary and the code say the same words."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| ([^|]+) \| `(\w+)` \| ([^|]+) \|")
TOPS = ("compiler", "runtime", "einfold")


def rows() -> list[tuple[str, str, str]]:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ") and "in the code" not in line]
    found = [ROW.fullmatch(line) for line in table]
    assert all(found), [line for line, row in zip(table, found, strict=True) if not row]
    return [(row[1], row[2], row[3]) for row in found if row]


def test_every_word_is_in_the_code() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8") for top in TOPS for path in (ROOT / top).rglob("*.py")
    )
    names = set(re.findall(r"\w+", code))
    assert len(rows()) > 60
    assert not [(word, name) for word, name, _ in rows() if name not in names]


def test_no_word_is_explained_twice() -> None:
    words = [word for word, _, _ in rows()]
    assert len(set(words)) == len(words)


def test_newcomers_find_it() -> None:
    assert "(glossary.md)" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
