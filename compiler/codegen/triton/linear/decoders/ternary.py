"""Ternary: codes of two bits around the middle."""

from __future__ import annotations

from typing import Any

from ..decoder import DECODERS
from .grouped import GroupedDecoder


@DECODERS.register
class TernaryDecoder(GroupedDecoder):
    """Code - 2, as integers of two bits without zero points."""

    name = "ternary"

    def bits(self, scheme: Any) -> int:
        return 2
