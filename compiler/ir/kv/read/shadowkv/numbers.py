"""The mean of a page's keys and how far they are apart, in NumPy; `statistic.py` has the same in torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..pages.paged import in_type_of

#: What keys that are not alike at all have: of int8 the largest.
FARTHEST = 127.0
#: What a length is at least by which is divided.
TINY = 1e-30


def numbers_of(keys_KPND: Any) -> Any:
    """The statistic of whole pages, [K, P, D + 1], in the keys' type."""
    wide = keys_KPND.astype(np.float32, copy=False)
    mean_KPD = wide.mean(2)
    length_KP = np.square(wide).sum((2, 3)) / np.float32(wide.shape[2])
    alike_KP = np.square(mean_KPD).sum(2) / np.maximum(length_KP, np.float32(TINY))
    apart_KP1 = (np.float32(FARTHEST) * (1 - alike_KP))[..., None]
    return in_type_of(keys_KPND, np.concatenate((mean_KPD, apart_KP1), -1))
