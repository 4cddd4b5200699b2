"""Bases of few directions in which a layer's keys and values are rebuilt best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import CalibrationError, IRError
from ...ir.interpreter import Interpreter
from ...ir.ops import einfold_ops
from ...ir.program import Program, attention_nodes, call_arguments, remove_dead_nodes
from ..snapshot import snapshot, text_inputs


class KVBases:
    """Bases [rank, K * D] of each layer's keys, before their rotary embedding, and values on a text.

    Holds the graph as it is when this is made; weights are loaded one at a time, and of a layer's keys and
    values only the basis is held. `errors` gets the relative error of each, by `layer N keys`.
    """

    def __init__(
        self, program: Program, ranks: Mapping[int, tuple[int, int]], errors: dict[str, float]
    ) -> None:
        self._program: Program | None = _bases_of(program, ranks)
        self._errors = errors
        self._found: dict[str, Tensor] = {}

    def run(self, tokens_BS: Tensor) -> None:
        """Reads the text once. Raises CalibrationError where it is short, or numbers are not finite."""
        assert self._program is not None
        found = Interpreter(self._program, keep_weights=False).run(text_inputs(tokens_BS))
        self._program = None  # lets go of the weights
        for name, basis in found.items():
            *_, error = name.split(" ")
            if error == "error":
                self._errors[name.removesuffix(" error")] = float(basis)
            else:
                self._found[name] = basis

    def basis(self, layer: int, part: str) -> Callable[[], Tensor]:
        """Gives the basis of a layer's "key" or "value" once the text was read."""

        def load() -> Tensor:
            if not self._found:
                raise IRError("the bases of the cache were asked for before calibration")
            return self._found[f"layer {layer} {part}s"]

        return load


def _bases_of(program: Program, ranks: Mapping[int, tuple[int, int]]) -> Program:
    cut, copies = snapshot(program)
    values: list[Any] = []
    names: list[str] = []
    for node in attention_nodes(program):
        found = call_arguments(node)
        layer = int(found["layer"])
        if layer not in ranks:
            continue
        key = found["k_BSKD"]
        if key.target is einfold_ops.rotary.default:
            key = key.args[0]
        for part, source, rank in zip(
            ("key", "value"), (key, found["v_BSKD"]), ranks[layer], strict=True
        ):
            name = f"layer {layer} {part}s"
            basis = cut.graph.call_function(best_basis, (copies[source], rank, name))
            error = cut.graph.call_function(relative_error, (copies[source], basis))
            values += [basis, error]
            names += [name, f"{name} error"]
    cut.graph.output(tuple(values)).meta["names"] = names
    remove_dead_nodes(cut)
    return cut


def best_basis(x_BSKD: Tensor, rank: int, what: str) -> Tensor:
    """The orthonormal rows [rank, K * D] that minimise |x - x @ basis.T @ basis| over all tokens.

    These are the leading right singular vectors of the tokens [T, K * D] (Eckart and Young), from the smaller
    of the two products with itself. Raises CalibrationError for numbers that are not finite, and for fewer
    tokens than features.
    """
    x_TM = x_BSKD.flatten(2).flatten(0, 1).double()
    if not bool(torch.isfinite(x_TM).all()):
        raise CalibrationError(
            f"{what} are not finite on the calibration text: "
            "the model's weights are damaged, or overflow in float32"
        )
    tokens, channels = x_TM.shape
    if tokens < rank:
        raise CalibrationError(
            f"the calibration text has {tokens} tokens, too few to find {rank} features of {what}; "
            "give a longer text, or ask for fewer features"
        )
    if tokens < channels:
        inner = torch.linalg.eigh(x_TM @ x_TM.T).eigenvectors[:, -rank:]
        basis: Tensor = torch.linalg.qr(x_TM.T @ inner).Q.T
    else:
        basis = torch.linalg.eigh(x_TM.T @ x_TM).eigenvectors[:, -rank:].T
    return basis.float().contiguous()


def relative_error(x_BSKD: Tensor, basis_RM: Tensor) -> Tensor:
    """|x - x @ basis.T @ basis| / |x|, a number."""
    x = x_BSKD.flatten(2)
    error: Tensor = (x - x @ basis_RM.T @ basis_RM).norm() / x.norm()
    return error
