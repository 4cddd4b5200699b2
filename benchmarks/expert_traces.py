"""What an eviction policy finds held of the experts that a text's tokens choose, by traces of a router.

    python -m benchmarks.expert_traces FOLDER [--texts 6] [--tokens 500]

FOLDER has a Mixtral, such as benchmarks/expert_models.py makes. Each policy holds a part of all experts of
all layers in one pool, token after token and layer after layer, as `einfold run --memory` does; the runtime's
own classes score them (runtime/memory/experts.py). Beside them stand Belady's choice, which knows what comes,
and how often the next layer's router says right what it will choose from what this layer gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from einfold.runtime.memory import experts
from einfold.runtime.memory.experts import Frequent, Recent, Routed, best

from .expert_models import held_out
from .report import table

#: Parts of all experts that are held.
PARTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)

#: What is left of a count at the next token.
FADES = (0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


class Likely(Frequent):
    """The same with the router's probabilities of all experts in place of what was chosen."""

    def chose(self, routed: Routed, index: Any) -> None:
        """`index` [1, E] are the probabilities."""
        for expert, units in routed.experts.items():
            self.scores[list(units)] += index[0, expert]


def trace(model: Any, texts: list[np.ndarray[Any, Any]]) -> tuple[Any, Any, list[float]]:
    """Probabilities [T, L, E] and choices [T, L, K] of every token, and of each layer but the first the part
    of its choices that its router makes of what the layer before gives."""
    layers = model.model.layers
    choices = model.config.num_experts_per_tok
    chances = []
    right: list[list[float]] = [[] for _ in layers[1:]]
    for text in texts:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        with torch.no_grad():
            found = model(input_ids=ids, output_router_logits=True, output_hidden_states=True)
            logits = torch.stack(list(found.router_logits), 1).float()
            chances.append(logits.softmax(-1).numpy())
            chosen = logits.topk(choices).indices
            for number, layer in enumerate(layers[1:], 1):
                before = layer.post_attention_layernorm(found.hidden_states[number][0])
                guess = (before @ layer.mlp.gate.weight.T).topk(choices).indices
                same = (guess[:, :, None] == chosen[:, number, None, :]).any(-1)
                right[number - 1].append(same.float().mean().item())
    every = np.concatenate(chances)
    picked = np.argsort(-every, axis=-1, kind="stable")[..., :choices]
    return every, picked, [float(np.mean(parts)) for parts in right]


def hits(policy: Any, chosen: Any, given: Any, count: int, room: int) -> float:
    """The part of the choices [T, L, K] that are held where `room` experts are, of `count` in each layer; the
    policy is told what `given` has of each token and layer."""
    layers, scored, held, found = chosen.shape[1], policy(chosen.shape[1] * count), set[int](), 0
    routed = [
        Routed((), {e: (layer * count + e,) for e in range(count)}, chosen.shape[2], layer)
        for layer in range(layers)
    ]
    for token in range(len(chosen)):
        scored.step(1)
        for layer in range(layers):
            asked = routed[layer].asked(chosen[token, layer][None])
            found += len(asked & held)
            scored.chose(routed[layer], given[token, layer][None])
            held = best([*held | asked], scored.scores, room)
    return float(found / chosen.size)


def of_each_layer(chosen: Any, count: int, room: int) -> float:
    """LRU of each layer by itself, with its share of the room."""
    layers = chosen.shape[1]
    each = [
        hits(Recent, part, part, count, room // layers) for part in np.split(chosen, layers, axis=1)
    ]
    return float(np.mean(each))


def belady(chosen: Any, count: int, room: int) -> float:
    """What a pool finds that lets go of those that are asked for last."""
    order = [
        (layer * count + int(e)) for row in chosen for layer, pair in enumerate(row) for e in pair
    ]
    last, following = dict[int, int](), [0] * len(order)
    for place in range(len(order) - 1, -1, -1):
        following[place] = last.get(order[place], len(order))
        last[order[place]] = place
    held, found = dict[int, int](), 0
    for place, expert in enumerate(order):
        found += expert in held
        held[expert] = following[place]
        if len(held) > room:
            del held[max(held, key=held.__getitem__)]
    return found / len(order)


def policies(chances: Any, chosen: Any) -> Iterator[tuple[str, Callable[[int, int], float]]]:
    """Names, and what gives the hits of `count` experts in each layer with room for so many of all."""
    yield "LRU", lambda count, room: hits(Recent, chosen, chosen, count, room)
    yield "LRU of each layer", lambda count, room: of_each_layer(chosen, count, room)
    for fade in FADES:
        yield f"LFU, aged by {fade}", aged(Frequent, chosen, chosen, fade)
    for fade in (0.9, 0.98):
        yield f"router's probabilities, aged by {fade}", aged(Likely, chosen, chances, fade)
    yield "Belady", lambda count, room: belady(chosen, count, room)


def aged(policy: Any, chosen: Any, given: Any, fade: float) -> Callable[[int, int], float]:
    """The hits of a policy that ages so."""

    def found(count: int, room: int) -> float:
        before, experts.FADES = experts.FADES, fade
        try:
            return hits(policy, chosen, given, count, room)
        finally:
            experts.FADES = before

    return found


def main() -> None:
    from transformers import MixtralForCausalLM

    parser = argparse.ArgumentParser(prog="benchmarks.expert_traces", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=500, help="of each text")
    given = parser.parse_args()
    model = MixtralForCausalLM.from_pretrained(given.folder).float().eval()
    whole = held_out()
    starts = np.linspace(0, len(whole) - given.tokens, given.texts).astype(int)
    chances, chosen, right = trace(model, [whole[s : s + given.tokens] for s in starts])
    count = model.config.num_local_experts
    total = count * chosen.shape[1]
    lines = [
        [name, *(f"{found(count, round(part * total)):.3f}" for part in PARTS)]
        for name, found in policies(chances, chosen)
    ]
    print(
        f"{len(chosen)} tokens, {chosen.shape[1]} layers of {count} experts, {chosen.shape[2]} each\n"
    )
    print(table(["held", *(f"{part:.3f}" for part in PARTS)], lines))
    print(
        f"\nThe next layer's choice from this layer's result: {', '.join(f'{r:.2f}' for r in right)}"
    )


if __name__ == "__main__":
    main()
