"""The targets that the project set itself, and whether a run meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .figures import Figures

Kind = Literal["ratio", "roofline", "load"]


@dataclass(frozen=True)
class Target:
    """`entry` against `peer` on a measure of one shape; roofline and load have no peer."""

    title: str
    kind: Kind
    entry: str
    wanted: float
    measure: str = ""
    peer: str = ""
    """Another entry; the best of several, with | between."""

    shape: str = "qwen2.5-0.5b"

    def value(self, figures: Figures) -> float | None:
        if self.kind == "ratio":
            peers = self.peer.split("|")
            found = [figures.ratio(self.entry, peer, self.measure) for peer in peers]
            return min((ratio for ratio in found if ratio is not None), default=None)
        if self.kind == "roofline":
            return figures.roofline(self.entry, self.measure)
        return figures.load(self.entry)

    def met(self, value: float) -> bool:
        return value <= self.wanted if self.kind == "load" else value >= self.wanted


_GENAI, _LLAMA = "genai int4", "llama.cpp Q4_0"
_LLAMAS = f"{_LLAMA}|{_LLAMA} q8 cache"
_INT8, _QUARTER = "einfold int4 int8 cache", "einfold int4 quarter int8 cache"
_LONG, _LARGE = "d16384", "llama-3.2-1b"
_DEFAULT = "einfold int4-128"
_READING = f"{_DEFAULT} int8 cache quest"
_BEST = f"{_GENAI}|{_LLAMAS}"

TARGETS = (
    Target("genai, same bits", "ratio", "einfold int4 head4", 1.0, "d128", _GENAI),
    Target("genai, same bits", "ratio", "einfold int4 head4", 1.0, "pp512", _GENAI),
    Target("genai, same bits, head in 8", "ratio", "einfold int4", 1.0, "d128", f"{_GENAI} head8"),
    Target("genai, same bits, head in 8", "ratio", "einfold int4", 1.0, "pp512", f"{_GENAI} head8"),
    Target("genai, block 128", "ratio", "einfold int4-128", 1.2, "d128", _GENAI),
    Target("genai, block 128", "ratio", "einfold int4-128", 1.2, "pp512", _GENAI),
    Target("llama.cpp", "ratio", "einfold int4", 1.25, "d128", _LLAMA),
    Target("llama.cpp, f16 cache", "ratio", "einfold int4 int8 cache", 1.6, "d4096", _LLAMA),
    Target("llama.cpp", "ratio", "einfold int4", 1.0, "pp512", _LLAMA),
    Target("Hugging Face float32", "ratio", "einfold int4", 6.0, "d128", "Hugging Face fp32"),
    Target("roofline (stretch)", "roofline", "einfold int4", 0.75, "d128"),
    Target("roofline (stretch)", "roofline", "einfold int4", 0.50, "d4096"),
    Target("llama.cpp, best cache", "ratio", _INT8, 2.0, _LONG, _LLAMAS),
    Target("llama.cpp, best cache", "ratio", _INT8, 2.0, _LONG, _LLAMAS, _LARGE),
    Target("llama.cpp, best cache", "ratio", _QUARTER, 8.0, _LONG, _LLAMAS, _LARGE),
    Target("own cache of all heads, f32", "ratio", _QUARTER, 3.7, _LONG, "einfold int4", _LARGE),
    Target("own cache of all heads, int8", "ratio", _QUARTER, 2.1, _LONG, _INT8, _LARGE),
    Target("roofline", "roofline", _INT8, 0.25, _LONG),
    Target("roofline (stretch)", "roofline", _QUARTER, 0.45, _LONG, "", _LARGE),
    *(
        Target("best peer, what --weights int4 stores", "ratio", entry, 1.15, at, _BEST, shape)
        for shape in ("qwen2.5-0.5b", _LARGE)
        for entry, at in (
            (_DEFAULT, "d128"),
            (_DEFAULT, "d4096"),
            (f"{_DEFAULT} int8 cache", "d4096"),
        )
    ),
    Target("llama.cpp", "ratio", _DEFAULT, 1.0, "pp512", _LLAMA),
    *(
        Target("llama.cpp, best cache, all kept", "ratio", _READING, wanted, at, _LLAMAS, shape)
        for shape, at, wanted in (
            ("qwen2.5-0.5b", _LONG, 2.5),
            ("qwen2.5-0.5b", "d32000", 3.5),
            (_LARGE, _LONG, 2.0),
            (_LARGE, "d32000", 3.0),
        )
    ),
    Target("seconds to load", "load", "einfold int4", 0.7),
)
