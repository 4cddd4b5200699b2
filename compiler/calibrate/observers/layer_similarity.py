"""How alike the layers' keys and values are, and how far the model moves when one layer reads another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ....errors import CalibrationError
from ...ir.interpreter import Interpreter
from ...ir.ops import einfold_ops
from ...ir.program import Program, attention_nodes, call_arguments, remove_dead_nodes
from ..snapshot import snapshot, text_inputs

#: The arguments of `einfold::attention` that hold keys and values.
_KEY, _VALUE = 1, 2


class LayerSimilarity:
    """Measures a model on rows of text, by its graph as it is now.

    Weights are loaded one at a time. Of each layer's keys and values only the mean over the rows is held
    [S, K, D], and of the model's last hidden states those of the whole model.
    """

    def __init__(self, program: Program, tokens_BS: Tensor) -> None:
        self._program = program
        self._inputs = text_inputs(tokens_BS)
        self._whole: Tensor | None = None

    def distances(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """Euclidean distance of two layers' keys, and of their values, averaged over both.

        Of the means over the rows of text, keys as they are cached (rotated): KVSharer, section 3.1.
        Raises CalibrationError where keys or values are not finite.
        """
        means = self._means()
        return {
            (i, j): sum(
                float((means[f"{i}.{part}"] - means[f"{j}.{part}"]).norm()) / 2
                for part in ("key", "value")
            )
            for i, j in pairs
        }

    def closeness(self, owners: Mapping[int, int]) -> float:
        """Mean cosine similarity of the last hidden states when layer j reads what layer owners[j] caches."""
        if self._whole is None:
            self._whole = self._hidden({})
        return float(torch.cosine_similarity(self._whole, self._hidden(owners), dim=-1).mean())

    def _means(self) -> dict[str, Tensor]:
        cut, copies = snapshot(self._program)
        values, names = [], []
        for node in attention_nodes(self._program):
            found = call_arguments(node)
            for part, source in (("key", "k_BSKD"), ("value", "v_BSKD")):
                values.append(cut.graph.call_function(torch.mean, (copies[found[source]], 0)))
                names.append(f"{found['layer']}.{part}")
        means = _results(cut, values, names, self._inputs)
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                layer, part = name.split(".")
                raise CalibrationError(
                    f"the {part}s of layer {layer} are not finite on the calibration text: "
                    "the model's weights are damaged, or overflow in float32"
                )
        return means

    def _hidden(self, owners: Mapping[int, int]) -> Tensor:
        """What the head of the model sees, [B, S, M]."""
        cut, copies = snapshot(self._program)
        read_other_layers(cut, owners)
        rows = next(iter(self._program.nodes(einfold_ops.select_rows.default)), None)
        last = rows.args[0] if rows is not None else self._program.output.args[0][0]  # type: ignore[index]
        return _results(cut, [copies[last]], ["hidden"], self._inputs)["hidden"]  # type: ignore[index]


def read_other_layers(program: Program, owners: Mapping[int, int]) -> None:
    """Has the attention of layer j attend over the keys and values of layer owners[j]."""
    nodes = {int(call_arguments(node)["layer"]): node for node in attention_nodes(program)}
    for reader, owner in owners.items():
        found = call_arguments(nodes[owner])
        nodes[reader].update_arg(_KEY, found["k_BSKD"])
        nodes[reader].update_arg(_VALUE, found["v_BSKD"])


def _results(
    cut: Program, values: list[fx.Node], names: list[str], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    cut.graph.output(tuple(values)).meta["names"] = names
    remove_dead_nodes(cut)
    return Interpreter(cut, keep_weights=False).run(inputs)
