"""QLoRA's nf4 and fp4: sixteen levels without a pattern (Dettmers et al. 2023, appendix E)."""

from __future__ import annotations

from typing import Any

from ..decoder import DECODERS, TRITON, Decoder, plain_codes


@DECODERS.register
class Nf4Decoder(Decoder):
    """Fifteen selections by the bits of a code, over the scheme's `levels`.

    Levels are rounded to halves where products are in halves. By a count of instructions it is arithmetic,
    not memory, that one row of activations waits for; a table in memory would be a load a weight instead.
    """

    name = "nf4"
    exact = False

    def values(self, scheme: Any, kind: str, place: str) -> list[str]:
        lines = [plain_codes(4, place), *(f"bit{at} = (q & {1 << at}) != 0" for at in range(4))]
        texts = [repr(float(level)) for level in scheme.levels]
        for at in range(4):
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
            texts = [f"of{at}_{place}" for place in range(len(pairs))]
            lines += [
                f"{name} = tl.where(bit{at}, {high}, {low})"
                for name, (low, high) in zip(texts, pairs, strict=True)
            ]
        return [*lines, f"values = {texts[0]}.to({TRITON[kind]})"]


@DECODERS.register
class Fp4Decoder(Nf4Decoder):
    """As nf4."""

    name = "fp4"
