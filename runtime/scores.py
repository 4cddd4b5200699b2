"""How much attention tokens got, and which of them stay by it.

A step shows the queries of the groups that choose by attention. They are attended with here once more,
over the keys in the slots, and the attention is added up for each token and KV head, over its query
heads. Padding behind a row's tokens neither pays nor gets attention.

Arrays may be NumPy's or torch's; what is chosen is decided in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..compiler.ir.kv.keep.policies import HeavyHitters, Merged, Voted
from ..compiler.ir.kv.layout import HeadGroup, cache_name, query_name
from ..errors import EinfoldError

if TYPE_CHECKING:
    from .cache import Cache

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: Buffers whose third axis is the slots: they move together.
BY_SLOT = ("key", "value", "score", "local")
_BOOKS = BY_SLOT[2:]

#: Numbers of attention weights that are held at a time: 4 MB, little beside the caches that are chosen from.
_BLOCK = 1 << 20


def observe(cache: Cache, sizes: npt.NDArray[np.int64], observed: Mapping[str, Any]) -> None:
    """Adds what the tokens of a step attended to, `sizes` of each row; they are not counted yet."""
    for layer, index, group in cache.layout.groups():
        if not group.observed or group.owner is not None:
            continue
        name, prefix = query_name(layer.layer, index), cache_name(layer.layer, index)
        voters = cache.buffers.get(f"{prefix}.voters")
        if not sizes.any() or (voters is None and not group.scored):
            continue
        if name not in observed:
            raise EinfoldError(f"the step gave no {name}, by which the cache chooses its tokens")
        used = cache.counters[cache.layout.clock(group)]
        for row in np.flatnonzero(sizes):
            q_SHD = observed[name][row][: int(sizes[row])]
            if voters is not None:
                _remember(voters[row], q_SHD)
            if group.storage.balanced:
                _widen(cache.buffers[f"{prefix}.query_max"][row], q_SHD)
            if group.scored:
                _add(cache, group, prefix, int(row), int(used[row]), q_SHD)


def _remember(voters_HWD: Any, q_SHD: Any) -> None:
    """Keeps the newest queries, the last of them at the end."""
    new, size = q_SHD.shape[0], voters_HWD.shape[1]
    if new < size:
        voters_HWD[:, : size - new] = voters_HWD[:, new:] + 0  # a copy: they overlap
    voters_HWD[:, max(0, size - new) :] = q_SHD[-size:].swapaxes(0, 1)


def _widen(largest_KD: Any, q_SHD: Any) -> None:
    """Keeps the largest magnitude of each channel of a KV head's queries."""
    of_head_D = np.abs(_host(q_SHD)).max(0)
    of_head_KD = of_head_D.reshape(len(largest_KD), -1, of_head_D.shape[-1]).max(1)
    largest_KD[:] = _like(np.maximum(_host(largest_KD), of_head_KD), largest_KD)


def _add(cache: Cache, group: HeadGroup, prefix: str, row: int, used: int, q_SHD: Any) -> None:
    new = q_SHD.shape[0]
    policy, keys_KND = group.policy, _host(cache.buffers[f"{prefix}.key"][row])
    weights = [np.ones(new, np.float32)]
    if isinstance(policy, Merged):
        fading = 1 - 1 / policy.local
        weights.append((fading ** np.arange(new - 1, -1, -1)).astype(np.float32))
        cache.buffers[f"{prefix}.local"][row] *= fading**new
    sums_KMT = attention_sums(_host(q_SHD), keys_KND[:, : used + new], used, np.stack(weights))
    for at, name in enumerate(_BOOKS[: len(weights)]):
        score_KN = cache.buffers[f"{prefix}.{name}"][row]
        score_KN[:, : used + new] += _like(sums_KMT[:, at], score_KN)


