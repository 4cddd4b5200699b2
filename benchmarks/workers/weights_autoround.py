"""A model's weights by AutoRound at its defaults. Runs in the peers' environment.

python -m benchmarks.workers.weights_autoround FOLDER TOKENS OUT BITS GROUP

TOKENS is a file of numpy with token ids [rows, tokens]. Codes have zero points; the head stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, tokens, out = map(Path, sys.argv[1:4])
    bits, group = map(int, sys.argv[4:6])
    ids = torch.from_numpy(np.load(tokens))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=group,
        sym=False,
        dataset=[
            {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids
        ],
        nsamples=len(ids),
        seqlen=ids.shape[1],
    )
    rounding.quantize_and_save(str(out), format="auto_round")


if __name__ == "__main__":
    main()
