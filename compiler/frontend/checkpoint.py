"""Checkpoints whose weights are codes: which formats there are, and how one is opened.

A format reads headers, and perhaps small tensors, and gives a `Weight` for each parameter of the model,
which reads and unpacks its numbers when it is loaded. Where a scheme holds the codes exactly as they are, the
weight is a `StoredWeight`, and a compile that asks for no other storage rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import ModelError, UnsupportedError
from ..ir.registry import Registry
from ..ir.stored import numbers
from ..ir.weights import Weight
from . import huggingface
from .huggingface import ModelSource, check_weight_files
from .structure import structure
from .tensor_files import read_tensors


@dataclass
class Checkpoint:
    """What a format gives: weights by the names of the model's parameters, and what to say of them."""

    weights: dict[str, Weight]
    notes: list[str] = field(default_factory=list)


class Format:
    """Base of all formats."""

    name: ClassVar[str]
    """As `quantization_config.quant_method` has it, or the kind of the file."""

    @staticmethod
    def read_config(source: ModelSource) -> Any:
        """The configuration of a model in this format; raises the errors of `huggingface.read_config`."""
        return huggingface.read_config(source)

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        """`options` is the quantization_config. Raises UnsupportedError for what cannot be read."""
        self.source, self.config, self.options = source, config, options
        self.notes: list[str] = []

    def read(self, model: nn.Module) -> dict[str, Weight]:
        """The weights of a model's parameters, by names; shared ones may be missing under other names.

        Raises ModelError for a checkpoint that is damaged, and UnsupportedError for what cannot be read.
        """
        raise NotImplementedError


class CodedTensors(Format):
    """Base of formats in safetensors: the weight of a module is several tensors beside one another."""

    dropped: ClassVar[Mapping[str, str]] = {}
    """Endings of tensors that nothing reads here, and what they are for."""

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        """The weights that tensors of a module make, by their own names there; takes those out of `parts`.
        Gives none for a module that is not in codes."""
        raise NotImplementedError

    def read(self, model: nn.Module) -> dict[str, Weight]:
        check_weight_files(self.source)
        assert self.source.folder is not None
        modules: dict[str, dict[str, Weight]] = {}
        for name, tensor in read_tensors(self.source.folder).items():
            module, _, last = name.rpartition(".")
            modules.setdefault(module, {})[last] = tensor
        found: dict[str, Weight] = {}
        for module, parts in modules.items():
            made = self.weights(module, parts)
            for ending in self.dropped.keys() & parts.keys():
                self.note_once(
                    f"the checkpoint holds {self.dropped[ending]}, which nothing reads: einfold computes in "
                    "floats there"
                )
                del parts[ending]
            prefix = f"{module}." if module else ""
            found |= {prefix + last: weight for last, weight in (parts | made).items()}
        return found

    def number(self, key: str) -> int:
        """A whole number of the quantization_config."""
        found = self.options.get(key)
        if not isinstance(found, int) or isinstance(found, bool):
            raise self.unsupported(
                f"its quantization_config has {key} {found!r}; a whole number is wanted"
            )
        return found

    def part(self, module: str, parts: dict[str, Weight], name: str) -> Weight:
        """A tensor of a module, taken out of `parts`."""
        if name not in parts:
            raise self.damaged(module, f"it has codes and no {name}")
        return parts.pop(name)

    def axis(self, module: str, tensor: Weight, axis: int) -> int:
        """The length of an axis of a matrix."""
        if len(tensor.shape) != 2 or not all(tensor.shape):
            raise self.damaged(module, f"its codes are {list(tensor.shape)}, which is no matrix")
        return tensor.shape[axis]

    def size(self, module: str, tensor: Weight, axis: int, bits: int) -> int:
        """How many codes an axis of int32 words holds, where they fill them."""
        return self.axis(module, tensor, axis) * 32 // bits

    def expect(
        self,
        module: str,
        name: str,
        tensor: Weight,
        dtype: torch.dtype | None,
        shape: tuple[int, ...],
    ) -> None:
        """Raises ModelError for a tensor of another shape or type; None stands for any float."""
        fits = tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not fits:
            given, wanted = (
                f"{str(kind or 'a float').removeprefix('torch.')} {list(size)}"
                for kind, size in ((tensor.dtype, tensor.shape), (dtype, shape))
            )
            raise self.damaged(module, f"{name} is {given} where {wanted} was expected")

    def note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def damaged(self, module: str, what: str) -> ModelError:
        return ModelError(f"{self.source.location}: {module}: {what}; the checkpoint is damaged")

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.source.location} ({self.name}): {what}")


