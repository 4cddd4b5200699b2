"""Quality of kvpress's methods on windows of tokens; runs in kvpress's own environment.

python kvpress_cache.py JOB.json > RESULTS.json

The job: `model` (folder), `windows` ([{tokens, keys: [{asked, answer}]}]), `share` of a window that is its
prompt, `budgets` (tokens that a head keeps of a prompt), `texts` that DuoAttention's heads are scored on.
Every method reads a prompt under its press, then the rest goes through what is left of the cache; measured is
what `einfold eval` measures: perplexity, KL and top-1 agreement behind the prompt, and pass keys asked of a
cache that was compressed right before the question. Imports nothing of einfold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

SINKS = 4

#: Presses that hide keys from heads by keys made up for the queries of a step, which it finds for few
#: queries only: the rest is read token by token. They free no memory.
_MASKED = ("AdaKVPress", "DuoPress")


class Reader:
    """Reads windows with one model under presses."""

    def __init__(self, folder: str, attention: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int], prompt: int, press: Any) -> tuple[Any, int]:
        """Log-probabilities behind every token after the prompt, and the bytes that are held at the end."""
        from transformers import DynamicCache

        ids, cache = torch.tensor([tokens]), DynamicCache()
        if prompt:
            with nullcontext() if press is None else press(self.model):
                self.model.model(ids[:, :prompt], past_key_values=cache)
        parts = []
        step = 1 if type(press).__name__ in _MASKED else len(tokens)
        for start in range(prompt, len(tokens), step):
            part = ids[:, start : start + step]
            positions = torch.arange(start, start + part.shape[1])[None]
            out = self.model(part, past_key_values=cache, position_ids=positions)
            parts.append(torch.log_softmax(out.logits[0], dim=-1))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return torch.cat(parts), held


def presses(job: dict[str, Any]) -> dict[str, tuple[str, Callable[[int, int], Any]]]:
    """For each method the attention it needs, and its press for (tokens of a prompt, tokens to keep)."""
    import kvpress

    def ratio(prompt: int, keep: int) -> float:
        return max(0.0, 1 - keep / prompt)

    def snapkv(prompt: int, keep: int) -> Any:
        # its window of queries must be shorter than what is kept
        return kvpress.SnapKVPress(ratio(prompt, keep), window_size=min(32, keep // 2))

    return {
        "StreamingLLM": (
            "sdpa",
            lambda prompt, keep: kvpress.StreamingLLMPress(ratio(prompt, keep), n_sink=SINKS),
        ),
        "SnapKV": ("sdpa", snapkv),
        "ObservedAttention (H2O)": (
            "eager",
            lambda prompt, keep: kvpress.ObservedAttentionPress(ratio(prompt, keep)),
        ),
        "ExpectedAttention": (
            "sdpa",
            lambda prompt, keep: kvpress.ExpectedAttentionPress(ratio(prompt, keep)),
        ),
        "AdaKV(SnapKV)": ("sdpa", lambda prompt, keep: kvpress.AdaKVPress(snapkv(prompt, keep))),
        "DuoAttention": ("sdpa", duo_attention(job)),
    }


def duo_attention(job: dict[str, Any]) -> Callable[[int, int], Any]:
    """A quarter of the heads keeps all; kvpress's own scoring of heads, on the job's texts.

    kvpress scores on BookSum, which it would download, and keeps 128 sinks and 256 recent tokens.
    """
    import pandas
    from kvpress.presses import duo_attention_press as duo

    class Texts:
        def to_pandas(self) -> Any:
            return pandas.DataFrame({"chapter": job["texts"]})

    duo.load_dataset = lambda *_, **__: Texts()

    class DuoPress(duo.DuoAttentionPress):  # type: ignore[misc]
        keep = 0

        def post_init_from_model(self, model: Any) -> None:
            super().post_init_from_model(model)
            self.sink_size, self.recent_size = SINKS, self.keep - SINKS

    def made(prompt: int, keep: int) -> Any:
        press = DuoPress(head_compression_ratio=0.75, on_the_fly_scoring=True)
        press.keep = keep
        return press

    return made


def measure(
    job: dict[str, Any],
    reader: Reader,
    wanted: list[Any],
    make: Callable[[int, int], Any],
    keep: int,
) -> dict[str, Any]:
    """The figures of one method at one budget."""
    tokens = loss = reference_loss = kl = same = 0.0
    held, full, at_questions, full_at_questions = 0, 0, 0, 0
    hits, reference_hits = [], []
    for window, reference in zip(job["windows"], wanted, strict=True):
        text = window["tokens"]
        prompt = int(len(text) * job["share"])
        found, bytes_held = reader.logits(text, prompt, press_of(make, prompt, keep))
        held += bytes_held
        full += len(text) * full_bytes(reader)
        found, here = found[:-1], reference[prompt:-1]
        target = torch.tensor(text[prompt + 1 :])[:, None]
        tokens += len(found)
        loss -= float(found.gather(1, target).double().sum())
        reference_loss -= float(here.gather(1, target).double().sum())
        kl += float((here.exp() * (here - found)).double().sum())
        same += int((found.argmax(-1) == here.argmax(-1)).sum())
        for key in window["keys"]:
            asked, answer = key["asked"], key["answer"]
            part = text[: answer[-1] + 1]
            found, bytes_held = reader.logits(part, asked, press_of(make, asked, keep))
            at_questions += bytes_held
            full_at_questions += len(part) * full_bytes(reader)
            hits.append(all(int(found[at - 1 - asked].argmax()) == text[at] for at in answer))
            reference_hits.append(all(int(reference[at - 1].argmax()) == text[at] for at in answer))
    return {
        "perplexity": math.exp(loss / tokens),
        "reference_perplexity": math.exp(reference_loss / tokens),
        "kl": kl / tokens,
        "top1": same / tokens,
        "recall": sum(hits) / len(hits),
        "reference_recall": sum(reference_hits) / len(hits),
        "keys": len(hits),
        "tokens": int(tokens),
        "held": held / full,
        "held_at_questions": at_questions / full_at_questions,
    }


def full_bytes(reader: Reader) -> int:
    """Bytes of a token in a cache that keeps everything."""
    config = reader.model.config
    return int(2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def press_of(make: Callable[[int, int], Any], prompt: int, keep: int) -> Any:
    """A press, where the prompt is longer than what is kept of it."""
    return make(prompt, keep) if prompt > keep else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("job")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with open(given.job, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(given.threads)
    readers = {kind: Reader(job["model"], kind) for kind in ("sdpa", "eager")}
    wanted = [readers["sdpa"].logits(window["tokens"], 0, None)[0] for window in job["windows"]]
    whole = measure(job, readers["sdpa"], wanted, lambda prompt, keep: None, 0)
    rows = [{"method": "none", "budget": None, **whole}]
    for name, (attention, make) in presses(job).items():
        for keep in job["budgets"]:
            started = time.perf_counter()
            found = measure(job, readers[attention], wanted, make, keep)
            rows.append({"method": name, "budget": keep, **found})
            print(f"{name} {keep}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    json.dump({"versions": versions, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
