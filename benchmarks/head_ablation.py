"""Which KV heads' whole caches recall needs on SmolLM2-135M-Instruct: `python -m benchmarks.head_ablation`.

A text is read whole. Then it is asked about, while some of the 90 KV heads see everything and the others
sinks and a recent window, as head-wise pruning has it behind a prompt. The questions are those of
`benchmarks/quality`: 20 about each of four texts of 1,000 tokens and four of 4,000. `asked` chooses heads by
gates that were learned on such questions about other texts: what the model's heads allow where it is known
what will be asked. The other rows choose by scores that do without.

Rows are kept as they are measured, and what is there is not measured again. `--compiled` measures what
einfold makes of recipes in place of choices: recall, KL over prose and bytes, as `benchmarks/quality` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import einfold
from einfold.compiler.calibrate.head_gates import GatedReading, HeadGates, Past, descend
from einfold.compiler.calibrate.observer import Found
from einfold.compiler.calibrate.observers.reconstruction import Reconstruction
from einfold.compiler.calibrate.observers.retrieval_heads import RetrievalHeads, kv_scores
from einfold.compiler.calibrate.stream import stream
from einfold.compiler.driver import open_model, plan_cache
from einfold.compiler.recipe import Recipe
from einfold.runtime.tokenizer import Tokenizer

from . import real_model
from .client import ROOT
from .quality.measure import Original, figures
from .quality.subjects import Questions, corpus_text, list_of_things, paragraphs, real
from .report import table

OUT = ROOT / "benchmarks" / "results" / "head-ablation"

#: What a head keeps that does not keep all, and what may gather beside it until it is moved.
SINKS, RECENT, SLACK = 4, 60, 64

#: So many of 90 heads keep all: with the windows of the others half and 30 % of the bytes at 4,000 tokens.
COUNTS = (43, 25)

_LENGTHS = {1000: 1000, 4000: 3600}
_TEXTS = 4


class OfHeads(Reconstruction):
    """KVzip's score of a KV head (Kim et al. 2025) by those of its tokens: `most` [K] is the largest, as in
    the paper's code; `mean` [K] the mean."""

    def end(self) -> Found:
        score_KT = super().end()["score"]
        return {"most": score_KT.amax(1), "mean": score_KT.mean(1)}


