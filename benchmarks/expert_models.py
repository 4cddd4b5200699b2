"""Models of experts to measure: a Mixtral that is trained here, and one with random weights.

    python -m benchmarks.expert_models trained FOLDER [--minutes 20]
    python -m benchmarks.expert_models random FOLDER [--layers 4]

The trained one reads bytes of Python's own library and of this repository's documents for a while, which is
enough for its router to choose by what is read. Its experts are then widened with neurons of zeros, which
change no result: so they are of the size of real ones, and its router's choices are those of a trained model.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .client import ROOT

#: A small model; `WIDENED` is the width of its experts when it is saved.
TRAINED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "router_aux_loss_coef": 0.02,
}
WIDENED = 13568

#: The shape that docs/memory.md measures.
RANDOM: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}

#: Tokens of a text that it learns from, texts at once, and the part of the text that is never read.
LENGTH, ROWS, HELD_OUT = 128, 8, 0.02


def text() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes of prose and code that lie on any machine with this repository, in an order that is kept."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(library.glob("*.py"))]
    every = [file.read_bytes() for file in files]
    order = np.random.default_rng(0).permutation(len(every))
    return np.frombuffer(b"".join(every[n] for n in order), np.uint8)


def held_out() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The end of it, which is not learned from."""
    whole = text()
    return whole[-int(HELD_OUT * len(whole)) :]


def train(minutes: float) -> Any:
    """A small model that has read for so long; tells the loss on its way."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TRAINED))
    whole = text()
    data = torch.from_numpy(whole[: -len(held_out())].astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    draws, started, step = torch.Generator().manual_seed(0), time.monotonic(), 0
    while (spent := (time.monotonic() - started) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - spent)
        starts = torch.randint(len(data) - LENGTH, (ROWS,), generator=draws).tolist()
        ids = torch.stack([data[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def widen(model: Any) -> Any:
    """The same function with wider experts: the new neurons are zeros."""
    from transformers import MixtralConfig, MixtralForCausalLM

    wide = MixtralForCausalLM(MixtralConfig(**TRAINED | {"intermediate_size": WIDENED}))
    state, inner = model.state_dict(), TRAINED["intermediate_size"]
    for name, weight in state.items():
        if name.endswith("gate_up_proj"):  # [experts, gate and up, hidden]
            experts, _, hidden = weight.shape
            state[name] = weight.new_zeros(experts, 2, WIDENED, hidden)
            state[name][:, :, :inner] = weight.unflatten(1, (2, inner))
            state[name] = state[name].flatten(1, 2)
        elif name.endswith("down_proj"):  # [experts, hidden, inner]
            state[name] = weight.new_zeros(*weight.shape[:2], WIDENED)
            state[name][..., :inner] = weight
    wide.load_state_dict(state)
    return wide


def drawn(layers: int) -> Any:
    """One whose weights are random, as its router's choices are then."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**RANDOM | {"num_hidden_layers": layers}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.expert_models", description=__doc__)
    parser.add_argument("kind", choices=("trained", "random"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20, help="of training")
    parser.add_argument("--layers", type=int, default=RANDOM["num_hidden_layers"])
    given = parser.parse_args()
    if given.kind == "random":
        drawn(given.layers).to(torch.bfloat16).save_pretrained(given.folder)
        return
    small = train(given.minutes)
    small.save_pretrained(given.folder / "small")
    widen(small).to(torch.bfloat16).save_pretrained(given.folder)


if __name__ == "__main__":
    main()
