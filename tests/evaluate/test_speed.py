"""Timing of caches that hold more than plain slots."""

from __future__ import annotations

from pathlib import Path

import einfold
from einfold.evaluate.speed import decode_seconds

from .. import models


def test_decoding_is_timed_behind_packed_tokens(tmp_path: Path) -> None:
    """Numbers of any kind would point past a granule as places of outliers."""
    out = tmp_path / "a"
    gear = "gear:group=16,tokens=16,residual=16,slack=8,share=0.3"
    einfold.compile(models.build("llama"), out, quant=gear, target="reference", check=False)
    model = einfold.load(out)
    assert decode_seconds(model, context=60, new_tokens=2, batch=2) > 0