@dataclass
class Asked:
    """A text that was read, and what is asked about it."""

    questions: Questions
    past: Past

    def answers(self, reading: GatedReading, gates: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of each answer in nats, whether all of its tokens were the likeliest), [answers] each."""
        tokens = torch.tensor(self.questions.tokens)
        behind = tokens[self.past.tokens :]
        places = torch.tensor([at for answer in self.questions.answers for at in answer])
        logits = reading.logits(self.past, behind, places - self.past.tokens - 1, gates)
        loss = functional.cross_entropy(logits, tokens[places], reduction="none")
        right = logits.argmax(-1) == tokens[places]
        sizes = [len(answer) for answer in self.questions.answers]
        return (
            torch.stack([part.sum() for part in loss.split(sizes)]),
            torch.stack([part.all() for part in right.split(sizes)]),
        )


class Ablation:
    """The model, with its texts and questions."""

    def __init__(self) -> None:
        folder = real_model.folder()
        self.encode = Tokenizer(folder).encode
        self.program = plan_cache(open_model(folder), Recipe.build({}))
        assert self.program.layout is not None
        self.sizes = {x.layer: x.kv_heads for x in self.program.layout.layers}
        self.reading = GatedReading(self.program, self.sizes, SINKS, RECENT)
        self._asked = {
            n: list(self._lists("lcet10.txt", 60_000, n, range(_TEXTS))) for n in _LENGTHS
        }

    def _lists(self, text: str, start: int, length: int, seeds: range) -> Iterator[Asked]:
        parts = list(paragraphs(corpus_text(text)[start:]))
        for seed in seeds:
            prose = iter(parts[10 * (seed % 10) :])
            found = list_of_things(self.encode, prose, _LENGTHS[length], seed)
            # The prompt's last token is asked of the pruned cache too.
            yield Asked(found, self.reading.read(torch.tensor(found.tokens[: found.prompt - 1])))

    def measure(self, heads: Tensor) -> dict[str, Any]:
        """Recall, and the loss of an answer in nats, by length."""
        row: dict[str, Any] = {"heads": heads.tolist()}
        gates = torch.zeros(self.reading.heads)
        gates[heads] = 1
        for length, asked in self._asked.items():
            with torch.no_grad():
                found = [each.answers(self.reading, gates) for each in asked]
            loss, right = (torch.cat(part) for part in zip(*found, strict=True))
            row[str(length)] = {"recall": float(right.float().mean()), "loss": float(loss.mean())}
        return row

    def other_lists(self) -> tuple[list[Asked], Asked]:
        """Questions about other prose, 1,000 tokens and 4,000: the same things and places in other pairs."""
        short = self._lists("alice29.txt", 20_000, 1000, range(10, 13))
        return [*short], next(self._lists("alice29.txt", 20_000, 4000, range(14, 15)))

    def by_questions(self, short: list[Asked], long: Asked) -> Callable[[int], Tensor]:
        """Gates that are learned on questions, about short and long texts in turns."""

        def loss(step: int, gates: Tensor) -> Tensor:
            asked = long if step % 2 else short[step // 2 % len(short)]
            return asked.answers(self.reading, gates)[0].mean()

        def learn(full: int) -> Tensor:
            return descend(loss, self.reading.heads, full, 24)

        return learn

    def alone(self, lists: list[Asked]) -> Tensor:
        """How much the loss of an answer grows where one head alone has a window, by head."""

        def loss(gates: Tensor) -> float:
            with torch.no_grad():
                return sum(
                    float(each.answers(self.reading, gates)[0].mean()) for each in lists
                ) / len(lists)

        whole = loss(torch.ones(self.reading.heads))
        closed = 1 - torch.eye(self.reading.heads)
        return torch.tensor([loss(gates) - whole for gates in closed])

    def observed(self, found: dict[str, Found], score: str) -> Tensor:
        """A score of all KV heads, of the query heads' where it is theirs."""
        each = [found[f"layer-{layer}"][score] for layer in self.sizes]
        return torch.cat(
            [kv_scores(x, self.sizes[n]) for n, x in zip(self.sizes, each, strict=True)]
        )

    def gates(self, full: int) -> Tensor:
        """Gates as `duo_attention` learns them."""
        learner = HeadGates(tuple(self.sizes.items()), full, SINKS, RECENT)
        found = self.program.statistics.learned(self.program, learner)
        return torch.cat([found[f"layer-{layer}"]["gate"] for layer in self.sizes])


def choices(model: Ablation) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """How heads are chosen: by what name, and what gives numbers of all heads by how many stay."""
    yield "duo_attention", model.gates
    repeated = model.program.statistics.of(model.program, RetrievalHeads(512))
    for score in ("induction", "echo"):
        yield f"{score} score, random tokens", partial(_given, model.observed(repeated, score))
    text = torch.tensor(model.encode(corpus_text("alice29.txt")[40_000:45_000])[:1000])
    again = stream(model.program, text.repeat(2)[None], [OfHeads()])
    for score in ("most", "mean"):
        yield f"reconstruction, {score}", partial(_given, model.observed(again, score))
    short, long = model.other_lists()
    yield "asked", model.by_questions(short, long)
    yield "one head at a time", partial(_given, model.alone([short[0], long]))


def _given(numbers: Tensor, full: int) -> Tensor:
    """Scores that do not go by how many heads stay."""
    return numbers


