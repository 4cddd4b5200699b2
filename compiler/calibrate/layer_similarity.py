"""How alike the layers' keys and values are, and how far the model moves when one layer reads another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir.program import Program, attention_nodes, call_arguments
from .observers.kv_means import KVMeans
from .observers.last_hidden import LastHidden
from .sites import layer
from .snapshot import copied
from .stream import stream

#: The arguments of `einfold::attention` that hold keys and values.
_KEY, _VALUE = 1, 2


class LayerSimilarity:
    """Measures a model on rows of text, by its graph as it is now.

    Weights are loaded one at a time. Of each layer's keys and values only the mean over the rows is held
    [S, K, D], and of the model's last hidden states those of the whole model.
    """

    def __init__(self, program: Program, tokens_BS: Tensor) -> None:
        self._program = program
        self._tokens = tokens_BS
        self._whole: Tensor | None = None

    def distances(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        """Euclidean distance of two layers' keys, and of their values, averaged over both.

        Of the means over the rows of text, keys as they are cached (rotated): KVSharer, section 3.1.
        Raises CalibrationError where keys or values are not finite.
        """
        found = stream(self._program, self._tokens, [KVMeans()])

        def apart(i: int, j: int, part: str) -> float:
            a, b = (found[f"{layer(each)}.{part}"]["mean"] for each in (i, j))
            return float((a - b).norm())

        return {(i, j): (apart(i, j, "key") + apart(i, j, "value")) / 2 for i, j in pairs}

    def closeness(self, owners: Mapping[int, int]) -> float:
        """Mean cosine similarity of the last hidden states when layer j reads what layer owners[j] caches."""
        if self._whole is None:
            self._whole = self._hidden({})
        return float(torch.cosine_similarity(self._whole, self._hidden(owners), dim=-1).mean())

    def _hidden(self, owners: Mapping[int, int]) -> Tensor:
        """What the head of the model sees, [B, S, M]."""
        trial = copied(self._program)
        read_other_layers(trial, owners)
        return stream(trial, self._tokens, [LastHidden()])["hidden"]["hidden"]


def read_other_layers(program: Program, owners: Mapping[int, int]) -> None:
    """Has the attention of layer j attend over the keys and values of layer owners[j]."""
    nodes = {int(call_arguments(node)["layer"]): node for node in attention_nodes(program)}
    for reader, owner in owners.items():
        found = call_arguments(nodes[owner])
        nodes[reader].update_arg(_KEY, found["k_BSKD"])
        nodes[reader].update_arg(_VALUE, found["v_BSKD"])
