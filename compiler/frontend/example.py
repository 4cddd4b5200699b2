"""The inputs that a module is traced on, and the same of other sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError


@dataclass(frozen=True)
class Example:
    """Arguments of one call. Whatever is no tensor (None, a flag, a number) is fixed in the trace."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Any, keywords: Mapping[str, Any] | None = None) -> Example:
        """From what a person gives: a tuple or list of arguments, one tensor, or a table by name."""
        named = dict(keywords or {})
        if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
            twice = sorted(named.keys() & inputs.keys())
            if twice:
                raise UnsupportedError(
                    f"the argument {twice[0]!r} is given in example_inputs and in example_kwargs"
                )
            return Example((), {**inputs, **named})
        if isinstance(inputs, (tuple, list)):
            return Example(tuple(inputs), named)
        return Example((inputs,), named)

    def leaves(self) -> list[Any]:
        """All values inside the arguments, in the order in which torch.export flattens them."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def run(self, module: nn.Module) -> Any:
        """What the module gives for a copy of these arguments, as it infers; its modes stay as they are."""
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf,
            (self.args, self.kwargs),
        )
        with inferring(module), torch.no_grad():
            return module(*args, **kwargs)

    def resized(self, sizes: Sequence[Sequence[int] | None]) -> Example:
        """The same with tensors of other sizes, filled by going through their rows again from the second on.

        `sizes` holds a shape for each leaf, None for one that stays as it is.
        """
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        new = [
            leaf if shape is None else _resize(leaf, shape)
            for leaf, shape in zip(leaves, sizes, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(new, spec)
        return Example(args, kwargs)


class inferring:
    """Puts a module into evaluation, and each of its parts back into the mode that it had."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.modes = {part: part.training for part in self.module.modules()}
        self.module.eval()

    def __exit__(self, *exception: object) -> None:
        for part, training in self.modes.items():  # the caller goes on training, perhaps
            part.training = training


def _resize(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old != new:
            rows = (torch.arange(new, device=tensor.device) + 1) % old
            tensor = tensor.index_select(axis, rows)
    return tensor


def dim_names(
    module: nn.Module, example: Example, dynamic_shapes: Any
) -> dict[int, dict[int, str]]:
    """The names that `torch.export.Dim` gives to axes: by the id of an example tensor, by axis."""
    names: dict[int, dict[int, str]] = {}
    if dynamic_shapes:
        for tensor, axes in _named(_bound(module, example), dynamic_shapes):
            names.setdefault(id(tensor), {}).update(axes)
    return names


def _bound(module: nn.Module, example: Example) -> dict[str, Any]:
    """The arguments by the names of `forward`; one of *args or **kwargs stands under its own."""
    import inspect

    try:
        bound = inspect.signature(module.forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise UnsupportedError(
            f"the example inputs do not fit {type(module).__name__}.forward: {error}"
        ) from error
    found = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(found.pop(parameter.name, {}))
    return found


def _named(value: Any, spec: Any) -> Iterator[tuple[Tensor, dict[int, str]]]:
    if isinstance(value, Tensor):
        axes = dict(spec) if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
        yield (
            value,
            {
                axis % value.dim(): dim.__name__
                for axis, dim in axes.items()
                if isinstance(getattr(dim, "__name__", None), str) and dim.__name__.isidentifier()
            },
        )
    elif isinstance(value, Mapping) and isinstance(spec, Mapping):
        for key in value.keys() & spec.keys():
            yield from _named(value[key], spec[key])
    elif isinstance(value, (Mapping, list, tuple)) and isinstance(spec, (list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
        for part, of_part in zip(parts, spec, strict=False):
            yield from _named(part, of_part)
