"""The text that the model is trained on: the sources of Python's standard library.

Some files are held out, by name: perplexity is measured on them, and `eval.txt` is made of them.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from prose import prose
from recall import key_examples
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT_TOKEN = "<|endoftext|>"
VOCABULARY = 1024

#: Files (relative to the library's folder) that no training step and no tokenizer sees.
HELD_OUT = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "concurrent/futures/thread.py",
    "csv.py",
    "fnmatch.py",
    "gettext.py",
    "http/cookies.py",
    "json/decoder.py",
    "json/encoder.py",
    "logging/handlers.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "string.py",
    "textwrap.py",
    "unittest/suite.py",
    "urllib/robotparser.py",
    "wsgiref/handlers.py",
)

#: Folders of tables, of tests and of other people's packages.
_SKIPPED = frozenset(
    ("site-packages", "test", "tests", "_bundled", "encodings", "lib2to3", "msilib", "__phello__")
)


def library() -> Path:
    """The folder of the standard library of the Python that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.isascii() and text.strip() and "\f" not in text else None


def training_documents() -> list[str]:
    """The sources to train on, in the order of their names."""
    root = library()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = (name for name in names if name not in HELD_OUT and _SKIPPED.isdisjoint(name.split("/")))
    return [text for name in kept if (text := _read(root / name)) is not None]


def held_out_documents() -> dict[str, str]:
    """The held-out sources by name."""
    texts = {name: _read(library() / name) for name in HELD_OUT}
    return {name: text for name, text in texts.items() if text is not None}


def train_tokenizer(documents: Iterable[str], seed: int) -> Tokenizer:
    """A byte-level BPE in which every digit is a token of its own."""
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    written = [prose(rng, 2000) for _ in range(200)] + [key_examples(rng) for _ in range(2000)]
    tokenizer.train_from_iterator([*documents, *written], trainer)
    return tokenizer


def encode_corpus(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """All documents as one array of token ids, each after the token for the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT_TOKEN)
    parts: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        parts.append(np.array([end, *encoding.ids], dtype=np.int16))
    return np.concatenate(parts)
