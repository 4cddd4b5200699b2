"""Weights in integers of several widths, so many bits on average."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod

from ...errors import IRError, RecipeError
from ..calibrate.sites import Site, weight_products
from ..calibrate.text import first_rows
from ..ir.program import Program
from ..ir.quant.schemes.grouped import BITS, Grouped
from .allocation import Form, allocate
from .sensitivity import ROWS, TOKENS, Sensitivity


@dataclass(frozen=True)
class Mix:
    """Chooses a width for the weight of each linear, so that all take `bpw` bits a weight at most, scales and
    zero points too, and the model loses little. Widths are in bits.

    What each loses is measured (`Sensitivity`). Without weights (`estimate`) all are taken to lose alike: the
    bytes are about the same.

    Source: Layer-wise Calibration and Integer Programming (Hubara et al. 2020, section 4). Different from it:
    one width of each weight is measured, and others follow from its error; the program is solved to within
    one step, greedily.
    """

    bpw: float
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        for width in self.widths:
            if width not in BITS:
                known = ", ".join(map(str, BITS))
                raise IRError(f"widths are some of {known} bits, joined by +, not {width}")

    def schemes(self, scheme: Grouped) -> tuple[Grouped, ...]:
        """A scheme in each of the widths."""
        return tuple(replace(scheme, bits=width) for width in self.widths)

    def chosen(
        self, program: Program, scheme: Grouped, left: Collection[str]
    ) -> dict[str, Grouped]:
        """The scheme of each weight by its name; of the last linear's, of tables that tokens are embedded by
        and of those that are `left` apart, none.

        Raises RecipeError where not even the smallest widths are so few bits, and CalibrationError where
        the text is too short.
        """
        sites = [
            site
            for site in weight_products(program)[:-1]
            if not site.embeds and site.name not in left
        ]
        if not sites:
            return {}
        shapes = {site.name: tuple(program.weights[site.name].shape) for site in sites}
        every = self.schemes(scheme)
        losses = self._losses(program, scheme, sites)
        forms = {
            name: [
                Form(form.nbytes(shape), loss)
                for form, loss in zip(every, losses[name], strict=True)
            ]
            for name, shape in shapes.items()
        }
        total = sum(map(prod, shapes.values()))
        try:
            places = allocate(forms, int(self.bpw * total / 8))
        except IRError:
            least = sum(min(each.nbytes for each in known) for known in forms.values())
            raise RecipeError(
                f"weights.bpw is {self.bpw:g} bits a weight, and {8 * least / total:.2f} are the least, with "
                f"scales and zero points, that widths of {'+'.join(map(str, self.widths))} bits take here"
            ) from None
        return {name: every[place] for name, place in places.items()}

    def _losses(
        self, program: Program, scheme: Grouped, sites: Sequence[Site]
    ) -> dict[str, list[float]]:
        """What the model loses by each width of each weight."""
        if program.statistics is None:
            alike = [0.25**width for width in self.widths]
            sizes = {site.name: prod(program.weights[site.name].shape) for site in sites}
            return {name: [size * loss for loss in alike] for name, size in sizes.items()}
        text, origin = program.statistics.text()
        few = first_rows(text, ROWS, TOKENS, "a mix of widths")
        every = tuple(dict.fromkeys((scheme, *self.schemes(scheme))))
        names = [site.name for site in sites]
        seen = Sensitivity(dict.fromkeys(names, every), few, origin)
        found = program.statistics.of(program, seen)
        (kl,) = (each["kl"] for each in found.values() if "kl" in each)
        losses = {}
        for name, loss in zip(names, kl.clamp(min=0).tolist(), strict=True):
            errors = dict(zip(every, found[name]["errors"].tolist(), strict=True))
            first = errors[scheme]
            others = [errors[each] for each in self.schemes(scheme)]
            losses[name] = [loss * error / first if first else 0.0 for error in others]
        return losses
