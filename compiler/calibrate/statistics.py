"""What a pass may ask of the model while the pipeline runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from ..ir.kept import read_tensors, write_tensors
from ..ir.printer import print_program
from ..ir.program import Program
from ..ir.stored import numbers
from ..ir.weights import Weight
from .head_gates import HeadGates
from .observer import Found, Observer
from .snapshot import copied
from .stream import Tell, cut_behind, stream

#: Part of the key under which statistics are kept: to be raised when what they mean changes.
_VERSION = 3

_LEARNED = "learned.pt"


@dataclass
class Statistics:
    """Statistics of one model, measured when they are asked for and kept until the process ends.

    `text` gives the calibration text [rows, tokens] and where it is from. `model` gives a name for the
    model's weights, so that what was measured can be found again in `folder`; without either nothing is kept.
    """

    text: Callable[[], tuple[Tensor, str]]
    model: Callable[[], str] | None = None
    folder: Path | None = None
    tell: Tell | None = None
    read: list[str] = field(default_factory=list)
    """What was read, in words, for the report."""
    _found: dict[str, dict[str, Found]] = field(default_factory=dict)

    def of(self, program: Program, *observers: Observer) -> dict[str, Found]:
        """What observers find at their sites, by the names of these: on the sample that they want, the first
        one's, or on the calibration text."""
        name = "+".join(observer.key for observer in observers)
        if name not in self._found:
            tokens, origin = observers[0].sample(program) or self._as_read(observers[0], program)
            place = self._place(name, program, tokens, observers)
            self._found[name] = stream(program, tokens, observers, place, self.tell)
            self.read.append(origin)
        return self._found[name]

    def learned(self, program: Program, learner: HeadGates) -> dict[str, Found]:
        """What is learned of the model on the calibration text; found again as what observers find is."""
        if learner.key not in self._found:
            tokens, origin = self._calibration_text()
            folder = self._folder(learner.key, copied(program), tokens)
            known = None if folder is None else read_tensors(folder / _LEARNED)
            if known is None:
                known = learner.learn(program, tokens, self.tell or (lambda text, share: None))
                if folder is not None:
                    write_tensors(folder / _LEARNED, known)
            self._found[learner.key] = known
            self.read.append(origin)
        return self._found[learner.key]

    def _as_read(self, observer: Observer, program: Program) -> tuple[Tensor, str]:
        tokens, origin = self.text()
        shown = observer.reading(tokens, program.model.context)
        return shown, f"{shown.numel()} tokens of {origin}"

    def _calibration_text(self) -> tuple[Tensor, str]:
        tokens, origin = self.text()
        return tokens, f"{tokens.numel()} tokens of {origin}"

    def _place(
        self, name: str, program: Program, tokens: Tensor, observers: Sequence[Observer]
    ) -> Path | None:
        places = [site for observer in observers for site in observer.sites(program)]
        return self._folder(name, cut_behind(program, places)[0], tokens)

    def _folder(self, name: str, read: Program, tokens: Tensor) -> Path | None:
        """A folder whose name says which model, graph and text were measured."""
        if self.folder is None or self.model is None:
            return None
        digest = hashlib.sha256(f"{_VERSION} {self.model()}\n".encode())
        digest.update(print_program(read).encode())
        digest.update(tokens.numpy().tobytes())
        return self.folder / f"{name}-{digest.hexdigest()[:24]}"


def fingerprint(files: Sequence[Path]) -> str:
    """Names a model by its files: what they are called, how large, when written."""
    stats = [(path.resolve(), path.stat()) for path in sorted(files)]
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def digest_of(state: Mapping[str, Tensor | Weight]) -> str:
    """Names a model in memory by its weights: their names, shapes, types and bytes."""
    digest = blake3()
    for name in sorted(state):
        tensor = numbers(state[name])
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
