"""What stands behind the model in a folder of sentence-transformers: pooling, dense layers, normalisation.

`modules.json` lists the parts; each has its options in a folder of its own. They are rebuilt here in torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ModelError, UnsupportedError, first_line, pass_on

MODULES = "modules.json"


def _first(x_BSH: Tensor, mask_BS1: Tensor) -> Tensor:
    return x_BSH[:, 0]


def _largest(x_BSH: Tensor, mask_BS1: Tensor) -> Tensor:
    return torch.where(mask_BS1 > 0, x_BSH, torch.full_like(x_BSH, -1e9)).amax(1)


def _mean(x_BSH: Tensor, mask_BS1: Tensor) -> Tensor:
    return (x_BSH * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1e-9)


def _mean_by_root(x_BSH: Tensor, mask_BS1: Tensor) -> Tensor:
    return (x_BSH * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1e-9).sqrt()


#: Ways of pooling [B, S, H] to [B, H] by their names in a config, in the order in which several are joined.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_by_root,
}

#: How configs spell them in pooling_mode_NAME.
_SPELLED = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
_SPELLED |= {"mean_sqrt_len_tokens": "mean_sqrt_len"}

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}


@dataclass(frozen=True)
class Dense:
    """A linear layer [inputs] -> [outputs] with its activation, and the folder that holds its weights."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class SentenceHead:
    """The parts behind the model, in their order: poolings first, then dense layers and normalisation."""

    poolings: tuple[str, ...]
    parts: tuple[Dense | str, ...]
    """Dense layers, and "normalize"."""
    longest: int | None = None
    """Tokens that the folder cuts a text to."""
    notes: tuple[str, ...] = ()
    """What sentence-transformers would do to a text that einfold does not."""

    def build(self) -> nn.Module:
        """The parts as a module of (token embeddings [B, S, H], mask [B, S]) -> [B, D]; its weights are 0."""
        return _Head(self)

    def state(self) -> dict[str, Tensor]:
        """The weights of dense layers, by their names in the whole model."""
        found: dict[str, Tensor] = {}
        for place, part in enumerate(self.parts):
            if isinstance(part, Dense):
                path = part.folder / "model.safetensors"
                try:
                    tensors = load_file(path)
                except Exception as error:
                    pass_on(error)
                    raise ModelError(f"cannot read {path}: {first_line(error)}") from error
                for key in ("weight", "bias") if part.bias else ("weight",):
                    shape = (part.outputs, part.inputs)[: 2 if key == "weight" else 1]
                    tensor = tensors.get(f"linear.{key}")
                    if tensor is None or tuple(tensor.shape) != shape:
                        raise ModelError(f"{path} holds no linear.{key} of the sizes {shape}")
                    found[f"head.layers.{place}.0.{key}"] = tensor
        return found


class _Head(nn.Module):
    def __init__(self, spec: SentenceHead) -> None:
        super().__init__()
        self.poolings = [POOLINGS[name] for name in spec.poolings]
        self.layers = nn.ModuleList(map(_layer, spec.parts))

    def forward(self, tokens_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        mask_BS1 = mask_BS.unsqueeze(-1).to(tokens_BSH.dtype)
        pooled = [pool(tokens_BSH, mask_BS1) for pool in self.poolings]
        x = pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)
        for layer in self.layers:
            x = layer(x)
        return x


def _layer(part: Dense | str) -> nn.Module:
    if not isinstance(part, Dense):
        return _Normalize()
    with torch.device("meta"):  # no numbers are drawn
        linear = nn.Linear(part.inputs, part.outputs, part.bias)
    for name, parameter in list(linear.named_parameters()):
        empty = torch.zeros(()).expand(parameter.shape)
        setattr(linear, name, nn.Parameter(empty, requires_grad=False))
    return nn.Sequential(linear, _ACTIVATIONS[part.activation]())


class _Normalize(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True)
        return x_BD / length.clamp(min=1e-12)


def read_head(folder: Path | None) -> SentenceHead | None:
    """What stands behind the model of a folder; None where it is no embedder of sentences.

    Raises UnsupportedError, naming it, for a part that is not known, ModelError for a damaged file.
    """
    if folder is None or not (folder / MODULES).is_file():
        return None
    listed = _read(folder / MODULES)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ModelError(f"{folder / MODULES} lists no modules")
    poolings: tuple[str, ...] = ()
    parts: list[Dense | str] = []
    for place, entry in enumerate(listed):
        kind = str(entry.get("type")).rpartition(".")[2]
        path = folder / str(entry.get("path") or "")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ModelError(
                f"{folder / MODULES} names {entry.get('path')!r}, outside of the folder"
            )
        if kind == "Transformer" and place == 0 and path == folder:
            continue
        if kind == "Pooling" and place == 1:
            poolings = _poolings(path / "config.json")
        elif kind == "Dense" and poolings:
            parts.append(_dense(path))
        elif kind == "Normalize" and poolings:
            parts.append("normalize")
        else:
            raise UnsupportedError(
                f"{folder / MODULES}: einfold compiles a Transformer, Pooling behind it, then Dense and "
                f"Normalize, and not {kind} at place {place}"
            )
    if not poolings:
        raise UnsupportedError(f"{folder / MODULES} lists no Pooling, so there is no embedding")
    settings = _table_if_there(folder / "sentence_bert_config.json")
    longest = settings.get("max_seq_length")
    notes = []
    if settings.get("do_lower_case"):
        notes.append("texts are taken as they are, not in lower case as the folder asks for")
    prompt = _table_if_there(folder / "config_sentence_transformers.json").get(
        "default_prompt_name"
    )
    if prompt:
        notes.append(f"texts are taken as they are, without the prompt {prompt!r} in front")
    return SentenceHead(
        poolings, tuple(parts), longest if isinstance(longest, int) else None, tuple(notes)
    )


def _table_if_there(path: Path) -> dict[str, Any]:
    return _table(path) if path.is_file() else {}


def _poolings(path: Path) -> tuple[str, ...]:
    options = _table(path)
    chosen = {
        key.removeprefix("pooling_mode_"): True
        for key, value in options.items()
        if key.startswith("pooling_mode_") and value is True
    }
    mode = options.get("pooling_mode")
    named = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else []
    names = {_SPELLED.get(str(name), str(name)) for name in (*chosen, *named)}
    unknown = sorted(names - POOLINGS.keys())
    if unknown or not names:
        raise UnsupportedError(
            f"{path}: pooling by {', '.join(unknown) or 'nothing'} is not compiled; einfold knows "
            f"{', '.join(POOLINGS)}"
        )
    return tuple(name for name in POOLINGS if name in names)


def _dense(folder: Path) -> Dense:
    options = _table(folder / "config.json")
    activation = str(options.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{folder}/config.json: the activation {activation} is none of {', '.join(_ACTIVATIONS)}"
        )
    sizes = [options.get("in_features"), options.get("out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(f"{folder}/config.json gives no in_features and out_features")
    return Dense(folder, sizes[0], sizes[1], options.get("bias", True) is True, activation)  # type: ignore[arg-type]


def _table(path: Path) -> dict[str, Any]:
    found = _read(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no table")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        pass_on(error)
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
