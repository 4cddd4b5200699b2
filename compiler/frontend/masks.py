"""Which keys a query sees: read off the function that transformers would fill a model's mask by.

A model may say its window to the attention function, put it into the mask, or both; what counts, wherever
attention is computed with a mask, is the mask. So while a model is traced its masks are not built: each is a
`Mask`, which says what it would have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import masking_utils

from ...errors import UnsupportedError
from .huggingface import context_limit


@dataclass(frozen=True)
class Mask:
    """Stands where a model hands a mask on to its attention."""

    window: int = 0
    """Keys that a query sees, itself among them; 0 for all before it."""
    unknown: str = ""
    """What else decides which keys are seen; empty where nothing does."""

    def __getitem__(self, index: Any) -> Mask:
        """A part of the mask is taken to fit the keys at hand."""
        return self

    def __getattr__(self, name: str) -> Any:
        """What a model asks for that computes with its mask instead of handing it on."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedError(
            f"the model builds an attention mask of its own (it reads {name!r} of the causal one), which is "
            "not captured"
        )

    def window_at(self, where: str) -> int:
        """The window; raises UnsupportedError where keys are seen by another rule than causality and it."""
        if self.unknown:
            raise UnsupportedError(
                f"{where}: which keys a query sees is decided by {self.unknown} of transformers, and not by "
                "causality and a window alone, which is what einfold compiles"
            )
        return self.window


def read_mask(*_: Any, mask_function: Callable[..., Any], config: Any = None, **__: Any) -> Mask:
    """What a mask made with `mask_function` shows; takes what transformers gives to the maker of a mask."""
    limit = context_limit(config) or float("inf")
    windows, causal, unknown = [0], False, ""
    for part in _parts(mask_function):
        code = part.__code__
        if code is masking_utils.causal_mask_function.__code__:
            causal = True
        elif code is _WINDOW:
            windows.append(int(_closure(part)["sliding_window"]))
        elif code is _CHUNKS and _closure(part)["chunk_size"] >= limit:
            continue  # the model's whole context is one chunk
        elif code is not _PACKED:  # it hides other texts of a row; a program's rows hold one
            unknown = unknown or part.__qualname__.partition(".")[0]
    if not causal and not unknown:
        unknown = "a mask that is not causal"
    windows = [window for window in windows if window]
    return Mask(min(windows, default=0), unknown)


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that all must show a key for it to be seen."""
    code = function.__code__
    if code is _ALL:
        for part in _closure(function)["mask_functions"]:
            yield from _parts(part)
    elif code is _RENUMBERED:
        yield from _parts(_closure(function)["mask_function"])
    else:
        yield function


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    values = (cell.cell_contents for cell in cells)
    return dict(zip(function.__code__.co_freevars, values, strict=True))


def _code(maker: str, *arguments: Any) -> Any:
    """The code of the functions that a function of transformers makes; None where it has no such function."""
    make = getattr(masking_utils, maker, None)
    return None if make is None else make(*arguments).__code__


_ALL = _code("and_masks", masking_utils.causal_mask_function)
_WINDOW = _code("sliding_window_overlay", 1)
_CHUNKS = _code("chunked_overlay", 1, None)
_PACKED = _code("packed_sequence_mask_function", None)
_RENUMBERED = _code("remap_positions_for_packed_sequence", masking_utils.causal_mask_function, None)