def attention_sums(q_SHD: Floats, keys_KTD: Any, first: int, weights_MS: Floats) -> Floats:
    """Sums [K, M, T] over queries and the query heads of a KV head of the attention to each slot.

    Query s stands at slot `first` + s and sees the slots up to it. Each query counts by its weight, in
    M ways. Queries are scaled such that their product with the keys is the logit.
    """
    heads, total = keys_KTD.shape[:2]
    found = np.zeros((heads, len(weights_MS), total), np.float32)
    each = q_SHD.shape[1] // heads
    rows = max(1, _BLOCK // (total * q_SHD.shape[1]))
    keys_KDT = keys_KTD.astype(np.float32, copy=False).swapaxes(1, 2)
    for start in range(0, len(q_SHD), rows):
        part_SHD = q_SHD[start : start + rows]
        count = len(part_SHD)
        q_KRD = part_SHD.reshape(count, heads, each, -1).transpose(1, 2, 0, 3)
        logits = q_KRD.reshape(heads, each * count, -1) @ keys_KDT
        logits = logits.reshape(heads, each, count, total)
        hidden = np.arange(total) > first + start + np.arange(count)[:, None]
        np.copyto(logits, np.float32(-np.inf), where=hidden)
        logits -= logits.max(-1, keepdims=True)
        attention = np.exp(logits, out=logits)
        attention /= attention.sum(-1, keepdims=True)
        found += weights_MS[:, start : start + count] @ attention.sum(1)
    return found


def staying(
    cache: Cache, group: HeadGroup, prefix: str, row: int, used: int, leaving: int
) -> Ints | None:
    """The slots that stay for each head, [K, used - leaving], in order; None where their places decide.

    Called before tokens leave. Tokens that are merged into others are merged here.
    """
    policy = group.policy
    older, count = used - policy.newest, used - policy.newest - leaving
    if isinstance(policy, Voted):
        voters = cache.buffers.get(f"{prefix}.voters")
        if voters is None:
            return None  # the prompt was read: what was chosen stays in front
        score_KT = _votes(cache, policy, prefix, row, used)
    elif isinstance(policy, HeavyHitters):
        score_KT = _score(cache, prefix, row)[:, :older]
    else:
        return None
    best_KC = np.sort(np.argsort(-score_KT, axis=1, kind="stable")[:, :count], axis=1)
    if isinstance(policy, Merged):
        _merge(cache, policy, prefix, row, score_KT, best_KC)
    newest = np.broadcast_to(np.arange(older, used), (len(best_KC), policy.newest))
    return np.concatenate((best_KC, newest), axis=1)


def gather(cache: Cache, prefix: str, row: int, used: int, staying_KN: Ints) -> None:
    """Puts the slots that stay side by side, in front."""
    heads = np.arange(len(staying_KN))[:, None]
    for slots_KN in _by_slot(cache, prefix, row):
        slots_KN[:, : staying_KN.shape[1]] = slots_KN[heads, staying_KN]
    clear(cache, prefix, row, staying_KN.shape[1])


def clear(cache: Cache, prefix: str, row: int, used: int) -> None:
    """Slots behind the used ones have no score: new tokens add to it."""
    for name in _BOOKS:
        if f"{prefix}.{name}" in cache.buffers:
            cache.buffers[f"{prefix}.{name}"][row][:, used:] = 0


def _by_slot(cache: Cache, prefix: str, row: int) -> Iterator[Any]:
    for part in BY_SLOT:
        if f"{prefix}.{part}" in cache.buffers:
            yield cache.buffers[f"{prefix}.{part}"][row]


def _score(cache: Cache, prefix: str, row: int) -> Floats:
    """What tokens are chosen by, [K, slots]: all attention, and that of late queries where it is kept."""
    books = [
        _host(cache.buffers[f"{prefix}.{n}"][row])
        for n in _BOOKS
        if f"{prefix}.{n}" in cache.buffers
    ]
    shares = [book / np.maximum(book.sum(1, keepdims=True), 1e-30) for book in books]
    return np.sum(shares, axis=0)  # type: ignore[no-any-return]


def _votes(cache: Cache, policy: Voted, prefix: str, row: int, used: int) -> Floats:
    """Attention of the prompt's last tokens to each older slot, [K, older], pooled over neighbours."""
    voters = min(policy.observe, used)
    q_SHD = _host(cache.buffers[f"{prefix}.voters"][row])[:, policy.observe - voters :].swapaxes(
        0, 1
    )
    keys_KND = _host(cache.buffers[f"{prefix}.key"][row])[:, :used]
    ones = np.ones((1, voters), np.float32)
    votes_KT = attention_sums(q_SHD, keys_KND, used - voters, ones)[:, 0]
    votes_KT = votes_KT[:, : used - policy.observe]
    half = policy.kernel // 2
    padded = np.pad(votes_KT, ((0, 0), (half, half)))
    around = np.lib.stride_tricks.sliding_window_view(padded, policy.kernel, axis=1)
    return around.max(-1)  # type: ignore[no-any-return]


def _merge(
    cache: Cache, policy: Merged, prefix: str, row: int, score_KT: Floats, best_KC: Ints
) -> None:
    """Averages each token that leaves into the kept one whose key resembles it most, by their scores.

    Those that resemble none belong to the zero class: they are averaged into nothing.
    """
    slots = list(_by_slot(cache, prefix, row))
    keys_KTD = _host(slots[0])[:, : score_KT.shape[1]].astype(np.float32, copy=False)
    for head, best_C in enumerate(best_KC):
        leaving_L = np.setdiff1d(np.arange(score_KT.shape[1]), best_C)
        keys_TD = keys_KTD[head] / np.maximum(
            np.linalg.norm(keys_KTD[head], axis=1, keepdims=True), 1e-30
        )
        cosine_LC = keys_TD[leaving_L] @ keys_TD[best_C].T
        nearest_L = cosine_LC.argmax(1)
        alike = cosine_LC.max(1) >= policy.similarity
        weights_CL = np.zeros((len(best_C), len(leaving_L)), np.float32)
        weights_CL[nearest_L[alike], np.flatnonzero(alike)] = score_KT[head, leaving_L[alike]]
        own_C = np.maximum(score_KT[head, best_C], 1e-30)
        total_C = own_C + weights_CL.sum(1)
        for slots_KND in slots[:2]:
            x_TD = _host(slots_KND[head])
            mixed_CD = own_C[:, None] * x_TD[best_C] + weights_CL @ x_TD[leaving_L]
            slots_KND[head, best_C] = _like(mixed_CD / total_C[:, None], slots_KND)
        taken_CL = (weights_CL > 0).astype(np.float32)
        for book_KN in slots[2:]:
            book_KN[head, best_C] += _like(taken_CL @ _host(book_KN[head])[leaving_L], book_KN)


def _host(x: Any) -> Any:
    """As a NumPy array."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def _like(x: Floats, other: Any) -> Any:
    """As an array of the kind that `other` is."""
    return x if isinstance(other, np.ndarray) else other.new_tensor(x)
