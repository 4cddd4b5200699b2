"""train_retaining: the heads that tell which tokens stay are trained for this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ....errors import RecipeError
from ...calibrate.observers.retaining import RetainingHeads, site_of
from ...calibrate.statistics import digest_of
from ...ir.kv.keep.retained import Retained
from ...ir.kv.layout import LayerCache
from ...ir.program import Program, attention_nodes, call_arguments
from ...ir.weights import Weight
from ..base import Pass, PassResult
from ..cache.retaining import PARTS, name_of
from ..from_artifact import weights_of

#: Of heads that were not trained: sizes alone count then.
_UNTRAINED = "untrained"


@dataclass(frozen=True)
class TrainRetaining(Pass):
    """Trains the heads of layers whose tokens stay by what such heads say, or takes them from an artifact.

    Before: `cache 0.0 heads=0,1 .. policy=retained(..)`
    After:  the same, and the weights `cache.0.retaining_inner.MARK`, `.._bias.MARK` and `.._outer.MARK`,
    which `attach_cache` puts into the graph

    The mark is a hash of the model's weights. Heads of another model are refused by it.
    """

    name = "train_retaining"
    requires = frozenset({"cache planned"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        layers = _retaining(program)
        if not layers:
            return result
        sizes = _sizes(program, layers)
        policy = next(iter(layers.values()))[1]
        if program.statistics is None:
            result.skipped("heads", "without weights they are not trained; only sizes count")
            found, mark = _zeros(sizes), _UNTRAINED
        else:
            # Their names and numbers as they are here: what passes before did to them counts.
            mark = digest_of({n: program.weights[n] for n in program.weights})[:12]
            if policy.heads:
                found = _taken(Path(policy.heads), sizes, mark)
            else:
                found = _trained(program, layers, policy)
        for number, (layer, _) in layers.items():
            for part in PARTS:
                program.cache_weights[name_of(number, part, mark)] = Weight.of(found[number][part])
            nbytes = sum(found[number][part].nbytes for part in PARTS)
            origin = f"from {policy.heads}" if policy.heads else _learned(found[number])
            result.applied(
                f"layer {number}", f"{layer.kv_heads} retaining heads, {origin}", -nbytes
            )
        return result


#: The layers with trained heads, each with a policy of its groups, which have the same options of training.
_Layers = Mapping[int, tuple[LayerCache, Retained]]

#: The shapes of each layer's weights by their parts.
_Sizes = Mapping[int, Mapping[str, tuple[int, ...]]]

#: The weights of each layer by their parts.
_Heads = Mapping[int, Mapping[str, Tensor]]


def _retaining(program: Program) -> _Layers:
    found = {}
    for layer, _, group in () if program.layout is None else program.layout.groups():
        if isinstance(group.policy, Retained) and group.owner is None:
            found[layer.layer] = layer, group.policy
    return found


def _sizes(program: Program, layers: _Layers) -> _Sizes:
    """The shape of each weight."""
    sizes: dict[int, dict[str, tuple[int, ...]]] = {}
    for given in map(call_arguments, attention_nodes(program)):
        number = int(given["layer"])
        if number in layers:
            layer, policy = layers[number]
            shapes = [given[x].meta["val"].shape for x in ("q_BSHD", "k_BSKD", "v_BSKD")]
            channels = sum(int(shape[2]) * int(shape[3]) for shape in shapes)
            hidden = policy.hidden
            sizes[number] = {
                "inner": (hidden, channels),
                "bias": (hidden,),
                "outer": (layer.kv_heads, hidden),
            }
    return sizes


def _zeros(sizes: _Sizes) -> _Heads:
    return {
        number: {part: torch.zeros(shape) for part, shape in each.items()}
        for number, each in sizes.items()
    }


def _trained(program: Program, layers: _Layers, policy: Retained) -> _Heads:
    observer = RetainingHeads(
        tuple(layers), policy.hidden, policy.smooth, policy.steps, policy.read
    )
    found = program.statistics.of(program, observer)
    return {number: found[site_of(number)] for number in layers}


def _learned(found: Mapping[str, Tensor]) -> str:
    if "told" not in found:
        return "not trained"
    return (
        f"which tell {float(found['told']):.0%} of the variance of tokens they did not learn from"
    )


def _taken(artifact: Path, sizes: _Sizes, mark: str) -> _Heads:
    """The heads of an artifact. Raises RecipeError where they are of another model, or none."""
    where = f"cache.prune: the heads of {artifact}"
    with weights_of(artifact, where) as held:
        names = [name for name in held.keys() if ".retaining_inner." in name]  # noqa: SIM118
        if not names:
            raise RecipeError(
                f"{where} cannot be taken, for it has none; name an artifact that was compiled with "
                "--prune locret, or leave out heads, and they are trained"
            )
        marks = {name.split(".retaining_inner.")[1].split(".")[0] for name in names}
        if marks != {mark}:
            raise RecipeError(
                f"{where} were trained for another model ({', '.join(sorted(marks))}; this one is "
                f"{mark}): leave out heads, and they are trained for this one"
            )
        if any(name.endswith(".by_group") for name in names):
            raise RecipeError(
                f"{where} stand in the order of its groups of heads; name an artifact in which all heads "
                "have one budget (--prune locret)"
            )
        known = {*held.keys()}
        found = {}
        for number, shapes in sizes.items():
            wanted = {part: name_of(number, part, mark) for part in shapes}
            if not known.issuperset(wanted.values()):
                raise RecipeError(
                    f"{where} leave out layer {number}: leave out heads, and they are trained"
                )
            found[number] = {part: held.get_tensor(name) for part, name in wanted.items()}
    _check_sizes(where, found, sizes)
    return found


def _check_sizes(where: str, found: _Heads, sizes: _Sizes) -> None:
    """Raises RecipeError where heads are of another width."""
    for number, shapes in sizes.items():
        for part, shape in shapes.items():
            got = found[number][part].shape
            if got != shape:
                raise RecipeError(
                    f"{where} have {part} {[*got]} in layer {number}, where hidden={shapes['bias'][0]} makes "
                    f"{[*shape]}: say the hidden that they were trained with, or leave out heads"
                )
