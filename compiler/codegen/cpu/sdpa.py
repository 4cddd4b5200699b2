"""A plan through scaled_dot_product_attention, where scores are a product plus what is known of a place.

    state M = L :: max(t)                        O, r = attention(q * a, k, v, mask=bias)
    state D = exp(L - M) :: sum(t)          ->   M = r, D = 1, N = O
    state N = exp(L - M) * v :: sum(t)           finish as it stands
    L = a * (q . k) + bias

A reference that only stabilises may be anything, the log-sum-exp r of the real keys too. Under it the
sum of weights is 1 and the weighted sum is what the kernel returns, so whatever else a plan does, it goes
on from there: an attention sink adds exp(sink - r) to D, a second softmax is a second call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Const, Expr, Ref, reads, rewrite
from ...ir.cascade.plan import Plan, Reference, State
from .expressions import factors, on_real, product, simplified
from .frame import Frame, NotLoweredError, Signature, Value
from .heads import Heads, attend
from .logits import Logits, decomposed
from .one_tile import CLEAN, cleaned, run_maps, with_virtual


@dataclass(frozen=True)
class Attention:
    """The states of one reference: a maximum, sums of weights, and weighted sums by their value."""

    reference: Reference
    maximum: State
    logits: Logits
    sums: tuple[State, ...]
    weighted: tuple[tuple[State, Expr], ...]


@dataclass(frozen=True)
class ThroughSdpa:
    """A function of the signature's inputs that gives its outputs."""

    plan: Plan
    signature: Signature

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raises NotLoweredError where the plan is not made of attentions."""
        found = attentions(self.plan)
        if any(attention.logits.capped is not None for attention in found):
            raise NotLoweredError("scores go through tanh")
        if any(attention.logits.more for attention in found):
            raise NotLoweredError("scores go through add")
        frame = Frame.of(self.plan, self.signature, tensors)
        run_maps(frame, self.plan.before)
        finish = self.plan.finish
        virtual = self.plan.ranks[self.plan.rank].virtual > 0
        for attention in found:
            finish = self._run(frame, attention, finish, virtual)
        grouped = {s.name for a in found for s in (a.maximum, *a.sums)} | {
            s.name for a in found for s, _ in a.weighted
        }
        for state in self.plan.states:
            if state.name not in grouped:
                raise NotLoweredError(f"state {state.name} belongs to no attention")
        for item in finish:
            known = {*frame.values, *frame.numbers}
            missing = [r.tensor for r in reads(item.expr) if r.tensor not in known]
            if missing:
                raise NotLoweredError(f"what follows reads {missing[0]}")
            run_maps(frame, [item])
        return frame.results(self.signature)

    def _run(
        self, frame: Frame, item: Attention, finish: tuple[Statement, ...], virtual: bool
    ) -> tuple[Statement, ...]:
        hides = hiding(self.plan, item.logits.bias)
        finish, zeroed = without_dead_zero(finish, item, virtual)
        needs_statistics = virtual or _reads_any(finish, item)
        heads = Heads.of(frame, self.plan, item.logits, [v for _, v in item.weighted])
        run_maps(frame, heads.needs(frame, self.plan))
        results, statistic = attend(frame, heads, needs_statistics)
        for (state, _), value in zip(item.weighted, results, strict=True):
            frame.values[state.name] = value
        ranks = item.reference.ranks
        one: torch.Tensor = torch.ones((), device=frame.device)
        if hides != Const(0.0) and not (zeroed and not virtual):
            dead = heads.dead(frame, hides)
            one = torch.where(dead.over(ranks), 0.0, 1.0)
            if statistic is not None:
                hidden = torch.where(dead.over(ranks), -math.inf, statistic.over(ranks))
                frame.values[item.reference.name] = Value(hidden, ranks)
        if statistic is not None:
            frame.values.setdefault(item.reference.name, statistic)
            frame.values[item.reference.name + CLEAN] = statistic
            frame.values[item.maximum.name] = frame.values[item.reference.name]
        for state in item.sums:
            frame.values[state.name] = Value(one, ranks) if one.ndim else Value(one, ())
        if virtual:
            for state in (*item.sums, *(state for state, _ in item.weighted)):
                body = cleaned(frame, state.body)
                frame.values[state.name] = with_virtual(
                    frame, self.plan, state, body, frame.values[state.name]
                )
            return finish
        ones = {state.name for state in item.sums} if not one.ndim else set()
        return tuple(with_ones(statement, ones) for statement in finish)


def attentions(plan: Plan) -> list[Attention]:
    """The attentions that all states of a plan belong to. Raises NotLoweredError, saying what is not one."""
    found = []
    if any(plan.rank in plan.ranks_of(name) for name in plan.outputs):
        raise NotLoweredError("an output carries the keys")
    for reference in plan.references:
        if reference.kind != "scale" or not reference.free:
            raise NotLoweredError(f"the outputs depend on {reference.source}")
        found.append(_attention(plan, reference))
    if not found:
        raise NotLoweredError("no weights are exponentials less their maximum")
    for state in plan.states:
        if len(state.references) > 1:
            raise NotLoweredError(f"state {state.name} has two references")
    return found


def _attention(plan: Plan, reference: Reference) -> Attention:
    sums: list[State] = []
    weighted: list[tuple[State, Expr]] = []
    logits: Expr | None = None
    for state in plan.states:
        if reference.name not in state.references:
            continue
        if state.op != "sum" or state.over != (plan.rank,):
            raise NotLoweredError(f"state {state.name} is no sum over {plan.rank} alone")
        shifted, rest = _weights(state, reference)
        if logits is not None and shifted != logits:
            raise NotLoweredError(f"state {state.name} has scores of its own")
        logits = shifted
        if rest:
            weighted.append((state, product(rest)))
        else:
            sums.append(state)
    maximum = next((s for s in plan.states if _feeds(plan, s, reference)), None)
    if logits is None or maximum is None or maximum.op != "max" or not weighted:
        raise NotLoweredError(f"{reference.name} has no weighted sum")
    # What the weights are relative to must bound these very scores.
    taken_apart = decomposed(plan, logits, [value for _, value in weighted])
    return Attention(reference, maximum, taken_apart, tuple(sums), tuple(weighted))


def _feeds(plan: Plan, state: State, reference: Reference) -> bool:
    """Whether a reference follows from a state alone, such as from a maximum times a number."""
    rows = {s.name: s for s in plan.steps if isinstance(s, Statement)}
    name = reference.source
    while name in rows:
        read = {part.tensor for part in reads(rows[name].expr)}
        if len(read) != 1:
            return False
        (name,) = read
    return name == state.name


def _weights(state: State, reference: Reference) -> tuple[Expr, list[Expr]]:
    """The scores under exp, and what else is multiplied."""
    scores: Expr | None = None
    rest: list[Expr] = []
    for part in factors(on_real(state.body)):
        inside = part.args[0] if isinstance(part, Apply) and part.op == "exp" else None
        shifted = isinstance(inside, Apply) and inside.op == "sub"
        if shifted and isinstance(inside, Apply) and inside.args[1] == reference.ref:
            if scores is not None:
                raise NotLoweredError(f"state {state.name} has two exponentials")
            scores = inside.args[0]
        else:
            rest.append(part)
    if scores is None:
        raise NotLoweredError(f"state {state.name} is weighted by no exponential")
    return scores, rest


def hiding(plan: Plan, bias: Expr) -> Expr:
    """What of the bias may be -inf: its finite terms say nothing on whether a row has a live key."""
    if isinstance(bias, Apply) and bias.op in ("add", "sub"):
        terms = [hiding(plan, arg) for arg in bias.args]
        return simplified(Apply(bias.op, tuple(terms)))
    return bias if _can_hide(plan, bias) else Const(0.0)


def _can_hide(plan: Plan, bias: Expr) -> bool:
    """Whether a row may have no live key: a value of -inf is written, or a mask may hold one."""
    if isinstance(bias, Apply) and bias.op == "where":
        return any(_can_hide(plan, arg) for arg in bias.args[1:])
    if isinstance(bias, Const):
        return float(bias.value) == -math.inf
    if isinstance(bias, Apply) and bias.op in ("add", "sub", "mul", "neg", "div"):
        return any(_can_hide(plan, arg) for arg in bias.args)
    if isinstance(bias, Ref):
        tensor = plan.inputs.get(bias.tensor)
        return tensor is None or tensor.kind == "real"
    return any(isinstance(read, Ref) for read in reads(bias))


def without_dead_zero(
    finish: tuple[Statement, ...], item: Attention, virtual: bool
) -> tuple[tuple[Statement, ...], bool]:
    """A row without a live key that is set to zero: the kernel gives zero there by itself.

    The reference tells of that as the maximum does, but for what a virtual coordinate adds to it.
    """
    zeroed = False
    told = [item.maximum.ref] if virtual else [item.maximum.ref, item.reference.ref]
    dead = [Apply("eq", (ref, Const(-math.inf))) for ref in told]

    def change(part: Expr) -> Expr | None:
        nonlocal zeroed
        if not isinstance(part, Apply) or part.op != "where":
            return None
        test, yes, no = part.args
        if isinstance(test, Apply) and test.op == "not":
            test, yes, no = test.args[0], no, yes
        if test in dead and yes == Const(0.0):
            zeroed = True
            return rewrite(no, change)
        return None

    names = {state.name for state, _ in item.weighted}
    changed = []
    for s in finish:
        only = {read.tensor for read in reads(s.expr)} & names
        changed.append(
            Statement(s.name, s.indices, rewrite(s.expr, change), s.op, s.over) if only else s
        )
    return tuple(changed), zeroed


def _reads_any(finish: tuple[Statement, ...], item: Attention) -> bool:
    """Whether what follows reads the reference. The maximum itself may only be compared with -inf."""
    read = {r.tensor for s in finish for r in reads(s.expr)}
    if item.maximum.name in read:
        raise NotLoweredError(f"what follows reads {item.maximum.name}")
    return item.reference.name in read


def with_ones(item: Statement, ones: set[str]) -> Statement:
    """The statement where these tensors are 1."""

    def change(part: Expr) -> Expr | None:
        return Const(1.0) if isinstance(part, Ref) and part.tensor in ones else None

    return Statement(
        item.name, item.indices, simplified(rewrite(item.expr, change)), item.op, item.over
    )
