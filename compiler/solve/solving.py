"""Solves weights along one reading of the calibration text, layer by layer.

The text goes through the model twice, side by side: rows of the original model, and rows of the model as it
comes to be stored. Where a linear is met, its solver is given what its observers found in the inputs, both of
them, and its results follow: the original weight's for the first half of a part of the text, the stored
weight's for the second. So each weight is solved on the inputs that it will have, and one is held at a time
beside the text's activations and what was solved. Experts are solved one by one (`experts.py`). A run that
was interrupted goes on behind the last layers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.nn import functional

from ...errors import IRError
from ..calibrate.observer import OBSERVERS, Found, Observer
from ..calibrate.sites import Site, expert_products, expert_weights, weight_products
from ..calibrate.snapshot import copied
from ..calibrate.stream import Stream, Tell
from ..ir.interpreter import Interpreter
from ..ir.kept import cache_home, drop_oldest
from ..ir.ops import einfold_ops
from ..ir.ops.experts import Experts
from ..ir.printer import print_program
from ..ir.program import Program, call_arguments, readers
from ..ir.quant.scheme import Scheme
from .distilling import Distilling
from .experts import Stack, halves, joined, run_stored, solve_experts
from .solver import Solved, Solver, as_found, finite, from_found
from .tuning import LayerByLayer

#: Rows that go from one product to the next together, of the text as one model or both have it: what is
#: computed in between is of so many.
_TOKENS = 1024

#: Seconds between two states that are kept: a state is tens of megabytes.
_EVERY = 20.0

#: Solved models that are kept in the user's cache folder; each takes about the bytes of its stored weights.
_KEPT = 4

#: Part of the name under which solved weights are kept: to be raised when what solvers give changes.
_VERSION = 8


class Solving:
    """The weights of a program that a solver decides by a text, as the program is when this is made.

    Later passes may do with the program what they like. `take` names weights; once `run` has read a text,
    `at` gives them.
    """

    def __init__(self, program: Program, solver: Solver) -> None:
        self._program: Program | None = copied(program)
        self._solver, self._begun = solver, solver.begun
        self._sites = _sites(self._program)
        self._schemes: dict[str, Scheme] = {}
        self._divided: set[str] = set()
        self._solved: dict[str, Solved] = {}

    def take(self, name: str, scheme: Scheme, divided: bool = False) -> bool:
        """Whether a weight can be solved here: linears read it, or experts, and nothing but embeddings beside
        them. `divided`: whether its inputs can be divided by what its channels are multiplied by."""
        site = self._sites.get(name)
        if site is None or (scheme.shared and _of_experts(site)):  # what is shared has no expert
            return False
        self._schemes[name] = scheme
        if divided and self._begun.scales_channels:
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
            observer = _Solve(self._sites, self._schemes, self._divided, self._begun)
            stream = Stream(self._program, [observer], _EVERY, "solving weights")
            folder, both = self._folder(tokens_BS), 2 if self._begun.follows else 1
            parts = [part.repeat(both, 1) for part in _parts(tokens_BS, both)]
            found = stream.over(parts, folder, tell)
            for name, scheme in self._schemes.items():
                labels = scheme.pieces(self._program.weights[name].shape)
                self._solved[name] = from_found(found[self._sites[name].name], name, labels)
            if self._solver.tunes:
                kind = LayerByLayer if self._solver.tunes == "layers" else Distilling
                tuning = kind(self._program, self._solver, self._schemes, self._solved)
                kept = folder / _tuned(self._solver)
                tuning.run(_parts(tokens_BS), kept, tell or (lambda text, share: None))
                self._solved = tuning.solved
        self._program = None  # lets go of the weights

    def _folder(self, tokens_BS: Tensor) -> Path:
        """Where solved weights are kept: its name says which model, text, schemes and solver they are of."""
        assert self._program is not None
        said = sorted(
            f"{name} {scheme} {name in self._divided}" for name, scheme in self._schemes.items()
        )
        text = [str(_VERSION), str(self._begun), *said, print_program(self._program)]
        digest = blake3("\n".join(text).encode())
        digest.update(tokens_BS.numpy().tobytes())
        weights = Interpreter(self._program, keep_weights=False)  # it gives memory back in between
        for name in self._program.weights:
            data = weights.weight(name).reshape(-1)
            digest.update(data.view(torch.uint8).numpy().data)
        folder = cache_home() / "solved" / digest.hexdigest()[:24]
        _make_room(folder)
        return folder


def _parts(tokens_BS: Tensor, each: int = 1) -> list[Tensor]:
    """The text in parts, whose rows are read so many times each."""
    return [*tokens_BS.split(max(1, _TOKENS // (each * tokens_BS.shape[1])))]


class _Mean:
    """What observers find in several parts: a mean over tokens."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._count = 0

    def add(self, found: Found, inputs: Tensor) -> None:
        tokens = inputs.shape[:-1].numel()
        self._count += tokens
        for label, value in found.items():
            known = self.found.setdefault(label, value)
            if known is not value:
                known.lerp_(value, tokens / self._count)


