"""Encoders: models of transformers that read all of their input at once and give tensors.

BERT and its kin, embedders of sentences, image classifiers: what AutoModel or one of its task classes builds,
of tokens or of an image, that neither writes text over a cache nor reads what another encoder made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from transformers.models.auto import modeling_auto

from ...errors import RecipeError, UnsupportedError
from ..ir.manifest import TensorEntry
from ..ir.program import ModelInfo, Program
from .export import export, import_or_refuse, named_weights, tied_names
from .huggingface import ModelSource, context_limit
from .modules import output_names
from .sentence import SentenceHead
from .structure import structure

#: The classes of transformers that build encoders, by the table of what each builds for a type of model.
_TASKS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

#: What encoders are given beside tokens or an image.
_MASK, _KINDS = "attention_mask", "token_type_ids"


@dataclass(frozen=True)
class Encoder:
    """How transformers builds an encoder, and what stands behind it."""

    auto: str
    """The class that builds it, of those called Auto in transformers; "" for a module in memory."""
    model_class: Any
    head: SentenceHead | None = None
    """What makes one embedding of a text, where the folder is that of an embedder of sentences."""

    @property
    def builder(self) -> Any:
        return getattr(transformers, self.auto)

    def takes(self, name: str) -> bool:
        """Whether the model has an argument of this name."""
        return name in inspect.signature(self.model_class.forward).parameters

    def inputs(self, config: Any) -> tuple[TensorEntry, ...]:
        """What a call gives: tokens [B, S], their mask and, where there are several, kinds; or an image."""
        if self.model_class.main_input_name == "pixel_values":
            size = getattr(config, "image_size", None)
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            channels = getattr(config, "num_channels", 3)
            shape = ("B", *(str(int(part or 0)) for part in (channels, height, width)))
            return (TensorEntry(name="pixel_values", dtype="f32", shape=shape),)
        below = {
            "input_ids": int(config.vocab_size),
            _MASK: 2 if self.takes(_MASK) else 0,
            _KINDS: int(getattr(config, "type_vocab_size", 0) or 0) if self.takes(_KINDS) else 0,
        }
        return tuple(
            TensorEntry(name=name, dtype="i64", shape=("B", "S"), below=count)
            for name, count in below.items()
            if count > 1 or name == "input_ids"
        )

    def whole(self, model: Any, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model as a function of its inputs by name, that gives tensors by name; with a `state` what
        stands behind the model has its weights."""
        head = None if self.head is None else self.head.build()
        fixed = {"use_cache": False} if self.takes("use_cache") else {}
        whole = _Whole(model, head, fixed).eval()
        if head is not None and state is not None:
            for name, parameter in head.named_parameters():
                parameter.data = state[f"head.{name}"].float()
        return whole


