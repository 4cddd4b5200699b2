"""Bases of few directions in which a layer's keys and values are rebuilt best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....errors import CalibrationError
from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
@dataclass
class KVBases(Observer):
    """`basis` [rank, K * D] of the keys of each layer, before their rotary embedding, and of its values; and
    the relative `error` of what they rebuild.

    `ranks` by the names of the sites, `layer-N.key` and `layer-N.value`.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)

    name = "kv_bases"

    def sites(self, program: Program) -> list[Site]:
        found = sites.keys_and_values(program, rotated=False)
        return [site for site in found if site.name in self.ranks]

    def see(self, site: Site, *values: Any) -> Found:
        x_BSKD = values[0]
        ((what, _),) = site.values
        basis = best_basis(x_BSKD, self.ranks[site.name], what)
        return {"basis": basis, "error": relative_error(x_BSKD, basis)}


def best_basis(x_BSKD: Tensor, rank: int, what: str) -> Tensor:
    """The orthonormal rows [rank, K * D] that minimise |x - x @ basis.T @ basis| over all tokens.

    These are the leading right singular vectors of the tokens [T, K * D] (Eckart and Young), from the smaller
    of the two products with itself. Raises CalibrationError for fewer tokens than features.
    """
    x_TM = x_BSKD.flatten(2).flatten(0, 1).double()
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
