"""Solves weights along one reading of the calibration text, layer by layer.

The text goes through the model twice, side by side in one batch: rows of the original model, and rows of
the model as it comes to be stored. Where a linear is met, its solver is given what its observers found in the
inputs, both of them, and its results follow: the original weight's for the first half, the stored weight's
for the second. So each weight is solved on the inputs that it will have, and one is held at a time beside the
text's activations and what was solved. A run that was interrupted goes on behind the last layers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.nn import functional

from ...errors import IRError
from ..calibrate.observer import OBSERVERS, Found, Observer
from ..calibrate.sites import Site, weight_products
from ..calibrate.snapshot import copied
from ..calibrate.stream import Stream, Tell
from ..ir.kept import cache_home
from ..ir.ops import einfold_ops
from ..ir.printer import print_program
from ..ir.program import Program
from ..ir.quant.scheme import Scheme
from .solver import Solved, Solver, finite

#: Seconds between two states that are kept: a state is tens of megabytes.
_EVERY = 20.0

#: Solved models that are kept in the user's cache folder; each takes about the bytes of its stored weights.
_KEPT = 4

#: Part of the name under which solved weights are kept: to be raised when what solvers give changes.
_VERSION = 2

_ERROR, _CHANNELS = "solver.error", "solver.channels"

#: Operators of which it is known how a weight's error is felt.
_KNOWN = {einfold_ops.linear.default, einfold_ops.embedding.default}


class Solving:
    """The weights of a program that a solver decides by a text, as the program is when this is made.

    Later passes may do with the program what they like. `take` names weights; once `run` has read a text,
    `at` gives them.
    """

    def __init__(self, program: Program, solver: Solver) -> None:
        self._program: Program | None = copied(program)
        self._solver = solver
        self._products = {
            site.name: site
            for site in weight_products(self._program)
            if _readers(self._program, site.name) <= _KNOWN
        }
        self._schemes: dict[str, Scheme] = {}
        self._divided: set[str] = set()
        self._solved: dict[str, Solved] = {}

    def take(self, name: str, scheme: Scheme, divided: bool = False) -> bool:
        """Whether a weight can be solved here: a linear reads it, and nothing but linears and embeddings.
        `divided`: whether its inputs can be divided by what its channels are multiplied by."""
        if name not in self._products:
            return False
        self._schemes[name] = scheme
        if divided and self._solver.scales_channels:
            self._divided.add(name)
        return True

    def at(self, name: str) -> Solved:
        """A weight that was taken. Raises IRError before the text was read."""
        if self._program is not None:
            raise IRError(f"what {name} is stored as was asked for before calibration")
        return self._solved[name]

    def run(self, tokens_BS: Tensor, tell: Tell | None = None) -> None:
        """Reads the text. Raises CalibrationError where it gives no usable numbers, or a solver none."""
        assert self._program is not None
        if self._schemes:
            observer = _Solve(self._products, self._schemes, self._divided, self._solver)
            stream = Stream(self._program, [observer], _EVERY, "solving weights")
            sample = torch.cat((tokens_BS, tokens_BS)) if self._solver.follows else tokens_BS
            found = stream.over(sample, self._folder(tokens_BS), tell)
            self._solved = {name: _solved(each) for name, each in found.items()}
        self._program = None  # lets go of the weights

    def _folder(self, tokens_BS: Tensor) -> Path:
        """Where solved weights are kept: its name says which model, text, schemes and solver they are of."""
        assert self._program is not None
        said = sorted(
            f"{name} {scheme} {name in self._divided}" for name, scheme in self._schemes.items()
        )
        text = [str(_VERSION), str(self._solver), *said, print_program(self._program)]
        digest = blake3("\n".join(text).encode())
        digest.update(tokens_BS.numpy().tobytes())
        for name in self._program.weights:
            data = self._program.weights[name].load().reshape(-1)
            digest.update(data.view(torch.uint8).numpy().data)
        folder = cache_home() / "solved" / digest.hexdigest()[:24]
        _make_room(folder)
        return folder


class _Solve(Observer):
    """Solves at each product, and gives what the stored weight gives."""

    name = "solve"

    def __init__(
        self,
        products: Mapping[str, Site],
        schemes: Mapping[str, Scheme],
        divided: Collection[str],
        solver: Solver,
    ) -> None:
        self._products, self._schemes, self._divided = products, schemes, divided
        self._solver = solver
        self._observers = [OBSERVERS[name]() for name in solver.observes]

    def sites(self, program: Program) -> list[Site]:
        return [site for name, site in self._products.items() if name in self._schemes]

    def begin(self, site: Site, *values: Any) -> None:
        self._site = site
        self._x: Tensor = values[0]

    def product(self, weight_NM: Tensor, bias_N: Tensor | None, read: bool) -> Tensor:
        x, own = self._x, self._x
        if self._solver.follows:
            x, own = self._x.chunk(2)
        name, scheme = self._site.name, self._schemes[self._site.name]
        finite(name, weight_NM, scheme)
        found, target = self._findings(own, x), weight_NM
        channels = (
            self._solver.channels(weight_NM, scheme, found) if name in self._divided else None
        )
        if channels is not None:
            scaled = own / channels
            found = self._findings(scaled, scaled if own is x else x / channels)
            own, target = scaled, weight_NM * channels
        solved = self._solver.solve(target, scheme, found)
        error = torch.tensor(float("nan") if solved.error is None else solved.error)
        self._seen = solved.pieces | {_ERROR: error.double()}
        if channels is not None:
            self._seen |= {_CHANNELS: channels}
        if not read:
            return x.new_empty(0)
        if not self._solver.follows:
            return functional.linear(x, weight_NM, bias_N)
        stored = scheme.dequantize(solved.pieces, weight_NM.shape[1])
        out = x.new_empty((*self._x.shape[:-1], len(weight_NM)))
        half = len(x)
        out[:half], out[half:] = (
            functional.linear(x, weight_NM, bias_N),
            functional.linear(own, stored, bias_N),
        )
        return out

    def _findings(self, own: Tensor, original: Tensor) -> dict[str, Tensor]:
        """What the observers find in the inputs of the stored model and of the original."""
        found: dict[str, Tensor] = {}
        for observer in self._observers:
            found |= observer.see(self._site, own, original)
        return found


def _readers(program: Program, name: str) -> set[Any]:
    """The operators that read a weight."""
    reads = [node for node in program.graph.find_nodes(op="get_attr") if node.target == name]
    return {user.target for read in reads for user in read.users}


def _solved(found: Found) -> Solved:
    error = float(found[_ERROR])
    pieces = {name: piece for name, piece in found.items() if name not in (_ERROR, _CHANNELS)}
    return Solved(pieces, None if error != error else error, found.get(_CHANNELS))


def _make_room(folder: Path) -> None:
    """Marks a folder as the newest, and drops those that are older than the few that are kept."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        others = sorted(folder.parent.iterdir(), key=lambda each: each.stat().st_mtime)
        for old in others[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
