"""Sites: named places of a program whose values observers are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..ir.ops import einfold_ops
from ..ir.program import Program, attention_nodes, call_arguments


@dataclass(frozen=True)
class Site:
    """A place of a program.

    `values` are nodes, each with what it is called in a sentence; they are shown in their order, and behind
    them `more`, nodes or plain values that say how to read them. `attention` is set where the attention
    weights of that call can be seen too, `product` where who looks computes that call itself: a linear, or a
    layer of experts.
    """

    name: str
    values: tuple[tuple[str, fx.Node], ...]
    more: tuple[Any, ...] = ()
    attention: fx.Node | None = None
    product: fx.Node | None = None
    embeds: bool = False

    @property
    def call(self) -> fx.Node | None:
        """The call that is computed while the site is looked at; without one, its values are just shown."""
        return self.attention if self.product is None else self.product


def attention(program: Program) -> list[Site]:
    """`layer-N`: the queries, keys (both rotated) and values of each attention layer."""
    sites = []
    for node in attention_nodes(program):
        found = call_arguments(node)
        named = (("queries", "q_BSHD"), ("keys", "k_BSKD"), ("values", "v_BSKD"))
        values = tuple((f"{what} of layer {found['layer']}", found[part]) for what, part in named)
        sites.append(Site(layer(found["layer"]), values, attention=node))
    return sites


def layer(number: int) -> str:
    """The name of an attention layer's site."""
    return f"layer-{number}"


def keys_and_values(
    program: Program, rotated: bool, layers: Iterable[int] | None = None
) -> list[Site]:
    """`layer-N.key` and `layer-N.value` of attention layers, of all where none are named.

    Keys that are not rotated are shown with the tables that will rotate them: cos, sin, interleaved, or
    None, None, False.
    """
    sites = []
    for node in attention_nodes(program):
        found = call_arguments(node)
        number, key, value = found["layer"], found["k_BSKD"], found["v_BSKD"]
        if layers is not None and number not in layers:
            continue
        more: tuple[Any, ...] = () if rotated else (None, None, False)
        if not rotated and key.target is einfold_ops.rotary.default:
            key, more = key.args[0], tuple(key.args[2:])
        sites += [
            Site(f"{layer(number)}.key", ((f"keys of layer {number}", key),), more),
            Site(f"{layer(number)}.value", ((f"values of layer {number}", value),)),
        ]
    return sites


def last_hidden(program: Program) -> Site:
    """`hidden`: what the head of the model sees, [B, S, M]."""
    rows = next(iter(program.nodes(einfold_ops.select_rows.default)), None)
    last: Any = rows.args[0] if rows is not None else program.output.args[0][0]  # type: ignore[index]
    return Site("hidden", (("last hidden states", last),))


def weight_inputs(program: Program) -> list[Site]:
    """The inputs of each linear, by the name of its weight; once of a weight that several read."""
    return [replace(site, product=None) for site in weight_products(program)]


def weight_products(program: Program) -> list[Site]:
    """The same, where who looks computes the product itself."""
    sites: dict[str, Site] = {}
    embeddings = map(call_arguments, program.nodes(einfold_ops.embedding.default))
    tables = {str(found["weight_VM"].target) for found in embeddings}
    for node in program.nodes(einfold_ops.linear.default):
        found = call_arguments(node)
        if found["weight_NM"].op == "get_attr":
            name = str(found["weight_NM"].target)
            values = ((f"inputs of {name}", found["x"]),)
            site = Site(name, values, product=node, embeds=name in tables)
            sites.setdefault(name, site)
    return list(sites.values())


def expert_products(program: Program) -> list[Site]:
    """The inputs of each layer of experts, by the name of the first of its weights; who looks computes the
    layer."""
    sites: dict[str, Site] = {}
    for node in program.nodes(einfold_ops.experts.default):
        if names := expert_weights(node):
            shown = (f"inputs of {names[0]}", call_arguments(node)["x_TM"])
            sites.setdefault(names[0], Site(names[0], (shown,), product=node))
    return list(sites.values())


def expert_weights(node: fx.Node) -> tuple[str, ...]:
    """The names of a layer's weights, of gate and up and of down; none where something computes them."""
    found = call_arguments(node)
    reads = (found["gate_up_ENM"], found["down_EMI"])
    return tuple(str(read.target) for read in reads if all(each.op == "get_attr" for each in reads))
