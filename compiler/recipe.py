"""A recipe: every knob of a compile, read from TOML, with unknown keys refused."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Callable, Iterable, Sequence
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
from pydantic_core import InitErrorDetails

from ..errors import RecipeError, first_line, pass_on
from .codegen.target import TARGETS, Target
from .ir.quant.scheme import PRESETS, Preset, Scheme
from .passes.base import Pass, check_options
from .passes.cache_methods import FAMILIES, method_pass, resolved
from .passes.kv_prune.native_window import NativeWindow
from .passes.kv_quant.half_slots import HalfSlots
from .passes.kv_quant.static_int4 import StaticInt4
from .passes.kv_quant.static_int8 import StaticInt8
from .passes.method_text import read_method
from .passes.weight_methods import (
    AUTO,
    BEST,
    WIDTHS,
    format_options,
    mix_of,
    places_of,
    read_weights,
    scheme_of,
    settled,
    solver_of,
    spelled_out,
)
from .passes.weight_quant.keep_codes import KeepCodes
from .passes.weight_quant.quantize_weights import QuantizeWeights
from .passes.weight_quant.rotate_down import RotateDown
from .passes.weight_quant.rotate_residual import RotateResidual
from .passes.weight_quant.rotate_values import RotateValues
from .passes.weight_quant.round_activations import RoundActivations
from .solve.round_to_nearest import RoundToNearest

#: Tokens that a model is calibrated on, where weights are solved and where they are not.
_SOLVED, _TRAINED, _SEEN = 16384, 4096, 2048

#: Bytes of a recipe file, and characters of one that a message quotes.
_LARGEST, _SHOWN = 1 << 20, 200


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Choices:
    """The names that a key takes, from a room that may grow."""

    names: Callable[[], Iterable[str]]


def _for_heads() -> list[str]:
    """Formats that a head may have by itself."""
    return [
        name for name, p in PRESETS.items() if p.scheme is not None and not p.scheme.nearly_exact
    ]


#: The passes that turn places, by what `rotate` calls these.
_TURNS: dict[str, Callable[[], Pass]] = {
    "residual": RotateResidual,
    "values": RotateValues,
    "down": RotateDown,
}


class WeightsSection(_Section):
    """How weights are stored.

    Beside these keys it takes the options of its format.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    format: Annotated[str, Choices(lambda: PRESETS)] = "fp32"
    head: Annotated[str, Choices(lambda: ("same", *_for_heads()))] = "int8"
    """Storage of the output head, and of an embedding that shares its weight, in formats of few bits."""
    embedding: bool = True
    """Whether embeddings that stand alone are quantized too."""
    bpw: float | None = Field(default=None, gt=0, le=32)
    """Bits a weight of linears on average, scales and zero points too, the head's apart: each has integers of
    one of the `widths`, such that the model loses little, and the format's other options. What each loses
    is measured on the calibration text."""
    widths: str = WIDTHS
    """The widths, in bits. Kernels multiply with 2, 4 and 8; 3, 5 and 6 save bytes of the file."""
    solver: dict[str, Any] | str | None = None
    """What decides the codes, and its options; weights are rounded to nearest where it is not given. "best":
    decoupleq, or gptq where groups of a format have no scales, for causal language models, through which a
    text can be read, and to nearest for all else; it is what int4 has where nothing but its name is said, and
    then blocks of 128 with zero points, the head too, and what layers add up turned where it can be."""
    activations: Literal["f32", "int8"] | None = None
    """What linears read: activations as they are, or in 8 bits with a scale for each token, so that products
    are of integers; for weights that are integers with one scale a row, as int8 and int4 with block = 0 are.
    Where it is not given int8 for qserve, f32 for all else. Head and experts read theirs as they are."""
    rotate: bool | str | None = None
    """What is turned by orthogonal matrices before weights are rounded, so that numbers that stand out are
    spread over all channels; places joined by +. residual, or true: what layers add up, of models with RMS
    norms, folded into the weights. values: those of each head, and what the output projection reads, folded
    too. down: what the down projection of an MLP reads, as the model runs. "auto": the first where it can be.
    Where nothing is said none is, but for int4 by its name alone."""
    keep: bool = True
    """Whether weights that a checkpoint brings in codes keep them where a scheme holds them, in fp32."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        """A text stands for a table, see `read_weights`; every option is written out."""
        if isinstance(data, str):
            data = read_weights(data)
        if not isinstance(data, dict):
            return data
        return spelled_out(data, cls.defaults())

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The keys that any format has."""
        return {key: field.default for key, field in cls.model_fields.items()}

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

    @property
    def options(self) -> dict[str, Any]:
        """The options of the format."""
        return self.__pydantic_extra__ or {}

    @property
    def scheme(self) -> Scheme | None:
        """The format with its options; None for weights that stay as they come."""
        return scheme_of(self.format, self.options)

    def passes(self) -> list[Pass]:
        """The passes that these choices stand for. Raises RecipeError for options that a head cannot have."""
        scheme = self.scheme
        if scheme is None:
            return []
        solver = solver_of(
            self.solver if isinstance(self.solver, dict) else {"method": RoundToNearest.name}
        )
        mix = mix_of(self.model_dump(), scheme)
        ahead = [_TURNS[place]() for place in places_of(self.rotate)]
        behind: list[Pass] = [RoundActivations()] if self.activations == "int8" else []
        store = QuantizeWeights(scheme, self._head(), solver, self.embedding, mix=mix)
        return [*ahead, store, *behind]

    def _head(self) -> Scheme | None:
        """The head's own scheme, with those of the options that its format takes: int8 stays in 8 bits."""
        if self.head == "same":
            return None
        scheme = PRESETS.find(self.head).scheme
        assert scheme is not None
        taken = format_options(self.head)
        own = {key: value for key, value in self.options.items() if key in taken}
        check_options("weights", lambda: scheme.adapted(**own))
        return scheme.adapted(**own)


