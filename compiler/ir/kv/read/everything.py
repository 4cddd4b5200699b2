"""Everything that is kept is read."""

from __future__ import annotations

from dataclasses import dataclass

from .reader import READERS, Reader


@READERS.register
@dataclass(frozen=True)
class Everything(Reader):
    """Every query attends over all visible tokens."""

    name = "everything"

    @property
    def text(self) -> str:
        return ""

    @property
    def whole(self) -> bool:
        return True
