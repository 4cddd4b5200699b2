"""What the first directions of bases of heads cost, by what the bases are and how many of each head are kept.

`python -m benchmarks.head_bases smollm2-135m` compares `--share matryoshka_kv` as it is with principal
directions, with bases that were trained for half of the channels alone, and, at as many bytes, with numbers
of directions that are chosen by layer and by head. Of each form the model reads windows without a cache, all
keys and values in what is left of their channels, and its logits are compared with the original's.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from einfold.compiler.calibrate.observers.head_bases import HeadBases, site_of
from einfold.compiler.calibrate.orthogonal import DRAWN, PARTS, projection
from einfold.compiler.calibrate.snapshot import copied, text_inputs
from einfold.compiler.driver import open_model, plan_cache
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program, attention_nodes, call_arguments
from einfold.compiler.passes.base import Pass
from einfold.compiler.passes.kv_share.head_bases import project
from einfold.compiler.passes.kv_share.matryoshka_kv import MatryoshkaKV, output_weights
from einfold.compiler.recipe import Recipe

from .quality.subjects import SUBJECTS

RESULTS = Path(__file__).parent / "results"

STEPS = MatryoshkaKV().steps


class Untouched(Recipe):
    """A recipe that leaves the cache as it is, with the text of those that train."""

    @property
    def trains(self) -> bool:
        return True

    def cache_passes(self) -> list[Pass]:
        return []


#: Bases of a model by layers.
Found = Mapping[int, Mapping[str, Tensor]]

#: Parts that are kept of each head's keys and values, [2, K], by layers.
Kept = Mapping[int, Tensor]


def bases(program: Program, steps: int, drawn: Sequence[int] = DRAWN) -> Found:
    """The bases of every layer; kept, so that they are trained once."""
    outputs = output_weights(program)
    observer = HeadBases(outputs, steps, drawn=tuple(drawn))
    found = program.statistics.of(program, observer)
    return {number: found[site_of(number)] for number in outputs}


def uniform(found: Found, parts: int) -> Kept:
    return {number: torch.full((2, len(each["key"])), parts) for number, each in found.items()}


def alone(found: Found, parts: int, which: int) -> Kept:
    """Of keys (0) or values (1) so many, and the others whole."""
    kept = uniform(found, PARTS)
    for each in kept.values():
        each[which] = parts
    return kept


def chosen(found: Found, parts: int, by: str) -> Kept:
    """As many in all, given to heads ("head") or to keys and values of layers ("layer") by what they lose: an
    eighth after the other leaves where what the layer's output lacks grows least."""
    costs: dict[tuple[int, int, int], Tensor] = {}
    sizes: dict[tuple[int, int, int], int] = {}
    for number, each in found.items():
        for which, part in enumerate(("key", "value")):
            whole = torch.cat((each[f"{part}_error"], torch.zeros(len(each[part]), 1)), 1)
            for head, row in enumerate(whole) if by == "head" else [(-1, whole.sum(0))]:
                costs[number, which, head] = row
                sizes[number, which, head] = 1 if by == "head" else len(whole)
    kept = dict.fromkeys(costs, PARTS)
    left = sum(sizes.values()) * (PARTS - parts)

    def loss(unit: tuple[int, int, int]) -> float:
        now = kept[unit]
        return float(costs[unit][now - 2] - costs[unit][now - 1]) / sizes[unit]

    queue = [(loss(unit), unit) for unit in costs]
    heapq.heapify(queue)
    while left > 0 and queue:
        _, unit = heapq.heappop(queue)
        if sizes[unit] > left:
            continue
        kept[unit] -= 1
        left -= sizes[unit]
        if kept[unit] > 1:
            heapq.heappush(queue, (loss(unit), unit))
    found_parts = uniform(found, 0)
    for (number, which, head), count in kept.items():
        found_parts[number][which][head if head >= 0 else slice(None)] = count
    return found_parts


def within(found: Found, parts: int) -> Kept:
    """As many in each layer, given to its heads' keys and values by what they lose."""
    each = [chosen({number: layer}, parts, "head") for number, layer in found.items()]
    return {number: kept for layer in each for number, kept in layer.items()}


def cut(program: Program, found: Found, kept: Kept) -> Program:
    """The program with projections of keys and values in front of attention, of all channels."""
    trial = copied(program)
    for node in attention_nodes(trial):
        number = int(call_arguments(node)["layer"])
        each = found[number]
        near = [projection(each[part], kept[number][i]) for i, part in enumerate(("key", "value"))]
        # P is its own square, so that k P P' is k P; attention of q and k P sees q P k'.
        project(trial, node, {"key": near[0], "value": near[1], "mean": each["mean"]}, "trial")
    return trial


def logits(program: Program, tokens: list[int]) -> Tensor:
    """Log-probabilities behind each token of a window's second half."""
    rows = torch.arange(len(tokens) // 2, len(tokens))
    inputs = text_inputs(torch.tensor([tokens]), rows)
    found = Interpreter(program).run(inputs)["logits"]
    return torch.log_softmax(found.reshape(len(rows), -1).float(), -1)


def measure(
    program: Program,
    windows: Sequence[list[int]],
    tell: Callable[[str, str, float], None],
    only: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """KL of each form by the parts that are kept, a mean over windows."""
    want = [logits(program, window) for window in windows]

    def kl(found: Found, kept: Kept) -> float:
        trial = cut(program, found, kept)
        each = []
        for window, original in zip(windows, want, strict=True):
            got = logits(trial, window)
            each.append(float((original.exp() * (original - got)).sum(-1).mean()))
        return sum(each) / len(each)

    plain, nested, half = (
        bases(program, 0),
        bases(program, STEPS),
        bases(program, STEPS, (PARTS // 2,)),
    )
    forms: dict[str, tuple[Found, Callable[[int], Kept]]] = {
        "principal": (plain, lambda parts: uniform(plain, parts)),
        "trained": (nested, lambda parts: uniform(nested, parts)),
        "trained for half alone": (half, lambda parts: uniform(half, parts)),
        "trained, by layer": (nested, lambda parts: chosen(nested, parts, "layer")),
        "trained, by head": (nested, lambda parts: chosen(nested, parts, "head")),
        "trained, keys alone": (nested, lambda parts: alone(nested, parts, 0)),
        "trained, values alone": (nested, lambda parts: alone(nested, parts, 1)),
        "trained, by head in a layer": (nested, lambda parts: within(nested, parts)),
    }
    result: dict[str, dict[str, float]] = {}
    for parts in (6, 4, 2):
        for name in only or forms:
            found, kept = forms[name]
            value = kl(found, kept(parts))
            tell(name, str(parts), value)
            result.setdefault(name, {})[str(parts)] = value
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.head_bases", description=__doc__)
    parser.add_argument("model", choices=sorted(SUBJECTS))
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="forms to measure anew")
    arguments = parser.parse_args()
    subject = SUBJECTS[arguments.model]()
    program = plan_cache(open_model(subject.folder), Untouched())
    started = time.monotonic()

    def tell(name: str, parts: str, kl: float) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {parts}/8 {name}: {kl:.4g}", flush=True)

    with torch.no_grad():
        figures = measure(program, subject.windows[: arguments.windows], tell, arguments.only)
    out = RESULTS / f"head-bases-{arguments.model}.json"
    known = json.loads(out.read_text(encoding="utf-8")) if arguments.only else {}
    out.write_text(json.dumps(known | figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
