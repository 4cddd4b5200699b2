"""KIVI: keys quantized per channel, values per token, the newest tokens in full precision."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.store.kivi.storage import Kivi as Storage
from .layers import PackingPass


@dataclass(frozen=True)
class Kivi(PackingPass):
    """Packs older tokens into `bits` bits a number (Liu et al. 2024, section 3.3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=kivi(..,key_bits=2,value_bits=2,group=32,..)`

    Options: `key_bits` and `value_bits` where they differ from `bits`; `group`, tokens of a channel (keys) or
    channels of a token (values) that share a scale; `residual`, the newest tokens, which stay as they are;
    `slack`, how many more may gather before the oldest are packed; `keys`, `channel` or `token`; `prefill`,
    `exact` (attend to the prompt in full precision, then pack it) or `streaming` (pack after every chunk).

    Differs from the paper: group 32 and residual 128 are its figures, but here the newest 128 tokens are
    always whole, where the paper lets the keys' residual fall to nothing each time it is packed. Scale and
    zero are rounded outwards to float16. Groups that keep few tokens, and layers with a sliding window of
    their own, stay as they are.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group: int = 32
    residual: int = 128
    slack: int = 64
    keys: str = "channel"
    prefill: str = "exact"

    name = "kivi"

    def storage(self) -> Storage:
        return Storage(
            self.residual,
            self.slack,
            self.prefill,
            self.bits if self.key_bits is None else self.key_bits,
            self.bits if self.value_bits is None else self.value_bits,
            self.group,
            self.keys,
        )
