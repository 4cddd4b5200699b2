"""What an observer is: a statistic of the values that pass named sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..ir.program import Program
from ..ir.registry import Registry
from . import sites
from .sites import Site

#: What is found at a site, by name.
Found = Mapping[str, Tensor]


class Observer:
    """Base of all observers. It is shown one site after the other; its fields are its options."""

    name: ClassVar[str]

    @property
    def key(self) -> str:
        """Under which what it found is kept: the name, and the options that it depends on."""
        return self.name

    def sample(self, program: Program) -> tuple[Tensor, str] | None:
        """The tokens [rows, tokens] that it wants to see, and what they are; None: the calibration text."""
        return None

    def reading(self, tokens_BS: Tensor, context: int) -> Tensor:
        """The calibration text as it wants to see it; an observer of a sample of its own is not asked."""
        return tokens_BS

    def sites(self, program: Program) -> list[Site]:
        """Where it looks: at the attention of every layer, unless it says otherwise."""
        return sites.attention(program)

    def see(self, site: Site, *values: Any) -> Found:
        """What it finds in the values of a site. Who looks at attention weights too has the three below."""
        raise NotImplementedError

    def begin(self, site: Site, *values: Any) -> None:
        """A site and its values; of a product all that the call is given, once for each part of the text."""
        self._seen = self.see(site, *values)

    def block(self, start: int, weights_BHST: Tensor) -> None:
        """Attention weights of the queries from `start` on over all tokens, where the site is attention."""

    def narrows(self, site: Site) -> bool:
        """Whether it wants to hold something else in the place of the first argument of a site's product,
        where nothing else reads it."""
        return False

    def narrow(self, site: Site, *arguments: Any) -> Tensor:
        """What that is, until the product is asked for: once for each part in their order, as soon as it is
        there and before the site begins."""
        raise NotImplementedError

    def product(self, read: bool, *arguments: Any) -> Tensor:
        """What the call gives of its arguments, where the site is a product, once for each part in their
        order; nothing [0] where nobody will `read` it."""
        raise NotImplementedError

    def end(self) -> Found:
        """What was found at the site."""
        return self._seen


OBSERVERS: Registry[type[Observer]] = Registry("observer", "einfold.compiler.calibrate.observers")
