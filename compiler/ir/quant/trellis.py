"""A bitshift trellis: a stream of bits in which each window of `memory` bits stands for a Gaussian number.

Weight t reads the `memory` bits of the stream that end at bit floor((t + 1) * rate); before the first bit
there are zeros. So each weight adds `rate` bits and shares the others with the ones before it, and among all
streams the nearest to a row is found by dynamic programming (Viterbi 1967) over the 2^memory windows.

    value(window) = Phi^-1((i + 1/2) / 2^memory),    i = a * window mod 2^memory,  a / 2^memory near 0.73

Every quantile of the normal distribution is taken once. The multiplier is the best of 57 odd ones drawn at
random at 10 bits: it must spread both the windows that differ in their new bits, and those that differ in
their old ones.

Source: QTIP (Tseng et al. 2024, sections 3.1 and 3.2), whose windows have 16 bits and values computed by
hashes, and whose streams bite their own tail where these start from zeros.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

#: Numbers of best costs that are kept at a time, and weights of a stretch that is searched at once: bounds
#: the memory of a search at some tens of megabytes.
_KEPT, _STRETCH = 1 << 24, 1024
#: Weights behind a stretch that are searched too before its codes are taken.
_AHEAD = 64
#: Of a window the share of the multiplier.
_SHARE = 747 / 1024


def ends(width: int, rate: float) -> list[int]:
    """The bit at which each weight's window ends."""
    return [math.floor((place + 1) * rate) for place in range(width)]


def steps(width: int, rate: float) -> list[int]:
    """The bits that each weight adds."""
    at = [0, *ends(width, rate)]
    return [after - before for before, after in pairwise(at)]


@lru_cache(maxsize=8)
def book(memory: int) -> tuple[float, ...]:
    """The value of each window of `memory` bits."""
    size = 1 << memory
    factor, normal = int(size * _SHARE) | 1, NormalDist()
    return tuple(normal.inv_cdf((factor * at % size + 0.5) / size) for at in range(size))


def pack_codes(codes: Tensor, rate: float) -> Tensor:
    """The stream, uint8 [.., ceil(T * rate / 8)], of what each of T weights adds; high bits first."""
    from .pack import pack_bits

    places: list[int] = []
    shifts: list[int] = []
    for place, count in enumerate(steps(codes.shape[-1], rate)):
        places += [place] * count
        shifts += reversed(range(count))
    shift = torch.tensor(shifts, device=codes.device)
    bits = (codes[..., places].to(torch.int32) >> shift) & 1
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    return pack_bits(padded.unflatten(-1, (-1, 8)).flip(-1), 1).squeeze(-1)


def unpack_values(packed: Tensor, width: int, rate: float, memory: int) -> Tensor:
    """The values [.., width], float32, of a stream's windows."""
    # Three bytes hold a window of up to 16 bits wherever it starts; in floats, which every target has.
    starts = [16 + end - memory for end in ends(width, rate)]
    stream = torch.nn.functional.pad(packed.float(), (2, 2))
    device = packed.device
    first = torch.tensor([start // 8 for start in starts], device=device)
    high, middle, low = (stream.index_select(-1, first + at) for at in range(3))
    below = [2.0 ** -(24 - start % 8 - memory) for start in starts]
    whole = ((high * 256 + middle) * 256 + low) * torch.tensor(below, device=device)
    size = 1 << memory
    window = whole.floor()
    window = window - (window * (1 / size)).floor() * size
    return torch.tensor(book(memory), device=device)[window.long()]


def search(rows: Tensor, rate: float, memory: int) -> Tensor:
    """What each weight of rows [R, T] adds to the nearest stream, uint8 [R, T].

    Exact for rows of up to `_STRETCH` + `_AHEAD` weights; of longer ones stretch by stretch, each looking
    ahead. Takes some 80 MB, and time in proportion to R T 2^memory.
    """
    width = rows.shape[-1]
    histories = 1 << (memory - math.floor(rate))
    most = _KEPT // (min(width, _STRETCH + _AHEAD) * histories)
    at_once = max(8, most - most % 8)  # whole vectors
    found = [_search(part.T.contiguous(), rate, memory) for part in rows.float().split(at_once)]
    return torch.cat(found, dim=1).T.to(torch.uint8)


def _search(x_TR: Tensor, rate: float, memory: int) -> Tensor:
    width, rows = x_TR.shape
    added = steps(width, rate)
    window = torch.zeros(rows, dtype=torch.long, device=x_TR.device)
    found: list[Tensor] = []
    while len(found) < width:
        start = len(found)
        whole = width - start <= _STRETCH + _AHEAD
        stretch = width - start if whole else _STRETCH
        stop = start + stretch + (0 if whole else _AHEAD)
        windows = _viterbi(x_TR[start:stop], added[start:stop], memory, window)[:stretch]
        found += [
            at & ((1 << count) - 1) for at, count in zip(windows, added[start:], strict=False)
        ]
        window = windows[-1]
    return torch.stack(found)


def _viterbi(x_TR: Tensor, added: list[int], memory: int, window_R: Tensor) -> list[Tensor]:
    """The windows of the stream nearest to numbers x, behind a first window.

    The cost of a window is that of its value, and the least of those windows that it may follow, which share
    all but the oldest bits: one number for each history of `memory` less the new bits.
    """
    rows, size, device = x_TR.shape[1], 1 << memory, x_TR.device
    values = torch.tensor(book(memory), device=device)
    # (x - v)² less x², as a product of two columns.
    columns = torch.stack([values * values, -2 * values], dim=1)
    numbers = torch.stack([torch.ones_like(x_TR), x_TR], dim=1)
    cost = torch.full((size, rows), torch.inf, device=device)
    cost.scatter_(0, window_R[None], 0.0)
    least = []
    for x_2R, count in zip(numbers, added, strict=True):
        least.append(cost.view(1 << count, -1, rows).amin(0))
        torch.mm(columns, x_2R, out=cost)
        cost.view(-1, 1 << count, rows).add_(least[-1][:, None])
    return _trace(x_TR, added, values, least, cost.argmin(0), window_R)


def _trace(
    x_TR: Tensor,
    added: list[int],
    values: Tensor,
    least: list[Tensor],
    last_R: Tensor,
    window_R: Tensor,
) -> list[Tensor]:
    """The windows that lead to the last ones, from the least costs of each history."""
    size, windows = len(values), [last_R]
    for place in range(len(added) - 1, 0, -1):
        count = added[place]
        oldest = torch.arange(1 << count, device=x_TR.device)[:, None] * (size >> count)
        before = oldest + (windows[-1] >> count)
        value = values[before]
        cost = value * value - 2 * value * x_TR[place - 1]
        cost += least[place - 1].gather(0, before >> added[place - 1])
        windows.append(before.gather(0, cost.argmin(0)[None])[0])
    return windows[::-1]
