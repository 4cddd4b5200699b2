"""Writes a training checkpoint as a model folder: weights in bfloat16, and the tokenizer.

python examples/tiny_llama/export.py --scratch /tmp/tiny_llama --folder examples/tiny_llama
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from corpus import END_OF_TEXT_TOKEN
from model import CONTEXT, END_OF_TEXT, new_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def export(scratch: Path, folder: Path) -> None:
    """Writes the folder."""
    tokenizer = Tokenizer.from_file(str(scratch / "tokenizer.json"))
    saved = torch.load(scratch / "checkpoint.pt", weights_only=False)
    model = new_model(tokenizer.get_vocab_size(), seed=0)
    model.load_state_dict(saved["model"])
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.config.pad_token_id = END_OF_TEXT
    model.generation_config.pad_token_id = END_OF_TEXT
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT_TOKEN,
        eos_token=END_OF_TEXT_TOKEN,
        pad_token=END_OF_TEXT_TOKEN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # Any release of transformers knows the class by this name.
    settings = folder / "tokenizer_config.json"
    values = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(values, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    minutes = saved["elapsed"] / 60
    print(f"{saved['step']} steps, {saved['seen']} tokens, {minutes:.0f} minutes -> {folder}")


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="the folder of train.py")
    parser.add_argument("--folder", type=Path, required=True, help="the model folder to write")
    given = parser.parse_args()
    export(given.scratch, given.folder)


if __name__ == "__main__":
    main()