FORMATS: Registry[type[Format]] = Registry(
    "format of checkpoints", "einfold.compiler.frontend.checkpoints"
)


def read_config(source: ModelSource) -> Any:
    """The model's configuration, from config.json or from the header of a GGUF; no weight is read."""
    return (FORMATS["gguf"] if source.file is not None else Format).read_config(source)


def open_checkpoint(source: ModelSource, config: Any) -> Checkpoint | None:
    """The checkpoint of a model whose weights are codes, in a format that is read; None for any other.

    Reads headers. Takes `quantization_config` off the config: what is compiled is the model that the codes
    stand for.
    """
    found = getattr(config, "quantization_config", None)
    told = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    method = told.get("quant_method", "")
    name = "gguf" if source.file is not None else str(getattr(method, "value", method))
    if name not in FORMATS:
        return None
    if source.file is None and source.folder is None:
        raise UnsupportedError(
            f"{source.name} is quantized already ({name}): download it, and give the folder"
        )
    reader = FORMATS[name](source, config, told)
    if found is not None:
        del config.quantization_config
    model = structure(source, config)
    weights = _fitted(source, model, reader.read(model))
    return Checkpoint(weights, reader.notes)


def load_reference(source: ModelSource) -> Any:
    """The original model in float32, as transformers runs it; what einfold is compared with."""
    config = read_config(source)
    found = open_checkpoint(source, config)
    if found is None:
        return huggingface.load_reference(source)
    model = structure(source, config)
    for name, parameter in model.named_parameters():
        parameter.data = numbers(found.weights[name]).float()
    for name, buffer in model.named_buffers():
        if name in found.weights:
            buffer.copy_(numbers(found.weights[name]))
    return model


def _fitted(source: ModelSource, model: Any, given: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights by the names that the model has for them. Raises ModelError where they do not fit it."""
    wanted = dict(model.named_parameters(remove_duplicate=False))
    wanted |= {name: value for name, value in model.state_dict().items() if name not in wanted}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, Weight] = {}
    unread = []
    for name, weight in given.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        own = next((each for each in names if each in wanted), None)
        if own is None:
            if not _says_nothing(name, weight):
                unread.append(name)
            continue
        _check(source, own, weight, tuple(wanted[own].shape))
        found[own] = weight
    if unread:
        raise ModelError(
            f"{source.location}: the checkpoint holds {len(unread)} weights that {type(model).__name__} does "
            f"not read, {unread[0]} among them: it is of another model than its config says, or of a layout "
            "that is not read in codes"
        )
    _tie(wanted, found)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelError(
            f"{source.location}: the checkpoint lacks {len(missing)} weights that its config asks for, "
            f"{missing[0]} among them"
        )
    return found


def _says_nothing(name: str, weight: Weight) -> bool:
    """Whether a tensor without a parameter changes nothing: older exporters write rotary frequencies, which
    follow from the config, and biases of zeros."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return name.endswith(".bias") and len(weight.shape) == 1 and not bool(weight.load().any())


def _check(source: ModelSource, name: str, weight: Weight, shape: tuple[int, ...]) -> None:
    if weight.shape != shape:
        raise ModelError(
            f"{source.location}: weight {name} is {list(weight.shape)}, but the config asks for {list(shape)}"
        )
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ModelError(
            f"{source.location}: weight {name} is {str(weight.dtype).removeprefix('torch.')} and has no "
            "scales beside it: the checkpoint is damaged"
        )


def _tie(wanted: Mapping[str, Any], found: dict[str, Weight]) -> None:
    """Parameters that are one in the model are one weight, unless the checkpoint brings different ones."""
    first: dict[int, str] = {}
    for name, parameter in wanted.items():
        owner = first.setdefault(id(parameter), name)
        if owner == name:
            continue
        if name in found and owner in found:
            if torch.equal(numbers(found[name]), numbers(found[owner])):
                found[name] = found[owner]
        elif name in found or owner in found:
            found[name] = found[owner] = found.get(name) or found[owner]
