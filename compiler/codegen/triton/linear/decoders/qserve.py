"""QServe's progressive groups: value = (code - zero) * scale, all of them integers."""

from __future__ import annotations

from typing import Any

from ..decoder import DECODERS, Decoder, plain_codes


@DECODERS.register
class QServeDecoder(Decoder):
    """In int8, where no result leaves it. For products of integers alone.

    QServe's own kernel does so four codes at a time in a register of 32 bits (Lin et al. 2024, section
    5.2.3), for which Triton has no words: its numbers stand by themselves.
    """

    name = "qserve"

    def integers(self, scheme: Any, place: str) -> list[str]:
        return [plain_codes(4, place), "values = (q.to(tl.int8) - zero) * scale"]
