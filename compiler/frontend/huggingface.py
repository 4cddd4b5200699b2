"""Loading Hugging Face models, with every way in which a folder can be bad told apart."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import peft
from transformers.models.auto import auto_factory
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from ...errors import ModelError, UnsupportedError, first_line, pass_on
from ..ir.mapped import read_again
from .gguf_file import is_gguf
from .hub import unreachable


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder, a GGUF, a repository of the Hugging Face hub, or memory."""

    name: str
    folder: Path | None
    in_memory: bool = False
    file: Path | None = None
    """The GGUF that holds all of it; `folder` is then None."""
    unreachable: str = ""
    """Why the hub cannot be asked, for an id of it: then only what was downloaded before is looked at."""

    @property
    def local_only(self) -> bool:
        """Whether nothing may be asked of the network."""
        return self.folder is not None or self.file is not None or bool(self.unreachable)

    @property
    def location(self) -> str:
        return str(self.folder or self.file or self.name)


def find_model(name: str | Path) -> ModelSource:
    """A local folder if there is one, or a GGUF; else a hub id of the form owner/name.

    Raises ModelError for a path that does not exist, another file, or a folder without config.json.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ of a user who has no home
        path = Path(name)
    if path.is_dir():
        if not any(path.iterdir()):
            raise ModelError(
                f"the model folder {path} is empty; it should hold config.json and *.safetensors"
            )
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the model folder {path} has no config.json; is it a Hugging Face model folder?"
            )
        return ModelSource(str(name), path)
    if path.is_file() and is_gguf(path):
        return ModelSource(str(name), None, file=path)
    if path.exists():
        raise ModelError(
            f"{path} is a file and no GGUF; give the folder that holds config.json and *.safetensors"
        )
    text = str(name)
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~", "/")):
        return ModelSource(text, None, unreachable=unreachable())
    raise ModelError(
        f"there is no model folder {path}; give an existing folder, or a hub id such as owner/name"
    )


def read_config(source: ModelSource) -> Any:
    """The model's configuration; no weight is read and no code of the model's runs."""
    quiet()
    try:
        return AutoConfig.from_pretrained(
            source.location, trust_remote_code=False, local_files_only=source.local_only
        )
    except json.JSONDecodeError as error:
        raise ModelError(f"{source.location}/config.json is not valid JSON: {error}") from error
    except Exception as error:
        pass_on(error)
        raise _config_error(source, error) from error


def quiet() -> None:
    """Keeps transformers' own messages and progress bars off the screen; einfold says what matters."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def _config_error(source: ModelSource, error: Exception) -> Exception:
    first = first_line(error)
    if source.unreachable:
        return ModelError(
            f"there is no folder {source.name}, and if it is an id of the Hugging Face hub: that cannot be "
            f"asked ({source.unreachable}), and this model was not downloaded before; give a model folder"
        )
    if source.folder is None:
        return ModelError(
            f"there is no folder {source.name}, and the Hugging Face hub gives no such model: {first}"
        )
    try:
        raw = json.loads((source.folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as reason:
        pass_on(reason)
        return ModelError(f"{source.folder}/config.json cannot be read as JSON: {reason}")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind is None:
        return ModelError(
            f"{source.folder}/config.json names no model_type, so the architecture is unknown"
        )
    return UnsupportedError(f"{source.folder}: architecture {kind!r} cannot be loaded: {first}")


def check_weight_files(source: ModelSource) -> None:
    """Checks every safetensors file of a folder for truncation before anything large is read."""
    if source.folder is None:
        return
    files = sorted(source.folder.glob("*.safetensors"))
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged: {error}") from error
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ModelError(
                f"{source.folder} lacks the weight file {missing[0]} that its index names"
            )
    if not files:
        other = [
            p.name for p in source.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        ]
        hint = (
            f" (found {other[0]}: pickled weights can run code, convert them first)"
            if other
            else ""
        )
        raise ModelError(f"{source.folder} holds no *.safetensors weights{hint}")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ModelError(f"{file} is not a safetensors file, or is cut off in its header")
            text = stream.read(length)
    except OSError as error:  # a folder, a link to nowhere, a file of somebody else's
        pass_on(error)
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    try:
        header = json.loads(text)
        ends = [
            int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"the header of {file} is damaged: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"{file} is {size:,} bytes, but its header says {expected:,}: the file is truncated or damaged"
        )


def load_state(
    source: ModelSource,
    config: Any,
    auto: str = "AutoModelForCausalLM",
    left_out: list[str] | None = None,
) -> dict[str, Tensor]:
    """All parameters and persistent buffers by name, in the dtype in which they are stored; those that are
    tied are one tensor.

    `auto` is the class of transformers that loads them. With a list `left_out` the model may be a part of
    what the checkpoint is of: the list is told of weights that it does not read, and those that the
    checkpoint lacks are left out.

    Loads through `from_pretrained`, so that checkpoint layouts that transformers converts (merged
    experts, renamed keys) come out right. Raises ModelError where a weight is missing or has another
    shape than the config says.
    """
    check_weight_files(source)
    if source.folder is not None:
        read_again(source.folder.glob("*.safetensors"))
    quiet()
    try:
        with _without_adapters():
            model, info = getattr(transformers, auto).from_pretrained(
                source.location,
                config=config,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=source.local_only,
                low_cpu_mem_usage=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        pass_on(error)
        if getattr(config, "quantization_config", None):
            raise _quantized(source, config) from error
        raise ModelError(
            f"cannot load the weights of {source.location}: {first_line(error)}"
        ) from error
    mismatched = sorted(info.get("mismatched_keys") or [])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{source.location}: weight {name} is {list(found)}, but config.json asks for {list(expected)}"
            + (f" ({len(mismatched) - 1} more like it)" if len(mismatched) > 1 else "")
        )
    missing = sorted(info.get("missing_keys") or [])
    if missing and left_out is None:
        raise ModelError(
            f"{source.location}: the checkpoint lacks {len(missing)} weights that config.json asks for, "
            f"{missing[0]} among them"
        )
    unread = sorted(info.get("unexpected_keys") or [])
    if left_out is not None:
        left_out += unread
    elif unread:
        raise ModelError(
            f"{source.location}: the checkpoint holds {len(unread)} weights that {type(model).__name__} does "
            f"not read, {unread[0]} among them: it is of another model than config.json says"
        )
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True)
    state.update(
        {name: persistent[name] for name, _ in model.named_buffers() if name in persistent}
    )
    check_unquantized(source, config, dict(model.named_parameters()))
    return {name: tensor for name, tensor in state.items() if name not in missing}


def check_unquantized(source: ModelSource, config: Any, state: Mapping[str, Tensor]) -> None:
    """Raises UnsupportedError for weights that are codes: they are no numbers without their scales."""
    if getattr(config, "quantization_config", None) and any(
        tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for tensor in state.values()
    ):
        raise _quantized(source, config)


def _quantized(source: ModelSource, config: Any) -> UnsupportedError:
    found = config.quantization_config
    told = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    method = getattr(told.get("quant_method"), "value", told.get("quant_method")) or "unknown"
    return UnsupportedError(
        f"{source.location} is quantized already (by {method}); einfold rounds weights itself and wants the "
        "checkpoint in float32, float16 or bfloat16 that this one was made from. Where transformers can load "
        "it, from_pretrained(..).dequantize() gives a model that save_pretrained(..) writes as one"
    )


@contextmanager
def _without_adapters() -> Iterator[None]:
    """Where peft is installed, transformers loads an adapter that lies beside a model, and renames the
    weights that it changes; here the caller merges it. transformers has no argument for that."""
    asked = {place: place.is_peft_available for place in (auto_factory, peft)}
    for place in asked:
        place.is_peft_available = lambda: False
    try:
        yield
    finally:
        for place, former in asked.items():
            place.is_peft_available = former


def load_reference(source: ModelSource) -> Any:
    """The original model in float32, as transformers runs it; what einfold is compared with."""
    check_weight_files(source)
    quiet()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=source.local_only,
        )
    except Exception as error:
        pass_on(error)
        raise ModelError(f"cannot load {source.location}: {first_line(error)}") from error
    return model.eval()


def routes_attention(config: Any) -> bool:
    """Whether transformers says that the architecture's attention can be replaced by a hook."""
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return False
    return bool(getattr(model_class, "_supports_attention_backend", False))


def context_limit(config: Any) -> int | None:
    """The longest context that the model was made for, in tokens; None where its config names none."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
