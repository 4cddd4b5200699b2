"""How much a model loses by the rounding of each of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.nn import functional

from ..calibrate import sites
from ..calibrate.observer import Observer
from ..calibrate.sites import Site
from ..ir.program import Program
from ..ir.quant.scheme import Scheme
from ..solve.round_to_nearest import RoundToNearest

#: Rows of the text, and tokens of each.
ROWS, TOKENS = 2, 64


@dataclass
class Sensitivity(Observer):
    """Reads one text as often as there are weights, and once more, side by side in one batch: in each copy
    one of the weights is rounded to nearest, in the first none.

    At the site of each weight: `errors` [F], the squared error of the weight in each of its `schemes`, each
    column's times the mean square of its inputs. At the head: `kl` [W], KL(original || one weight rounded, as
    the first of its schemes says) in nats a token, of the weights in their order.

    Other rounding loses more or less as its error is larger or smaller, and what all lose together is about
    the sum of what each does: so Hubara et al. 2020 (section 4), who measure each layer alone too.
    """

    schemes: Mapping[str, Sequence[Scheme]]
    tokens_BS: Tensor
    origin: str

    name = "sensitivity"

    @property
    def key(self) -> str:
        said = [f"{name} {scheme}" for name, each in self.schemes.items() for scheme in each]
        return f"{self.name}-{blake3(repr(said).encode()).hexdigest()[:16]}"

    def sample(self, program: Program) -> tuple[Tensor, str]:
        copies = self.tokens_BS.repeat(1 + len(self.schemes), 1)
        return copies, f"{self.tokens_BS.numel()} tokens of {self.origin}"

    def sites(self, program: Program) -> list[Site]:
        products = sites.weight_products(program)
        return [site for site in products[:-1] if site.name in self.schemes] + products[-1:]

    def begin(self, site: Site, *values: Any) -> None:
        self._site = site

    def product(
        self, read: bool, x: Tensor, weight_NM: Tensor, bias_N: Tensor | None = None
    ) -> Tensor:
        name, x = self._site.name, x.unflatten(0, (1 + len(self.schemes), -1))
        if name not in self.schemes:
            self._seen = {"kl": self._losses(x, weight_NM, bias_N)}
            return x.new_empty(0)
        importance_M = x[0].flatten(0, -2).square().mean(0)
        copy = 1 + list(self.schemes).index(name)
        out, errors = functional.linear(x, weight_NM, bias_N), list[float]()
        for scheme in self.schemes[name]:
            pieces = RoundToNearest().solve(weight_NM, scheme, {}).pieces
            stored = scheme.dequantize(pieces, weight_NM.shape[1])
            if not errors:
                out[copy] = functional.linear(x[copy], stored, bias_N)
            errors.append(float((stored - weight_NM).square_().sum(0) @ importance_M))
        self._seen = {"errors": torch.tensor(errors, dtype=torch.float64)}
        return out.flatten(0, 1)

    def _losses(self, x: Tensor, weight_NM: Tensor, bias_N: Tensor | None) -> Tensor:
        def said(rows: Tensor) -> Tensor:
            return torch.log_softmax(functional.linear(rows, weight_NM, bias_N), -1)

        original = said(x[0])
        share = original.exp()
        each = [(share * (original - said(rows))).sum(-1).mean() for rows in x[1:]]
        return torch.stack(each).double()