class _Whole(nn.Module):
    def __init__(self, model: Any, head: nn.Module | None, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.head, self.fixed = model, head, fixed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        result = self.model(**inputs, **self.fixed, return_dict=True)
        if self.head is None:
            return {name: value for name, value in result.items() if isinstance(value, Tensor)}
        tokens = result.last_hidden_state
        mask = torch.ones_like(tokens[..., 0]) if attention_mask is None else attention_mask
        return {"sentence_embedding": self.head(tokens, mask)}


def find_encoder(
    source: ModelSource, config: Any, architectures: list[str], head: SentenceHead | None = None
) -> Encoder | None:
    """The encoder that a config and its named architectures are of; None for a causal language model.

    Raises UnsupportedError, with what is missing, for what is neither.
    """
    kind = config.model_type
    causal = _names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", kind)
    bidirectional = not causal or bool(_names("MODEL_FOR_MASKED_LM_MAPPING_NAMES", kind))
    if set(architectures) & causal:
        return None
    _refuse_several(source, config, architectures)
    auto = "AutoModel" if head is not None else _auto(kind, architectures)
    if not bidirectional and (auto in ("", "AutoModel")):
        return None
    if not auto and _names("MODEL_MAPPING_NAMES", kind):
        if not architectures:
            auto = "AutoModel"
        else:
            known = sorted(set().union(*(_names(table, kind) for table in _TASKS.values())))
            raise UnsupportedError(
                f"{source.location}: {architectures[0]} is a head that einfold does not compile; of "
                f"{kind!r} it compiles {', '.join(known)} (architectures in config.json says which)"
            )
    if not auto:
        return None  # the road of causal language models says what is wrong
    found = Encoder(auto, _class(getattr(transformers, auto), config, architectures), head)
    _refuse_input(source, found.model_class)
    return found


def encoder_of(source: ModelSource, model: Any) -> Encoder | None:
    """The same for a model in memory."""
    name = type(model).__name__
    if find_encoder(source, model.config, [name]) is None:
        return None
    return Encoder("", type(model))


def _names(table: str, kind: str) -> set[str]:
    found = getattr(modeling_auto, table).get(kind, ())
    return {found} if isinstance(found, str) else set(found)


def _auto(kind: str, architectures: list[str]) -> str:
    for auto, table in _TASKS.items():
        if set(architectures) & _names(table, kind):
            return auto
    return ""


def _class(auto: Any, config: Any, architectures: list[str]) -> Any:
    found = auto._model_mapping[type(config)]
    if not isinstance(found, (list, tuple)):
        return found
    return next((each for each in found if each.__name__ in architectures), found[0])


def _refuse_several(source: ModelSource, config: Any, architectures: list[str]) -> None:
    """Raises UnsupportedError for a model of text and images (or sound, or film) together."""
    names = architectures or sorted(_names("MODEL_MAPPING_NAMES", config.model_type))
    model_class = next((getattr(transformers, name, None) for name in names), None)
    modalities = getattr(model_class, "input_modalities", ())
    if isinstance(modalities, str) or len(modalities) < 2:
        return
    raise UnsupportedError(
        f"{source.location}: {names[0]} reads {' and '.join(sorted(modalities))} together; einfold compiles "
        "encoders of one input, and of models that write about images their text part"
    )


def _refuse_input(source: ModelSource, model_class: Any) -> None:
    main = getattr(model_class, "main_input_name", "input_ids")
    if main not in ("input_ids", "pixel_values"):
        raise UnsupportedError(
            f"{source.location}: {model_class.__name__} reads {main}; einfold compiles encoders of tokens "
            "(input_ids) and of images (pixel_values)"
        )


def capture_encoder(
    source: ModelSource,
    config: Any,
    encoder: Encoder,
    context: int | None = None,
    state: Mapping[str, Tensor] | None = None,
    module: Any = None,
) -> Program:
    """The model as a program of its `Encoder.inputs`, in float32; `state` and `module` are as for language
    models. `context` bounds the tokens of a text, at most as many as the model has positions for.

    Raises RecipeError for a context that it has not, UnsupportedError for what cannot be traced.
    """
    skeleton = structure(source, config, state, module, encoder.auto)
    entries = encoder.inputs(config)
    reads_tokens = entries[0].name == "input_ids"
    limit = _limit(source, config, encoder, skeleton, context) if reads_tokens else 0
    return capture_reader(source, config, encoder.whole(skeleton), skeleton, entries, limit, state)


def capture_reader(
    source: ModelSource,
    config: Any,
    whole: nn.Module,
    skeleton: Any,
    entries: tuple[TensorEntry, ...],
    limit: int,
    state: Mapping[str, Tensor] | None,
) -> Program:
    """A module of a skeleton's that reads all of its `entries` at once, as a program; a text has `limit`
    tokens at most, 0 where there is no limit or no text."""
    sizes = {"B": torch.export.Dim("B"), "S": torch.export.Dim("S", max=limit or None)}
    dims = {
        entry.name: {axis: sizes[size] for axis, size in enumerate(entry.shape) if size in sizes}
        for entry in entries
    }
    given = {entry.name: _example(entry) for entry in entries}
    exported = export(whole, (), dims, source.location, given)
    without_what_is_dead(exported.graph)
    shapes = {
        entry.name: tuple(int(size) if size.isdecimal() else size for size in entry.shape)
        for entry in entries
    }
    info = ModelInfo(
        architecture=str(config.model_type),
        vocabulary=entries[0].below,
        context=limit,
        hidden=int(getattr(config, "hidden_size", 0) or 0),
    )
    program = import_or_refuse(
        source.location,
        exported,
        info,
        first_names(whole),
        named_weights(source, skeleton, exported, state),
        shapes,
        output_names(exported, source.location, set(shapes), None),
    )
    _check_rows(program, source)
    return program


def first_names(whole: nn.Module) -> Callable[[str], str]:
    """Gives the name of a weight in a module around a model: that in the model, of a tied one the first."""
    first = tied_names(whole)
    return lambda name: str(first.get(name, name)).removeprefix("model.")


def without_what_is_dead(graph: fx.Graph) -> None:
    """Weights that nothing reads need not be there. What torch asserts of sizes holds: they are in range."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _limit(
    source: ModelSource, config: Any, encoder: Encoder, skeleton: Any, wanted: int | None
) -> int:
    """Tokens that a text may have. A table with a row for padding (RoBERTa's) numbers tokens behind it."""
    limit = context_limit(config) or 0
    for part in skeleton.modules():
        if isinstance(part, nn.Embedding) and part.num_embeddings == limit and part.padding_idx:
            limit -= part.padding_idx + 1
            break
    if encoder.head is not None and encoder.head.longest:
        limit = min(limit or encoder.head.longest, encoder.head.longest)
    if wanted is not None and limit and wanted > limit:
        raise RecipeError(
            f"context {wanted} is longer than the {limit} tokens that {source.location} was made for"
        )
    return wanted or limit or DEFAULT_CONTEXT


#: Tokens of a text for an encoder whose config names no limit.
DEFAULT_CONTEXT = 2048


def _example(entry: TensorEntry) -> Tensor:
    """A value to trace with: two rows of tokens, the second with padding behind it."""
    shape = [{"B": 2, "S": 7}.get(size) or int(size) for size in entry.shape]
    if entry.dtype == "f32":
        return torch.zeros(shape)
    if entry.name != _MASK:
        return torch.zeros(shape, dtype=torch.long)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def _check_rows(program: Program, source: ModelSource) -> None:
    """Raises UnsupportedError for a result that is not of the rows of a batch."""
    try:
        result_entries(program)
    except ValueError as error:
        raise UnsupportedError(
            f"{source.location}: the model gives what is not one for each row of its input: {error}"
        ) from error


def result_entries(program: Program) -> tuple[TensorEntry, ...]:
    """What the program of an encoder gives, by name."""
    values: Any = program.output.args[0]
    entries = []
    for name, value in zip(program.output_names(), values, strict=True):
        dtype, _, sizes = program.shapes.describe(value.meta["val"]).rstrip("]").partition("[")
        entries.append(TensorEntry(name=name, dtype=dtype, shape=tuple(sizes.split(", "))))
    return tuple(entries)


__all__ = [
    "Encoder",
    "capture_encoder",
    "capture_reader",
    "encoder_of",
    "find_encoder",
    "first_names",
    "result_entries",
    "without_what_is_dead",
]