def choose(data: dict[str, Any]) -> None:
    """Measures choices that are not there yet."""
    model = Ablation()
    every = torch.arange(model.reading.heads)
    rows = data.setdefault("choices", {})
    for name, heads in (("every head", every), ("no head", every[:0])):
        if name not in rows:
            rows[name] = model.measure(heads)
            write(data)
    for name, score in choices(model):
        for count in COUNTS:
            key = f"{name}, {count}"
            if key not in rows:
                numbers = score(count)
                rows[key] = model.measure(numbers.topk(count).indices.sort().values)
                rows[key]["numbers"] = [round(float(x), 4) for x in numbers]
                write(data)
                print(key, rows[key]["1000"], rows[key]["4000"], file=sys.stderr, flush=True)


def recipes() -> Iterator[tuple[str, dict[str, Any] | None]]:
    """What is compiled, by name: `[cache.prune]` of half and of 30 % of the bytes behind 4,000 tokens."""
    yield "everything", None
    window = {"sinks": SINKS, "recent": RECENT, "slack": SLACK}
    for count in COUNTS:
        razor = {"induction": (count - 1.5) / 90, "echo": 0.5 / 90}
        yield f"razor_attention, {count}", {"method": "razor_attention", **razor, **window}
        yield (
            f"duo_attention, {count}",
            {"method": "duo_attention", "full": (count - 0.5) / 90, **window},
        )


def compiled(data: dict[str, Any], windows: int, threads: int) -> None:
    """Measures recipes that are not there yet."""
    whole = real()
    subject = replace(whole, windows=whole.windows[:: len(whole.windows) // windows][:windows])
    original = Original.of(subject)
    rows = data.setdefault("compiled", {})
    for name, prune in recipes():
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "artifact"
            recipe = {"target": "onnx", "cache": {"prune": prune}}
            einfold.compile(subject.folder, out, recipe=recipe, check=False)
            rows[name] = figures(einfold.load(out, threads=threads), subject, original)
        write(data)
        print(name, rows[name]["recall"], rows[name]["kl"], file=sys.stderr, flush=True)


def page(data: dict[str, Any]) -> str:
    """The tables."""
    rows = data.get("choices", {})
    parts = [
        "# Which heads recall needs\n",
        "SmolLM2-135M-Instruct, `python -m benchmarks.head_ablation`. Heads that do not keep all see "
        f"{SINKS} sinks and {RECENT} recent tokens; {20 * _TEXTS} questions behind 1,000 tokens and as many "
        "behind 4,000. The loss is that of an answer, in nats. Common: how many of the heads `asked` chooses "
        "too.\n",
        table(
            ["heads that keep all", "recall, 1,000", "loss", "recall, 4,000", "loss", "common"],
            [_cells(name, row, rows) for name, row in rows.items()],
        ),
    ]
    if made := data.get("compiled"):
        parts += [
            "\n## Compiled\n",
            "By `--compiled`, in onnxruntime, KL in nats a token over prose; "
            f"{next(iter(made.values()))['questions']} questions.\n",
            table(
                ["`[cache.prune]`", "held, 4,000", "recall, 1,000", "recall, 4,000", "KL", "same"],
                [
                    [
                        name,
                        f"{row['cache_bytes']['4000'] / row['full_cache_bytes']['4000']:.2f}",
                        *(f"{row['recall'][label]:.3f}" for label in ("1000", "4000")),
                        f"{row['kl']:.4f}",
                        f"{row['same']:.1%}",
                    ]
                    for name, row in made.items()
                ],
            ),
        ]
    return "\n".join(parts) + "\n"


def _cells(name: str, row: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    numbers = [f"{row[n][part]:.3f}" for n in ("1000", "4000") for part in ("recall", "loss")]
    best = rows.get(f"asked, {len(row['heads'])}")
    common = "" if best is None else str(len({*best["heads"]} & {*row["heads"]}))
    return [name, *numbers, common]


def write(data: dict[str, Any]) -> None:
    """Puts what has been measured so far under results."""
    OUT.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(page(data), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.head_ablation", description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="measure recipes, not choices")
    parser.add_argument("--windows", type=int, default=2, help="of prose, of eight [2]")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = OUT.with_suffix(".json")
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if given.compiled:
        compiled(data, given.windows, given.threads)
    else:
        choose(data)


if __name__ == "__main__":
    main()
