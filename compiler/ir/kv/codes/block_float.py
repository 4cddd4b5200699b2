"""Block floating point: small integers, *mantissas*, under an exponent that a block of them shares.

    x is about mantissa * 2**exponent,    -2**(bits - 1) <= mantissa < 2**(bits - 1)

Of arrays, in NumPy. A block's exponent is the one of two with the least squared error: the smallest that has
room for its largest number, and the one below, under which the largest is cut and all others are rounded to
half the step. An exponent is stored as a float32 holds it, with 127 added, in a byte; as there 255 stands for
what is infinite or no number, here of a whole block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .even import Codes, Floats

#: What an exponent is stored with, and the stored exponents that there are: those of float32's normal
#: numbers.
BIAS, LEAST, MOST = 127, 1, 254

#: The stored exponent of a block with a number that is not finite.
_NONE = 255

#: Where the bits of a float32 have its exponent.
EXPONENT_AT = 23


def rounded(x: Floats, bits: int) -> tuple[Codes, Codes]:
    """Mantissas with 2**(bits - 1) added, shaped as x, and the stored exponent [.., 1] of each block, the
    numbers along the last axis."""
    finite = np.isfinite(x).all(-1, keepdims=True)
    x = np.where(finite, x, np.float32(0))
    _, above = np.frexp(np.abs(x).max(-1, keepdims=True))  # the largest is below 2**above
    whole = np.clip(above - (bits - 1) + BIAS, LEAST, MOST)
    finer = np.maximum(whole - 1, LEAST)
    (codes, lost), (others, less) = (_mantissas(x, stored, bits) for stored in (whole, finer))
    cut = less < 4 * lost  # each is told in squares of its own steps
    stored = np.where(finite, np.where(cut, finer, whole), _NONE)
    return np.where(cut, others, codes), stored.astype(np.uint8)


def _mantissas(x: Floats, stored: npt.NDArray[np.int32], bits: int) -> tuple[Codes, Floats]:
    """Mantissas under stored exponents as codes, and the squared error [.., 1] of each block in steps."""
    half = 2 ** (bits - 1)
    in_steps = np.ldexp(x, BIAS - stored)
    found = np.clip(np.rint(in_steps), -half, half - 1)
    return (found + half).astype(np.uint8), np.square(found - in_steps).sum(-1, keepdims=True)