class CacheSection(_Section):
    """How the KV cache is stored."""

    storage: Literal["f32", "f16", "int8", "int4"] = "f32"
    """Of tokens that are not packed. int8 and int4: a fixed scale a channel, from the calibration text."""
    window_slack: int = Field(default=512, ge=0)
    """Layers with a sliding window of their own keep it and so many tokens more; 0: they keep everything."""
    share: dict[str, Any] | None = None
    """A method by which layers share, or channels shrink, and its options."""
    prune: dict[str, Any] | None = None
    """A method that keeps fewer tokens, and its options."""
    quant: dict[str, Any] | None = None
    """A method that packs tokens into few bits, and its options."""
    read: dict[str, Any] | None = None
    """A method by which a query reads few of the tokens that are kept, and its options."""

    @field_validator(*FAMILIES, mode="before")
    @classmethod
    def _spelled_out(cls, value: Any, info: ValidationInfo) -> Any:
        """A text stands for a table, see `read_method`; every option is written out."""
        family = str(info.field_name)
        if isinstance(value, str):
            value = read_method(f"cache.{family}", value)
        return resolved(family, value) if isinstance(value, dict) else value

    def passes(self) -> list[Pass]:
        """The passes that these choices stand for: what costs nothing, then the families in their order."""
        chosen = [(family, getattr(self, family)) for family in FAMILIES]
        found = [method_pass(family, table) for family, table in chosen if table is not None]
        stored: dict[str, list[Pass]] = {
            "f32": [],
            "f16": [HalfSlots()],
            "int8": [StaticInt8()],
            "int4": [StaticInt4()],
        }
        return [NativeWindow(self.window_slack), *found, *stored[self.storage]]


class CalibrationSection(_Section):
    """The text that methods measure a model on before they decide."""

    text: Path | None = None
    """A UTF-8 file. Where it is not given, solvers of weights and `matryoshka_kv` read what the model writes
    itself, all else a short built-in text."""
    tokens: int | None = Field(default=None, ge=256)
    """About so many. Where it is not given 2,048, 4,096 for `matryoshka_kv`, and 16,384 where weights are
    solved."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the text that the model writes itself: another one, another text."""


