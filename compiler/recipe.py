"""A recipe: every knob of a compile, read from TOML, with unknown keys refused."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..errors import RecipeError, first_line, pass_on
from .ir.quant.scheme import PRESETS, Preset, Scheme
from .passes.base import Pass, check_options
from .passes.cache_methods import FAMILIES, method_pass, read_method, resolved
from .passes.kv_prune.native_window import NativeWindow
from .passes.kv_quant.half_slots import HalfSlots
from .passes.kv_quant.static_int8 import StaticInt8
from .passes.weight_quant.explicit_zeros import ExplicitZeros
from .passes.weight_quant.quantize_weights import QuantizeWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Bytes of a recipe file, and characters of one that a message quotes.
_LARGEST, _SHOWN = 1 << 20, 200


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Choices:
    """The names that a key takes, from a room that may grow."""

    names: Callable[[], Iterable[str]]


class WeightsSection(_Section):
    """How weights are stored."""

    format: Annotated[str, Choices(lambda: PRESETS)] = "fp32"
    block: int = 32
    """Weights that share a scale, along the input axis."""
    symmetric: bool = True
    """Whether the range of the codes is centred on zero; otherwise each scale has a zero point beside it."""
    head: Annotated[str, Choices(lambda: ("same", *_for_heads()))] = "int8"
    """Storage of the output head, and of an embedding that shares its weight, in int formats."""
    embedding: bool = True
    """Whether embeddings that stand alone are quantized too."""

    @field_validator("format", "head")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        name = str(info.field_name)
        (choices,) = (c for c in cls.model_fields[name].metadata if isinstance(c, Choices))
        if value not in choices.names():
            known = ", ".join(choices.names())
            raise ValueError(f"weights.{name} is one of {known}, not {value[:_SHOWN]!r}")
        return value

    @property
    def preset(self) -> Preset:
        """What the format stands for."""
        return PRESETS.find(self.format)

    def passes(self, portable: bool) -> list[Pass]:
        """The passes that these choices stand for. Raises RecipeError for options that no weight can have."""
        scheme = self._scheme(self.format)
        if scheme is None:
            return []
        head = None if self.head == "same" else self._scheme(self.head)
        found: list[Pass] = [QuantizeWeights(scheme, head, embedding=self.embedding)]
        if portable and scheme.operators:
            found.append(ExplicitZeros())  # standard operators know no implied zero point
        return found

    def _scheme(self, name: str) -> Scheme | None:
        scheme, options = (
            PRESETS.find(name).scheme,
            {"block": self.block, "symmetric": self.symmetric},
        )
        if scheme is None:
            return None
        check_options("weights", lambda: scheme.adapted(**options))
        return scheme.adapted(**options)


def _for_heads() -> list[str]:
    """Formats that a head may have by itself."""
    return [
        name for name, p in PRESETS.items() if p.scheme is not None and not p.scheme.nearly_exact
    ]


class CacheSection(_Section):
    """How the KV cache is stored."""

    storage: Literal["f32", "f16", "int8"] = "f32"
    """Of tokens that are not packed. int8: a fixed scale a channel, from the calibration text."""
    window_slack: int = Field(default=512, ge=0)
    """Layers with a sliding window of their own keep it and so many tokens more; 0: they keep everything."""
    share: dict[str, Any] | None = None
    """A method by which layers share, or channels shrink, and its options."""
    prune: dict[str, Any] | None = None
    """A method that keeps fewer tokens, and its options."""
    quant: dict[str, Any] | None = None
    """A method that packs tokens into few bits, and its options."""

    @field_validator(*FAMILIES, mode="before")
    @classmethod
    def _spelled_out(cls, value: Any, info: ValidationInfo) -> Any:
        """A text stands for a table, see `read_method`; every option is written out."""
        family = str(info.field_name)
        if isinstance(value, str):
            value = read_method(family, value)
        return resolved(family, value) if isinstance(value, dict) else value

    def passes(self) -> list[Pass]:
        """The passes that these choices stand for: what costs nothing, then the families in their order."""
        chosen = [(family, getattr(self, family)) for family in FAMILIES]
        found = [method_pass(family, table) for family, table in chosen if table is not None]
        stored: dict[str, list[Pass]] = {"f32": [], "f16": [HalfSlots()], "int8": [StaticInt8()]}
        return [NativeWindow(self.window_slack), *found, *stored[self.storage]]


class CalibrationSection(_Section):
    """The text that methods measure a model on before they decide."""

    text: Path | None = None
    """A UTF-8 file; a short built-in text where it is not given."""
    tokens: int = Field(default=2048, ge=256)


class OnnxSection(_Section):
    """Code generation for ONNX."""

    portable: bool = False
    accuracy_level: Literal[0, 1, 4] = 4
    """MatMulNBits: 4 multiplies in int8, 0 and 1 in float32 (slower, exact)."""


class TritonSection(_Section):
    """Code generation for Triton."""

    cubins: tuple[Literal["sm_80", "sm_90", "sm_100"], ...] = ()
    """GPUs to compile the kernels for ahead of time; loading uses these only where it is told to trust."""


class Recipe(_Section):
    """The resolved recipe goes into the artifact's manifest as it is."""

    target: Literal["onnx", "triton", "reference"] = "onnx"
    """reference: graph and weights alone, run in torch by the meaning of the operators."""
    context: int | None = Field(default=None, ge=2)
    """Tokens of context to compile for; the model's own limit where it is not given."""
    weights: WeightsSection = WeightsSection()
    cache: CacheSection = CacheSection()
    calibration: CalibrationSection = CalibrationSection()
    onnx: OnnxSection = OnnxSection()
    triton: TritonSection = TritonSection()

    @model_validator(mode="after")
    def _options_fit_target(self) -> Recipe:
        if self.target != "onnx" and self.onnx.portable:
            raise ValueError("portable is for the target onnx; leave it out")
        if self.target != "triton" and self.triton.cubins:
            raise ValueError("cubins are for the target triton; add --target triton")
        return self

    @model_validator(mode="after")
    def _cache_fits_flavour(self) -> Recipe:
        if self.target == "onnx" and self.cache.storage == "f16":
            raise ValueError(
                "cache.storage f16: onnxruntime's operators for the CPU compute in float32 and would widen "
                "all of a float16 cache at every step; take cache.storage int8, or compile for the target "
                "triton or reference"
            )
        if self.onnx.portable and self.cache.storage != "f32":
            raise ValueError(
                "the portable flavour has no operator that reads an int8 cache, it could only widen "
                "all of it at every step; use cache.storage f32, or the default flavour"
            )
        return self

    @model_validator(mode="after")
    def _packed_cache_has_a_reader(self) -> Recipe:
        if self.cache.quant is None:
            return self
        method = self.cache.quant["method"]
        if self.cache.storage == "int8":
            raise ValueError(
                f"cache.storage {self.cache.storage} and cache.quant {method} both say how tokens are "
                "stored; leave one of them out"
            )
        if self.target == "onnx":
            raise ValueError(
                f"cache.quant {method}: onnxruntime has no operator that reads packed tokens, it could "
                "only widen all of the cache at every step; compile for the target triton or reference, "
                "or take cache.storage int8"
            )
        return self

    @model_validator(mode="after")
    def _shared_cache_has_a_reader(self) -> Recipe:
        method = None if self.cache.share is None else self.cache.share["method"]
        if self.target == "onnx" and method in ("minicache", "cskv"):
            raise ValueError(
                f"cache.share {method}: the target onnx has no operator that reads what it stores, it could "
                f"only widen all of the cache at every step; leave out cache.share (--share {method}), "
                "compile for the target triton or reference, or take cross_layer"
            )
        return self

    @staticmethod
    def read(path: Path) -> Recipe:
        """Reads a TOML file. Raises RecipeError naming the key that is unknown or wrong."""
        return Recipe.build(Recipe.load(path), str(path))

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """What a TOML file holds, unchecked."""
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise RecipeError(f"the recipe {path} is no regular file")
            if found.st_size > _LARGEST:
                raise RecipeError(
                    f"the recipe {path} holds {found.st_size:,} bytes; a recipe has {_LARGEST:,} at most"
                )
            data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe file {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            pass_on(error)
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        except RecursionError:
            raise RecipeError(f"{path} is nested too deeply to be a recipe") from None
        except ValueError as error:  # no TOML, or a number of thousands of digits
            raise RecipeError(f"{path} is not valid TOML: {first_line(error)[:_SHOWN]}") from error
        return data

    @staticmethod
    def build(data: dict[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from plain data; raises RecipeError as `read` does."""
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))[:_SHOWN]
            given = repr(first.get("input"))[:_SHOWN]
            if first["type"] == "extra_forbidden":
                raise RecipeError(f"{where} has an unknown key {key!r}") from error
            if first["type"] in ("model_type", "dict_type"):
                raise RecipeError(f"{where}: {key} is a table, [{key}], not {given}") from error
            if first["type"] == "value_error":
                raise RecipeError(f"{where}: {first['ctx']['error']}") from error
            raise RecipeError(f"{where}: {key}: {first['msg']}, found {given}") from error

    def weight_passes(self) -> list[Pass]:
        """The passes over weights that this recipe asks for."""
        return self.weights.passes(self.onnx.portable)

    def cache_passes(self) -> list[Pass]:
        """The passes that refine the cache layout."""
        return self.cache.passes()

    def asked(self) -> frozenset[str]:
        """Names of the passes that a person chose, which must find something to do."""
        of_itself = (NativeWindow, ExplicitZeros)
        passes = (*self.weight_passes(), *self.cache_passes())
        return frozenset(step.name for step in passes if not isinstance(step, of_itself))
