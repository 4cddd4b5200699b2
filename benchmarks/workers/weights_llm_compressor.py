"""A model's weights by llm-compressor's GPTQ. Runs in the peers' environment.

python -m benchmarks.workers.weights_llm_compressor FOLDER TOKENS OUT BITS GROUP

TOKENS is a file of numpy with token ids [rows, tokens]. Codes have zero points; the head stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, tokens, out = map(Path, sys.argv[1:4])
    bits, group = map(int, sys.argv[4:6])
    ids = np.load(tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=stored)
    recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main()