class Recipe(_Section):
    """The resolved recipe goes into the artifact's manifest as it is.

    Beside these keys each target may have a table of its own, such as `[onnx]`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    target: str = "onnx"
    """What to generate."""
    context: int | None = Field(default=None, ge=2)
    """Tokens of context to compile for; the model's own limit where it is not given."""
    weights: WeightsSection = WeightsSection()
    cache: CacheSection = CacheSection()
    calibration: CalibrationSection = CalibrationSection()

    @model_validator(mode="before")
    @classmethod
    def _tables_of_targets(cls, data: Any) -> Any:
        """Each target reads its own table; a key that nobody knows is refused."""
        if not isinstance(data, dict):
            return data
        found, wrong = dict(data), list[InitErrorDetails]()
        for name in data.keys() - cls.model_fields.keys() - TARGETS.keys():
            wrong.append({"type": "extra_forbidden", "loc": (name,), "input": data[name]})
        for name, kind in TARGETS.items():
            if not (kind.model_fields or name in data):
                continue
            try:
                found[name] = kind.model_validate(data.get(name, {}))
            except ValidationError as error:
                wrong += [
                    {
                        "type": item["type"],
                        "loc": (name, *item["loc"]),
                        "input": item["input"],
                        "ctx": item.get("ctx", {}),
                    }
                    for item in error.errors()
                ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return found

    @field_validator("target")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TARGETS:
            raise ValueError(f"target is one of {', '.join(TARGETS)}, not {value[:_SHOWN]!r}")
        return value

    @property
    def made_for(self) -> Target:
        """The target, with the options of its table."""
        found: Target = self.tables().get(self.target) or TARGETS[self.target]()
        return found

    def tables(self) -> dict[str, Target]:
        """The tables of targets that have one, by name."""
        return self.__pydantic_extra__ or {}

    @model_validator(mode="after")
    def _tables_fit_target(self) -> Recipe:
        for name, table in self.tables().items():
            if name != self.target and table.misplaced():
                raise ValueError(table.misplaced())
        return self

    @model_validator(mode="after")
    def _one_storage(self) -> Recipe:
        if self.cache.quant is not None and self.cache.storage in ("int8", "int4"):
            raise ValueError(
                f"cache.storage {self.cache.storage} and cache.quant {self.cache.quant['method']} both say "
                "how tokens are stored; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _bounds_fit_the_slots(self) -> Recipe:
        """Statistics of pages are numbers of the type of the slots, which holds no half of a byte."""
        readers = [getattr(step, "reader", None) for step in self.cache_passes()]
        bounded = [reader for reader in readers if reader is not None and reader.bounded]
        if bounded and self.cache.storage == "int4":
            raise ValueError(
                f"cache.read {bounded[0].name} keeps statistics of pages in the type of the slots, and those "
                "of cache.storage int4 hold two numbers in a byte; take int8, or leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _values_turned_once(self) -> Recipe:
        """Twice by a matrix that is its own inverse would be not at all."""
        if "values" not in places_of(self.weights.rotate):
            return self
        for step in self.cache_passes():
            parts = getattr(getattr(step, "storage", None), "rotated", ())
            if "value" in parts:
                left = "keys" if "key" in parts else "none"
                raise ValueError(
                    f"{self._place(step.name)} turns values as the model runs, and weights.rotate has them "
                    f"turned already, for nothing; take rotate={left} there"
                )
        return self

    @model_validator(mode="after")
    def _target_takes_the_cache(self) -> Recipe:
        """What a method stores or reads is refused here already, before a model is read."""
        for step in self.cache_passes():
            storage, reader = getattr(step, "storage", None), getattr(step, "reader", None)
            reason = "" if storage is None else self.made_for.refuses(storage)
            reason = reason or ("" if reader is None else self.made_for.cannot_read(reader))
            if reason:
                raise ValueError(f"{self._place(step.name)}: {reason}")
        return self

    def _place(self, name: str) -> str:
        """Where the recipe asks for the cache's pass of a name."""
        for family in FAMILIES:
            if name == (getattr(self.cache, family) or {}).get("method"):
                return f"cache.{family} {name}"
        return f"cache.storage {self.cache.storage}"

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

    def settled(self, reads: bool, width: int = 0) -> Recipe:
        """The recipe for a model through which a text can be read, or not, and whose states have a `width`, 0
        where it is not known: with no solver "best"."""
        if self.weights.solver != BEST:
            return self
        table = settled(
            self.weights.model_dump(),
            WeightsSection.defaults(),
            reads,
            self.made_for.zero_points,
            width,
        )
        return self.model_copy(update={"weights": WeightsSection.model_validate(table)})

    def weight_passes(self, stored: Sequence[Scheme] = ()) -> list[Pass]:
        """The passes over weights that this recipe asks for; `stored` are schemes that weights come in."""
        passes = self.weights.passes()
        if passes or not (stored and self.weights.keep):
            return [*passes, *self._for_target()]
        needed = [each for scheme in stored for each in self.made_for.weight_passes(scheme)]
        return [KeepCodes(), *dict.fromkeys(needed)]

    def _for_target(self) -> list[Pass]:
        """What the target needs of the weights."""
        return self.made_for.weight_passes(self.weights.scheme)

    def remarks(self) -> list[str]:
        """What the target says of the weights' schemes."""
        steps = [step for step in self.weight_passes() if isinstance(step, QuantizeWeights)]
        schemes = {scheme: None for step in steps for scheme in step.schemes()}
        if self.weights.activations == "int8":  # but for a head integers are multiplied as they are
            heads = [step.head or step.scheme for step in steps]
            schemes = {each: None for each in schemes if each in heads or not each.integer_rows}
        return [said for scheme in schemes if (said := self.made_for.remark(scheme))]

    @property
    def solver(self) -> str:
        """The solver that reads a text, by name; "" where there is none."""
        observing = (s.solver for s in self.weights.passes() if isinstance(s, QuantizeWeights))
        return next((solver.name for solver in observing if solver.reads), "")

    @property
    def reads_text(self) -> str:
        """What of the weights' choices reads a text, in words; "" where nothing does."""
        mixed = "a mix of widths (bpw)" if self.weights.bpw is not None else ""
        return f"the solver {self.solver}" if self.solver else mixed

    @property
    def trains(self) -> bool:
        """Whether a method for the cache trains on a text."""
        return any(step.trained for step in self.cache_passes())

    @property
    def calibration_tokens(self) -> int:
        """Tokens to calibrate on, roughly."""
        chosen = _SOLVED if self.solver else _TRAINED if self.trains else _SEEN
        return self.calibration.tokens or chosen

    def cache_passes(self) -> list[Pass]:
        """The passes that refine the cache layout."""
        return self.cache.passes()

    def asked(self) -> frozenset[str]:
        """Names of the passes that a person chose, which must find something to do."""
        of_itself = (NativeWindow, *map(type, self._for_target()))
        if self.weights.rotate == AUTO:
            of_itself = (*of_itself, RotateResidual, RotateValues, RotateDown)
        passes = (*self.weight_passes(), *self.cache_passes())
        return frozenset(step.name for step in passes if not isinstance(step, of_itself))
