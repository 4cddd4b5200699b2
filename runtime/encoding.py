"""Calls of an encoder: what is given is checked against the manifest, cut into batches, and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiler.ir.manifest import Manifest, TensorEntry
from ..errors import NotFiniteError, PromptError
from .buffers import Array
from .runner import Caller

#: Rows that run together: bounds the memory of activations.
ROWS = 32

#: What stands for an input that is not given: every token is seen, and all are of the first kind.
_DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}

_DTYPES = {"f32": np.float32, "i64": np.int64}


class EncoderEngine:
    """Runs batches of any size on one caller."""

    def __init__(self, caller: Caller, manifest: Manifest) -> None:
        self.caller = caller
        self.inputs = {entry.name: entry for entry in manifest.inputs}
        self.outputs = {entry.name: entry for entry in manifest.outputs}
        self.context = manifest.model.context
        self._pad = manifest.model.pad_id or 0

    def tokens(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Rows of token ids as inputs [B, S], the shorter ones with padding behind them.

        Raises PromptError for a row that is empty.
        """
        if "input_ids" not in self.inputs:
            raise PromptError(
                f"the model reads no text, but {', '.join(map(str, self._wanted()))}; give arrays"
            )
        lengths = [len(row) for row in rows]
        if 0 in lengths:
            raise PromptError(f"text {lengths.index(0)} is empty; give at least one token")
        shape = (len(rows), max(lengths, default=0))
        ids = np.full(shape, self._pad, np.int64)
        mask = np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = _whole_numbers(row, place), 1
        found = {"input_ids": ids, "attention_mask": mask}
        if "attention_mask" not in self.inputs and not mask.all():
            raise PromptError(
                "the model takes no attention_mask, so its texts must be of one length"
            )
        return {name: array for name, array in found.items() if name in self.inputs}

    def run(self, given: Mapping[str, Array], rows: int = ROWS) -> dict[str, Array]:
        """The results by name, of arrays by name; `rows` of them run together.

        Raises PromptError for an array of another name, type or size than the model takes, or a number out of
        range, and NotFiniteError for results that are none.
        """
        if rows < 1:
            raise PromptError(f"1 row or more runs at a time, not {rows}")
        inputs = self._checked(given)
        count = len(next(iter(inputs.values())))
        if not count:
            return self._none(inputs)
        parts = [
            self._call({name: array[at : at + rows] for name, array in inputs.items()}, at)
            for at in range(0, count, rows)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _call(self, inputs: Mapping[str, Array], first: int) -> dict[str, Array]:
        found = self.caller.call(inputs)
        mask = inputs.get("attention_mask")
        for name, array in found.items():
            if not np.issubdtype(array.dtype, np.floating):
                continue
            wrong = ~np.isfinite(array)
            if mask is not None and self.outputs[name].shape[:2] == ("B", "S"):
                wrong &= mask.astype(bool).reshape(*mask.shape, *(1,) * (array.ndim - 2))
            if wrong.any():
                raise NotFiniteError(
                    f"{name} of row {first + int(np.argwhere(wrong)[0][0])} is not finite: the model's "
                    "weights are damaged, or its numbers overflow"
                )
        return found

    def _none(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What no rows give: of the right sizes, which one row of anything tells."""
        one = {
            name: np.ones((1, *(max(1, size) for size in array.shape[1:])), array.dtype)
            * (0 if self.inputs[name].below and name != "attention_mask" else 1)
            for name, array in inputs.items()
        }
        tokens = next(iter(inputs.values())).shape[1]
        found: dict[str, Array] = {}
        for name, array in self.caller.call(one).items():
            cut = array[:0]
            by_token = self.outputs[name].shape[1:2] == ("S",)
            found[name] = cut[:, :tokens] if by_token else cut
        return found

    def _checked(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """All inputs, in their types and with the sizes that the manifest lists."""
        main = next(iter(self.inputs))
        unknown = sorted(given.keys() - self.inputs.keys())
        if unknown or main not in given:
            what = f"takes no {unknown[0]!r}" if unknown else f"wants {main!r}"
            raise PromptError(f"the model {what}: its inputs are {', '.join(self._wanted())}")
        sizes: dict[str, int] = {}
        found: dict[str, Array] = {}
        for name, entry in self.inputs.items():
            if name in given:
                array = _typed(given[name], entry)
            else:
                array = np.full(found[main].shape, _DEFAULTS.get(name, 0), np.int64)
            _check_shape(array, entry, sizes)
            _check_range(array, entry)
            found[name] = array
        if self.context and sizes.get("S", 0) > self.context:
            raise PromptError(
                f"a text has {sizes['S']} tokens, and the model reads {self.context} at most; shorten it, or "
                "cut it into parts"
            )
        if sizes["B"] and sizes.get("S") == 0:
            raise PromptError("there are rows of no tokens; give at least one")
        mask = found.get("attention_mask")
        if mask is not None and not mask.any(axis=1).all():
            row = int(np.flatnonzero(~mask.any(axis=1))[0])
            raise PromptError(f"attention_mask hides all tokens of row {row}; leave that row out")
        return found

    def _wanted(self) -> list[str]:
        return [f"{name} {entry}" for name, entry in self.inputs.items()]


def _whole_numbers(row: Sequence[int], place: int) -> Array:
    array = np.asarray(row)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PromptError(
            f"text {place} is neither a text nor a flat list of token ids (whole numbers)"
        )
    return array


def _typed(value: Array, entry: TensorEntry) -> npt.NDArray[Any]:
    array = np.asarray(value)
    wanted = _DTYPES[entry.dtype]
    if array.dtype != np.bool_ and not np.can_cast(array.dtype, wanted, "same_kind"):
        raise PromptError(f"{entry.name} is of the type {array.dtype}; the model takes {entry}")
    return np.ascontiguousarray(array, wanted)


def _check_shape(array: Array, entry: TensorEntry, sizes: dict[str, int]) -> None:
    """Raises PromptError for other sizes; those that vary are the same in all inputs."""
    fits = array.ndim == len(entry.shape) and all(
        size == (int(name) if name.isdecimal() else sizes.setdefault(name, size))
        for name, size in zip(entry.shape, array.shape, strict=True)
    )
    if not fits:
        varied = ", ".join(f"{name} is {size}" for name, size in sizes.items())
        raise PromptError(
            f"{entry.name} has the sizes {list(array.shape)}; the model takes {entry}"
            + (f", where {varied}" if varied else "")
        )


def _check_range(array: npt.NDArray[Any], entry: TensorEntry) -> None:
    if not entry.below or not array.size:
        return
    wrong = np.argwhere((array < 0) | (array >= entry.below))
    if len(wrong):
        row, place = wrong[0][:2]
        raise PromptError(
            f"{entry.name} of row {row} is {array[row, place]} at position {place}, which is out of range: "
            f"the model knows {entry.below}, from 0 on"
        )
