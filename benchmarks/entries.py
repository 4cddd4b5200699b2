"""What is measured, as data: each entry is one engine with one set of weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Read beside the engines in every round; the roofline is told by it.
BANDWIDTH = "memory bandwidth"

EINFOLD = "einfold"


@dataclass(frozen=True)
class Form:
    """A form of a model's weights on disk, made once from the Hugging Face folder."""

    kind: str
    """"hf", "einfold", "genai" or "gguf"."""

    options: tuple[str, ...] = ()
    """einfold: a recipe; `quarter` behind it for a cache that keeps a quarter of the KV heads whole.
    genai: extra options of the builder. gguf: none (Q4_0, the head in 8 bits)."""

    @property
    def folder(self) -> str:
        words = [Path(option).stem if self.kind == "einfold" else option for option in self.options]
        return "-".join([self.kind, *words]).replace("=", "-").replace(":", "-")


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    worker: str
    """Module of `benchmarks.workers`."""

    form: Form | None
    what: str
    requires: str = ""
    """Import name of the peer's package; the entry is skipped where it is missing."""

    options: dict[str, Any] = field(default_factory=dict)
    longest: int = 1 << 30
    """Longest context that is worth its time."""

    small: bool = False
    """Whether it is run on the small shapes only."""

    loads: int | None = None
    """Times it is loaded afresh, where loading takes long; otherwise as often as the run asks."""


_HF = Form("hf")
_HEAD8 = "matmul_mixed_precision=last_matmul:int8"
_HEAD4_RECIPE = "benchmarks/recipes/int4-head4.toml"

ENTRIES = (
    Entry(BANDWIDTH, "bandwidth", None, "threads that read 1 GiB", loads=1),
    Entry(
        "einfold int4",
        "einfold_engine",
        Form(EINFOLD, ("int4",)),
        "block 32, head in 8 bits, cache in float32",
    ),
    Entry(
        "einfold int4 int8 cache",
        "einfold_engine",
        Form(EINFOLD, ("benchmarks/recipes/int4-kv8.toml",)),
        "the same, cache in int8 with a scale a channel",
    ),
    Entry(
        "einfold int4 quarter",
        "einfold_engine",
        Form(EINFOLD, ("int4", "quarter")),
        "a quarter of the KV heads keeps all, the others 324 slots; cache in float32",
    ),
    Entry(
        "einfold int4 quarter int8 cache",
        "einfold_engine",
        Form(EINFOLD, ("benchmarks/recipes/int4-kv8.toml", "quarter")),
        "the same, cache in int8 with a scale a channel",
    ),
    Entry(
        "einfold int4 head4",
        "einfold_engine",
        Form(EINFOLD, (_HEAD4_RECIPE,)),
        "block 32, head in 4 bits too, cache in float32",
    ),
    Entry(
        "einfold int4-128",
        "einfold_engine",
        Form(EINFOLD, ("int4-128",)),
        "what --weights int4 stores: block 128, zero points, head in 4 bits too; cache in float32",
    ),
    Entry(
        "einfold int4-128 int8 cache",
        "einfold_engine",
        Form(EINFOLD, ("benchmarks/recipes/int4-128-kv8.toml",)),
        "the same, cache in int8 with a scale a channel",
    ),
    Entry(
        "einfold int4-128 int8 cache quest",
        "einfold_engine",
        Form(EINFOLD, ("benchmarks/recipes/int4-128-kv8-quest.toml",)),
        "the same, all tokens kept, an eighth of them read in a step",
    ),
    Entry(
        "genai int4",
        "genai",
        Form("genai", ("prune_lm_head=true",)),
        "onnxruntime-genai, block 32, head in 4 bits, cache in float32",
        requires="onnxruntime_genai",
    ),
    Entry(
        "genai int4 head8",
        "genai",
        # A head in 8 bits cannot share its weight with the embedding there.
        Form("genai", ("prune_lm_head=true", "shared_embeddings=false", _HEAD8)),
        "the same, head in 8 bits, embedding apart in float32",
        requires="onnxruntime_genai",
        options={"embedding_apart": True},
        longest=128,
        small=True,
    ),
    Entry(
        "llama.cpp Q4_0",
        "llama_cpp",
        Form("gguf"),
        "head in 8 bits, cache in f16, flash attention",
        requires="llama_cpp",
        options={"cache": "f16"},
    ),
    Entry(
        "llama.cpp Q4_0 q8 cache",
        "llama_cpp",
        Form("gguf"),
        "the same, cache in q8_0",
        requires="llama_cpp",
        options={"cache": "q8_0"},
    ),
    Entry(
        "Hugging Face fp32",
        "huggingface",
        _HF,
        "transformers as it comes, float32",
        requires="transformers",
        options={"dtype": "float32"},
        longest=4096,
        loads=1,
    ),
    Entry(
        "inductor bf16",
        "huggingface",
        _HF,
        "torch.compile, bfloat16, static cache, frozen weights",
        requires="transformers",
        options={"dtype": "bfloat16", "compile": True},
        longest=128,
        small=True,
        loads=1,
    ),
)


def choose(names: list[str]) -> list[Entry]:
    """The entries whose names are, or contain, one of the given words, all of them for no word; the
    bandwidth always. Raises ValueError for a word that fits none."""
    chosen = {BANDWIDTH} if names else {entry.name for entry in ENTRIES}
    for word in names:
        exact = [e.name for e in ENTRIES if e.name.lower() == word.lower()]
        found = exact or [e.name for e in ENTRIES if word.lower() in e.name.lower()]
        if not found:
            known = ", ".join(entry.name for entry in ENTRIES)
            raise ValueError(f"no entry is called {word!r}; there are: {known}")
        chosen.update(found)
    return [entry for entry in ENTRIES if entry.name in chosen]
