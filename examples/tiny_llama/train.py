"""Trains the model on the CPU, for a given time; stopped and started again, it goes on.

python examples/tiny_llama/train.py --scratch /tmp/tiny_llama --minutes 100
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Rows
from corpus import encode_corpus, held_out_documents, train_tokenizer, training_documents
from model import new_model
from muon import Muon
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

SEED = 20240
MUON_RATE, ADAM_RATE = 0.02, 3e-3


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    scratch: Path
    minutes: float
    piece: int
    threads: int
    save_every: float
    probe_every: float


def options() -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, required=True, help="time to train, in all runs")
    parser.add_argument("--piece", type=int, default=2048, help="tokens at once in memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds")
    parser.add_argument("--probe-every", type=float, default=180.0, help="seconds")
    return Options(**vars(parser.parse_args()))


def prepare(scratch: Path) -> Rows:
    """The tokenizer and the encoded sources, made once and kept in the scratch folder."""
    documents = training_documents()
    saved, encoded = scratch / "tokenizer.json", scratch / "tokens.npy"
    if not saved.exists():
        train_tokenizer(documents, SEED).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    if not encoded.exists():
        np.save(encoded, encode_corpus(tokenizer, documents))
    return Rows(tokenizer, np.load(encoded), documents)


def rate(progress: float) -> float:
    """The factor of the learning rate: warm-up, constant, and linear decay from 70% on."""
    if progress < 0.01:
        return max(0.05, progress / 0.01)
    return 1.0 if progress < 0.7 else max(0.01, (1.0 - progress) / 0.3)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden, others = [], []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        Muon(hidden, lr=MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the losses of all tokens but the first."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    )
    return (losses * weights[:, 1:].reshape(-1)).sum()


@torch.no_grad()
def probe(model: LlamaForCausalLM, rows: Rows, held_out: torch.Tensor) -> str:
    """Copying and recall on a few samples, and the loss of held-out text."""
    rng = np.random.default_rng(1)
    found = []
    for segment in (16, 120, 400):
        part = rng.integers(1, rows.tokenizer.get_vocab_size(), size=(4, segment))
        ids = torch.from_numpy(np.concatenate([part, part], axis=1))
        guesses = model(input_ids=ids).logits.argmax(-1)
        right = guesses[:, segment:-1] == ids[:, segment + 1 :]
        found.append(f"copy{segment} {right.float().mean():.2f}")
    for length in (100, 400, 1000):
        right_keys = 0
        for sample in range(10):
            ids_, answer = rows.encode(rows.key_text(rng, length, depth=(sample + 0.5) / 10))
            guesses = model(input_ids=torch.from_numpy(ids_)[None]).logits[0].argmax(-1).numpy()
            right_keys += bool((guesses[:-1] == ids_[1:])[answer[1:]].all())
        found.append(f"key{length} {right_keys / 10:.1f}")
    loss = loss_of(model, held_out, torch.ones_like(held_out)) / held_out[:, 1:].numel()
    return f"{'  '.join(found)}  held-out {loss:.3f}"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in one stroke."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def main() -> None:
    """Trains until the time is over."""
    given = options()
    given.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    rows = prepare(given.scratch)
    encoded = encode_corpus(rows.tokenizer, held_out_documents().values()).astype(np.int64)
    held_out = torch.from_numpy(encoded[: 16 * 512].reshape(16, 512))
    model = new_model(rows.tokenizer.get_vocab_size(), SEED)
    both = optimizers(model)
    rng = np.random.default_rng(SEED)
    elapsed, step, seen = 0.0, 0, 0
    path = given.scratch / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        rng.bit_generator.state = saved["rng"]
        elapsed, step, seen = saved["elapsed"], saved["step"], saved["seen"]
    total = given.minutes * 60
    base = [MUON_RATE, ADAM_RATE]
    clock = time.monotonic() - elapsed
    last_save = last_probe = last_line = elapsed
    smooth: float | None = None
    since = seen
    print(f"{len(rows.tokens)} tokens of text; from step {step}, {elapsed:.0f} s", flush=True)

    def keep() -> None:
        states = [optimizer.state_dict() for optimizer in both]
        state = {"model": model.state_dict(), "optimizers": states, "step": step, "seen": seen}
        save(path, {**state, "rng": rng.bit_generator.state, "elapsed": elapsed})

    while elapsed < total:
        progress = elapsed / total
        for optimizer, highest in zip(both, base, strict=True):
            optimizer.param_groups[0]["lr"] = highest * rate(progress)
        ids, weights = rows.batch(rng, progress)
        count = float(weights[:, 1:].sum())
        value = 0.0
        size = max(1, given.piece // ids.shape[1])
        for some, heavy in zip(ids.split(size), weights.split(size), strict=True):
            loss = loss_of(model, some, heavy) / count
            loss.backward()
            value += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
        elapsed = time.monotonic() - clock
        if elapsed - last_line > 30:
            speed = (seen - since) / (elapsed - last_line)
            print(
                f"{elapsed / 60:6.1f} min  step {step}  {seen / 1e6:.2f}M tokens"
                f"  loss {smooth:.3f}  {speed:.0f}/s",
                flush=True,
            )
            last_line, since = elapsed, seen
        if elapsed - last_probe > given.probe_every:
            last_probe = elapsed
            print(f"  {probe(model, rows, held_out)}", flush=True)
        if elapsed - last_save > given.save_every:
            last_save = elapsed
            keep()
    keep()
    print(f"done: {seen} tokens, {step} steps. {probe(model, rows, held_out)}", flush=True)


if __name__ == "__main__":
    main()
