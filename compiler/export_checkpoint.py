"""Writes a model, its weights in codes, as a checkpoint in the format compressed-tensors (pack-quantized).

The recipe's solver runs over the model as a compile would run it, but for linears that read the same input:
they stay apart, as other readers of a checkpoint have them. Rows do not depend on one another in any of the
schemes that are written, so the codes are those of an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, RecipeError, UnsupportedError
from .artifact import check_output, staged
from .codegen.target import Progress
from .driver import Input, calibrate, captured, load_weights, settled
from .frontend import tokens
from .frontend.coded_groups import pack_words
from .ir.interrupts import tracing
from .ir.ops import einfold_ops
from .ir.program import Program, call_arguments
from .ir.quant.pack import unpack_bits
from .ir.quant.schemes.grouped import Grouped
from .ir.weights import Weight, WeightStore, derive
from .ir.weights_file import write_weights
from .passes.base import Pass
from .passes.cleanup.simplify import Simplify
from .passes.weight_methods import AUTO
from .passes.weight_quant.quantize_weights import QuantizeWeights
from .pipeline import PassManager, raising_passes
from .recipe import Recipe

WEIGHTS = "model.safetensors"


@dataclass
class ExportReport:
    """What was written."""

    folder: Path
    weights: dict[str, str]
    """How each weight that is in codes is stored."""
    nbytes: int
    """Of all weights."""
    notes: list[str] = field(default_factory=list)


@tracing()
def export_checkpoint(
    model: Input, out: Path, recipe: Recipe, force: bool = False, progress: Progress | None = None
) -> ExportReport:
    """Writes the folder `out`: config.json, model.safetensors and the tokenizer.

    Linears that the recipe stores in groups of integers are packed, but for a head that is the embedding too;
    all other weights are written as the model has them. Raises UnsupportedError for a model or a scheme that
    the format does not hold, and RecipeError where the recipe stores no weight so.
    """
    check_output(out, force)
    if model.kind != "causal_lm" or model.part is not None or model.config is None:
        raise UnsupportedError(
            f"{model.source.location} is no causal language model by itself: only those are written as a "
            "checkpoint in codes"
        )
    linears, recipe = _linears(model.structure()), settled(recipe, model)
    _check_recipe(model, recipe, linears)
    tell = progress or (lambda text, share: None)
    tell("loading weights", 0.0)
    load_weights(model)
    assert model.state is not None
    tell("tracing the model", 0.0)
    ((program, _),) = captured(model, _for_others(recipe))
    passes = _passes(model, _for_others(recipe))
    PassManager(passes, progress=lambda n, at, total: tell(f"pass {n}", at / total)).run(program)
    if program.calibrations:
        tell("calibrating", 0.0)
        calibrate(model, program, recipe)
    report = ExportReport(out, {}, 0, list(model.notes))
    store, schemes = WeightStore(), dict[str, Grouped]()
    for module, scheme, pieces in _packed(program, report.notes):
        if module not in linears:
            report.notes.append(f"{module} is written as it came: it is no linear, or shared")
            continue
        schemes[module] = scheme
        _add(store, module, scheme, pieces)
    if not schemes:
        raise RecipeError(
            f"{model.source.location} has no linear that is stored in groups of integers, so nothing is left "
            "to export in codes"
        )
    _add_rest(store, model.state, schemes)
    report.nbytes, report.weights = store.nbytes, {m: str(s) for m, s in schemes.items()}
    with staged(out, force) as folder:
        write_weights(
            store, folder / WEIGHTS, lambda n, at, total: tell("writing weights", at / total)
        )
        _write_config(model, folder, schemes)
        if model.generation is not None:
            model.generation.save_pretrained(folder)
        tokens.save_tokenizer(model.source, model.tokenizer, folder)
    tell("done", 1.0)
    return report


def _check_recipe(model: Input, recipe: Recipe, linears: Mapping[str, int]) -> None:
    """Refuses what is certain to be in vain, before a weight is read."""
    scheme = recipe.weights.scheme
    if scheme is not None and scheme.operators.get("linear") != "quantized_linear":
        raise UnsupportedError(
            f"weights in the scheme {scheme} are not written: pack-quantized holds integers in groups, and "
            "2, 4 and 8 bits with scales in float32 are written"
        )
    if recipe.weights.rotate not in (None, False, AUTO):
        raise UnsupportedError(
            "weights.rotate turns what weights read and write, and a checkpoint's own model would read it as "
            "it was; leave it out"
        )
    block = scheme.block if isinstance(scheme, Grouped) else 1
    for module, width in linears.items():
        if width % block:
            raise UnsupportedError(
                f"{module} has {width} inputs, which blocks of {block} do not divide: compressed-tensors has "
                "no short group; take a block that divides them (weights.block)"
            )
    if scheme is None and not (model.schemes and recipe.weights.keep):
        raise RecipeError(
            f"the recipe stores no linear of {model.source.location} in groups of integers, so there is "
            "nothing to export in codes; ask for weights such as int4"
        )


def _for_others(recipe: Recipe) -> Recipe:
    """Other readers have no embedding in codes, and add up in layers what they always did."""
    weights = recipe.weights.model_copy(update={"embedding": False, "rotate": False})
    return recipe.model_copy(update={"weights": weights})


def _passes(model: Input, recipe: Recipe) -> list[Pass]:
    chosen = recipe.weight_passes(model.schemes)
    ours = [
        # Norms are written as they came.
        replace(step, divide=False) if isinstance(step, QuantizeWeights) else step
        for step in chosen
        if step.name != "explicit_zeros"
    ]
    return [*raising_passes(), *ours, Simplify()]


def _linears(model: nn.Module) -> dict[str, int]:
    """Linears that share their weight with nothing, with their inputs."""
    readers: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        readers[id(parameter)] = readers.get(id(parameter), 0) + 1
    return {
        name: module.in_features
        for name, module in _all_linears(model).items()
        if readers[id(module.weight)] == 1
    }


def _packed(program: Program, notes: list[str]) -> list[tuple[str, Grouped, list[Weight]]]:
    """(module, scheme, pieces) of each weight in groups of integers."""
    found = []
    for node in program.nodes(einfold_ops.quantized_linear.default):
        told = call_arguments(node)
        scheme = Grouped(told["bits"], told["block"], told["zeros"] is None)
        reads: list[fx.Node] = [told[name] for name in scheme.pieces((1, 1))]
        module = str(reads[0].target).removesuffix(".packed")
        found.append((module, scheme, [program.weights[str(read.target)] for read in reads]))
    for kind in ("stored_linear", "quantized_experts", "dequantize"):
        for node in program.nodes(getattr(einfold_ops, kind).default):
            told = call_arguments(node)
            if "scheme" in told:
                raise UnsupportedError(
                    f"weights in the scheme {told['scheme']} are not written: pack-quantized holds integers "
                    "in groups"
                )
            notes.append(
                "experts are written as they came: the format has them as linears one by one"
            )
    return found


def _add(store: WeightStore, module: str, scheme: Grouped, pieces: list[Weight]) -> None:
    """The tensors of one weight. Its codes are the same numbers, its scales the same floats."""
    packed, scales, *zeros = pieces
    rows, groups = scales.shape
    width, bits = groups * scheme.block, scheme.bits

    def codes() -> tuple[Tensor]:
        return (pack_words(unpack_bits(packed.load().flatten(-2), bits, width), bits),)

    def middle() -> tuple[Tensor]:
        return (pack_words(unpack_bits(zeros[0].load(), bits, groups).T, bits).T.contiguous(),)

    words = -(-width * bits // 32), -(-rows * bits // 32)
    store.add(f"{module}.weight_packed", derive([((rows, words[0]), torch.int32)], codes)[0])
    store.add(f"{module}.weight_scale", scales)
    store.add(f"{module}.weight_shape", Weight.of(torch.tensor([rows, width])))
    if zeros:
        name = f"{module}.weight_zero_point"
        store.add(name, derive([((words[1], groups), torch.int32)], middle)[0])


def _add_rest(
    store: WeightStore, state: Mapping[str, Tensor | Weight], schemes: Mapping[str, Grouped]
) -> None:
    """All other weights, those that are tied once."""
    written: set[int] = set()
    for name, data in state.items():
        if name.removesuffix(".weight") in schemes or id(data) in written:
            continue
        written.add(id(data))
        store.add(name, data if isinstance(data, Weight) else Weight.of(data))


def _write_config(model: Input, folder: Path, schemes: Mapping[str, Grouped]) -> None:
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, kind in enumerate(kinds):
        names = [name for name, scheme in schemes.items() if scheme == kind]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": kind.symmetric,
                "strategy": "group",
                "group_size": kind.block,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model.source.location}: its config cannot be written: {error}"
        ) from error
    rest = [name for name in _all_linears(model.structure()) if name not in schemes]
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": rest,
    }
    path.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def _all_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
