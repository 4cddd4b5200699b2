"""The meaning of cached attention as a cascade; `test_artifact.py` holds it to the operator's.

    b rows, s new tokens, k KV heads, g query heads of a KV head, c slots of the cache,
    d size of a key, f size of a value

Row b uses used[b] slots. Slot c is seen by new token s where c <= used[b] + s, the slot that the token
itself is written to, so every query sees one key at least. A sink is one more, virtual, slot with a logit
and no value. With counts, slot 0 stands for count[b, k] tokens, or for none and is hidden.
"""

from __future__ import annotations

from ....ir.cascade.cascade import Cascade
from ....ir.cascade.parser import parse
from ....ir.cascade.printer import FORMAT, print_number
from ....ir.cascade.verifier import verify
from .kinds import AttentionKind

#: The streamed rank: slots of the cache.
STREAM = "c"


def cascade_of(kind: AttentionKind) -> Cascade:
    """The cascade of a kind."""
    cascade = parse(
        "\n".join(
            [
                FORMAT,
                *_declarations(kind),
                *_statements(kind),
                "output out",
                *(["output lse"] if kind.lse else []),
            ]
        )
    )
    verify(cascade)
    return cascade


def _declarations(kind: AttentionKind) -> list[str]:
    integer = " : integer" if kind.cache.startswith(("i", "u")) else ""
    lines = [
        "rank b : B",
        "rank s : S",
        f"rank k : {kind.kv_heads}",
        f"rank g : {kind.group}",
        f"rank d : {kind.key_size}",
        f"rank f : {kind.value_size}",
        "rank c : C" + (" virtual 1" if kind.sinks else ""),
        "input query[b, s, k, g, d]",
        f"input key[b, k, c, d]{integer}",
        f"input value[b, k, c, f]{integer}",
        "input used[b] : integer",
    ]
    lines += ["input count[b, k]"] if kind.counted else []
    lines += ["input sink[k, g]"] if kind.sinks else []
    lines += ["input key_scale[k, d]", "input value_scale[k, f]"] if kind.scaled else []
    return lines


def _statements(kind: AttentionKind) -> list[str]:
    key, value = "key[b, k, c, d]", "value[b, k, c, f]"
    if kind.scaled:
        key, value = f"({key} * key_scale[k, d])", f"({value} * value_scale[k, f])"
    logit = logit_of("score[b, s, k, g, c]", kind.scale, kind.softcap)
    seen = "pos(c) <= used[b] + pos(s)"
    if kind.window:
        seen += f" & used[b] + pos(s) - pos(c) < {kind.window}"
    if kind.counted:
        # The logarithm of no tokens at all is -inf, which hides the slot.
        logit += " + where(pos(c) == 0, log(max(count[b, k], 0)), 0)"
    logit = f"where({seen}, {logit}, -inf)"
    if kind.sinks:
        logit = f"where(virtual(c, 0), sink[k, g], {logit})"
    lse = "lse[b, s, k, g] = log(total[b, s, k, g]) + top[b, s, k, g]"
    return [
        f"score[b, s, k, g, c] = query[b, s, k, g, d] * {key} :: sum(d)",
        f"logit[b, s, k, g, c] = {logit}",
        *softmax_of(STREAM),
        f"out[b, s, k, g, f] = power[b, s, k, g, c] / total[b, s, k, g] * {value} :: sum(c)",
        *([lse] if kind.lse else []),
    ]


def logit_of(score: str, scale: float, softcap: float) -> str:
    """A score times the scale, and capped where there is a cap."""
    logit = f"{score} * {print_number(scale)}"
    if not softcap:
        return logit
    cap = print_number(softcap)
    return f"tanh({logit} / {cap}) * {cap}"


def softmax_of(stream: str) -> list[str]:
    """The statements from logits over a rank to their largest, their powers and the sum of these."""
    return [
        f"top[b, s, k, g] = logit[b, s, k, g, {stream}] :: max({stream})",
        f"power[b, s, k, g, {stream}] = exp(logit[b, s, k, g, {stream}] - top[b, s, k, g])",
        f"total[b, s, k, g] = power[b, s, k, g, {stream}] :: sum({stream})",
    ]
