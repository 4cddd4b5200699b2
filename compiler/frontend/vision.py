"""Models of images and text: their text part is a causal language model that is given embeddings.

What turns images into embeddings stays outside: the caller runs it, and gives a table of rows [N, hidden]
with a prompt, in which token -1 - n stands for row n. So a step takes tokens alone, and the table stays the
same from step to step, as what an encoder gives its decoder does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ...errors import ModelError, UnsupportedError
from ..ir.manifest import EMBEDDINGS, TensorEntry
from .huggingface import ModelSource
from .structure import structure

#: The class of transformers that builds models of images and text.
AUTO = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class TextPart:
    """The text part of a model of images and text: what it is part of, and its own config."""

    architecture: str
    whole: Any
    """The config of the whole model, which is what is loaded."""
    config: Any

    @property
    def note(self) -> str:
        return (
            f"of {self.architecture} the text part is compiled: its images are given as embeddings, which "
            "the rest of the model makes"
        )

    def entry(self) -> TensorEntry:
        """The table of embeddings, an input beside tokens and positions."""
        shape = ("B", "S", str(int(self.config.hidden_size)))
        return TensorEntry(name=EMBEDDINGS, dtype="f32", shape=shape)

    def state(self, source: ModelSource, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the text part by its own names, of those of the whole model.

        Raises ModelError where no part of the model has them all.
        """
        skeleton = structure(source, self.config)
        names = dict(skeleton.named_parameters(remove_duplicate=False)).keys()
        base = f"{skeleton.base_model_prefix}."
        own = [name.removeprefix(base) for name in names if name.startswith(base)]
        prefixes = {key.removesuffix(own[0]) for key in whole if key.endswith(own[0])}
        for prefix in sorted(prefixes):
            if all(f"{prefix}{name}" in whole for name in own):
                found = {f"{base}{name}": whole[f"{prefix}{name}"] for name in own}
                rest = [name for name in names if name not in found]
                if all(name in whole for name in rest):
                    return found | {name: whole[name] for name in rest}
        raise ModelError(
            f"{source.location}: the weights of the text part of {self.architecture} are not found among "
            f"those of the whole, {own[0]} and others"
        )


def find_text_part(source: ModelSource, config: Any, architectures: list[str]) -> TextPart | None:
    """The text part of a model of images and text; None for another model.

    Raises UnsupportedError, with what is missing, where it is no causal language model of its own.
    """
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if name is None or (architectures and name not in architectures):
        return None
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    text = config.get_text_config()
    if text is config or text.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"{source.location}: the text part of {name} ({text.model_type}) is no causal language model by "
            "itself in transformers, as where its positions have several axes; einfold compiles what is one"
        )
    model_class = getattr(transformers, name)
    if any("token_type_ids" in each for each in inspect.signature(model_class.forward).parameters):
        raise UnsupportedError(
            f"{source.location}: in {name} the places of an image see each other, those behind them too, and "
            "einfold compiles text parts that are causal everywhere"
        )
    return TextPart(name, config, text)


class Embedded(nn.Module):
    """A causal language model as a function of tokens, positions, and rows for tokens below 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, embeddings: Tensor) -> Tensor:
        row_BS = (-1 - input_ids).clamp(min=0)
        width = embeddings.shape[-1]
        given = embeddings.gather(1, row_BS[..., None].expand(-1, -1, width))
        own = self.model.get_input_embeddings()(input_ids.clamp(min=0))
        logits: Tensor = self.model(
            inputs_embeds=torch.where((input_ids < 0)[..., None], given, own),
            position_ids=position_ids,
            use_cache=False,
        ).logits
        return logits


def no_embeddings(width: int) -> Any:
    """Gives rows of a calibration text the table that goes with them: it has no image."""
    return lambda tokens_BS: {EMBEDDINGS: torch.zeros(len(tokens_BS), 1, width)}


__all__ = ["AUTO", "Embedded", "TextPart", "find_text_part", "no_embeddings"]