class _Narrowed:
    """What was seen and computed of the original's inputs of a product, which are not held."""

    def __init__(self) -> None:
        self.met = _Mean()
        self.products: deque[Tensor] = deque()


class _Solve(Observer):
    """Solves at each product, and gives what the stored weights give."""

    name = "solve"

    def __init__(
        self,
        sites: Mapping[str, Site],
        schemes: Mapping[str, Scheme],
        divided: Collection[str],
        solver: Solver,
    ) -> None:
        self._sites = {sites[name].name: sites[name] for name in schemes}
        self._schemes, self._divided, self._solver = schemes, divided, solver
        self._observers = [OBSERVERS[name]() for name in solver.observes]
        self._calls: list[tuple[Any, ...]] = []
        self._follow: Callable[..., Tensor] | None = None
        self._narrowed = self._coming = _Narrowed()

    def sites(self, program: Program) -> list[Site]:
        return list(self._sites.values())

    def begin(self, site: Site, *values: Any) -> None:
        if not self._calls:
            self._site = site
            self._narrowed, self._coming = self._coming, _Narrowed()
        self._calls.append(values)

    def narrows(self, site: Site) -> bool:
        """Where a linear makes fewer numbers of its inputs than they are."""
        if _of_experts(site) or not self._solver.follows or site.name in self._divided:
            return False  # of inputs that are divided more may be asked
        assert site.product is not None
        made, read = call_arguments(site.product)["weight_NM"].meta["val"].shape
        return bool(made < read)

    def narrow(self, site: Site, *arguments: Any) -> Tensor:
        """The original's half of the inputs is seen and multiplied at once: its results are held then, and
        the inputs of the other half."""
        x, weight_NM, *bias_N = arguments
        original, own = x.chunk(2)
        self._coming.met.add(self._observe(site, own, original, weight_NM), own)
        self._coming.products.append(functional.linear(original, weight_NM, *bias_N))
        found: Tensor = own.clone()
        return found

    def product(self, read: bool, *arguments: Any) -> Tensor:
        if self._follow is None:  # all parts were shown
            self._seen: dict[str, Tensor] = {}
            self._follow = self._experts() if _of_experts(self._site) else self._linear()
            self._calls.clear()
        x: Tensor = arguments[0]
        return self._follow(*arguments) if read else x.new_empty(0)

    def end(self) -> Found:
        self._follow = None
        return self._seen

    def _linear(self) -> Callable[..., Tensor]:
        """Solves a linear's weight, and gives what it then computes of a part."""
        name, follows = self._site.name, self._solver.follows
        weight_NM: Tensor = self._calls[0][1]
        inputs: list[Tensor] = [call[0] for call in self._calls]
        scheme, target, channels = self._schemes[name], weight_NM, None
        seen = self._narrowed.products  # and what was found in them
        found = self._narrowed.met.found if seen else self._in_parts(inputs, target)
        if name in self._divided:
            channels = self._solver.channels(finite(name, weight_NM, scheme), scheme, found)
        if channels is not None:
            target = weight_NM * channels
            found = self._in_parts((x / channels for x in inputs), target)
        solved = replace(self._solve(name, target, found), channels=channels)
        self._keep(name, solved)
        stored_NM = cache(lambda: scheme.dequantize(solved.pieces, weight_NM.shape[1]))

        def product(x: Tensor, weight_NM: Tensor, bias_N: Tensor | None = None) -> Tensor:
            if not follows:
                return functional.linear(x, weight_NM, bias_N)
            if self._narrowed.products:
                original, own = self._narrowed.products.popleft(), x
            else:
                half, own = x.chunk(2)
                original = functional.linear(half, weight_NM, bias_N)
            own = own if channels is None else own / channels
            return torch.cat((original, functional.linear(own, stored_NM(), bias_N)))

        return product

    def _experts(self) -> Callable[..., Tensor]:
        """The same of a layer of experts."""
        calls = [Experts(*arguments) for arguments in self._calls]
        pairs = [halves(call) if self._solver.follows else (call, call) for call in calls]
        original = own = joined([pair[0] for pair in pairs])
        if self._solver.follows:
            own = joined([pair[1] for pair in pairs])
        weights = (original.gate_up_ENM, original.down_EMI)
        gate_up, down = (
            Stack(name, weight, self._schemes.get(name))
            for name, weight in zip(_weights(self._site), weights, strict=True)
        )
        observe = partial(self._observe, self._site)
        solve_experts(original, own, gate_up, down, observe, self._solve)
        for stack in (gate_up, down):
            if stack.name in self._schemes:
                self._keep(stack.name, stack.solved())

        def product(*arguments: Any) -> Tensor:
            if not self._solver.follows:
                return Experts(*arguments).run()
            original, own = halves(Experts(*arguments))
            return torch.cat((original.run(), run_stored(own, gate_up, down)))

        return product

    def _in_parts(self, inputs: Iterable[Tensor], weight_NM: Tensor) -> Found:
        """What is found in the inputs of a weight in all parts."""
        mean = _Mean()
        for x in inputs:
            original, own = x.chunk(2) if self._solver.follows else (x, x)
            mean.add(self._observe(self._site, own, original, weight_NM), own)
        return mean.found

    def _observe(self, site: Site, own: Tensor, x: Tensor, *weight_NM: Tensor) -> Found:
        """What is found in inputs, as the model has them that is solved so far, and as the original has; and
        of the weight that they meet, where that is one."""
        found: dict[str, Tensor] = {}
        for observer in self._observers:
            found |= observer.see(site, own, x, *weight_NM)
        return found

    def _solve(self, name: str, weight_NM: Tensor, found: Found) -> Solved:
        scheme = self._schemes[name]
        return self._solver.solve(finite(name, weight_NM, scheme), scheme, found)

    def _keep(self, name: str, solved: Solved) -> None:
        self._seen |= as_found(name, solved)


def _sites(program: Program) -> dict[str, Site]:
    """Where each weight can be solved that linears read, or experts."""
    found = {site.name: site for site in weight_products(program)}
    found |= {name: site for site in expert_products(program) for name in _weights(site)}
    return {name: site for name, site in found.items() if _read_alike(program, name, site)}


def _of_experts(site: Site) -> bool:
    return site.product is not None and site.product.target is einfold_ops.experts.default


def _weights(site: Site) -> tuple[str, ...]:
    """The weights of a site at experts."""
    assert site.product is not None
    return expert_weights(site.product)


def _read_alike(program: Program, name: str, site: Site) -> bool:
    """Whether nothing else reads a weight than calls of its site's operator, and embeddings."""
    assert site.product is not None
    known = {site.product.target, einfold_ops.embedding.default}
    return all(reader.target in known for reader in readers(program.graph, name))


def _tuned(solver: Solver) -> str:
    """The folder, beside what it begins with, of what a solver tunes."""
    return f"tuned-{blake3(str(solver).encode()).hexdigest()[:16]}"


def _make_room(folder: Path) -> None:
    """Marks a folder as the newest, and drops those that are older than the few that are kept."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        drop_oldest(folder.parent.iterdir(), _KEPT)
