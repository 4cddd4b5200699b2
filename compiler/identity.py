"""A name for what a model in memory computes, under which another process finds what was made of it.

It goes by the weights, by every module with its plain attributes, and by the code that a `forward` can
reach: functions with their constants, defaults and closures, and the globals that they name, through modules
as well. torch, numpy and Python's own library are as their versions say, but for functions that somebody put
in the place of theirs and the model's own code calls; of transformers the files of its models are read, for
people replace functions there. Where something counts that cannot be read (a hook, a `forward` of one
instance's own, an import within a function, an object of an unknown kind) the model has no name.
"""

from __future__ import annotations

import dis
import enum
import functools
import logging
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import pass_on
from .calibrate.statistics import digest_of
from .frontend.original import STAND_INS

#: Packages whose code is as their versions say, and those of which objects count by their class.
_KNOWN = frozenset({"torch", "numpy"}) | sys.stdlib_module_names
_LENIENT = _KNOWN | {"transformers", "huggingface_hub"}

_PLAIN: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type(None),
    type(...),
    type(NotImplemented),
)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)
_DATA = (*_PLAIN, list, tuple, dict, set)
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_BY_REPR = (re.Pattern, types.GenericAlias, types.UnionType)

#: Attributes of a module that are said otherwise, or never traced.
_TOLD = {"_parameters", "_buffers", "_modules", "generation_config", "_compiled_call_impl"}
_TOLD |= {"name_or_path"}

#: Entries of a class that decide nothing; and keys of a config that say where a model is from, and which of
#: the implementations that einfold replaces it calls.
_IDLE = {
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__dict__",
    "__weakref__",
    "__doc__",
}
_IDLE |= {"__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__"}
_IDLE |= {"__parameters__", "__orig_bases__", "__module__", "__qualname__"}
_ORIGIN = {"_name_or_path", "_commit_hash", "transformers_version"}
_ORIGIN |= {"_attn_implementation", "_experts_implementation"}


@functools.cache
def versions(*folders: Path) -> list[str]:
    """Versions of what compiles, and a hash of the code in folders, which changes between versions."""
    digest = blake3()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    told = [metadata.version(name) for name in ("einfold", "torch", "transformers")]
    return [*told, digest.hexdigest()]


class _UnreadableError(Exception):
    """What cannot be told by text."""


def identity(model: Any, numbers: bool = True) -> str | None:
    """The model's name, the same in every process with these versions; None where it has none.

    Without `numbers` parameters count by their shapes: what is traced of the model is the same for all.
    """
    if not isinstance(model, nn.Module):
        return None
    hooked = ("_global_forward_hooks", "_global_forward_pre_hooks")
    if any(getattr(nn.modules.module, name, None) for name in hooked):
        return None
    try:
        return _Reader(model, numbers).name()
    except Exception as error:  # a config or a tensor of somebody's own may raise anything
        pass_on(error)
        return None


class _Reader:
    def __init__(self, model: nn.Module, counts: bool) -> None:
        self.model = model
        self.counts = counts
        self.parts = {id(part): name for name, part in model.named_modules()}
        self.tensors: dict[int, str] = {}
        self.digest = blake3()
        self.numbers: dict[int, int] = {}
        """Of the functions, classes and configs that were met, which `met` keeps alive."""
        self.met: list[Any] = []
        self.left: list[Callable[[], None]] = []

    def name(self) -> str:
        self._say(sys.version_info[:2], digest_of(self._weights()))
        for name, part in self.model.named_modules(remove_duplicate=False):
            self._say("module", name, self.parts[id(part)])
            if self.parts[id(part)] == name:
                self._module(part)
        while self.left:
            self.left.pop()()
        return self.digest.hexdigest()

    def _say(self, *words: Any) -> None:
        self.digest.update(f"{words!r}\n".encode())

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their first names; says which are one tensor."""
        found = {}
        named = (self.model.named_parameters, self.model.named_buffers)
        for name, tensor in (pair for each in named for pair in each(remove_duplicate=False)):
            first = self.tensors.setdefault(id(tensor), name)
            self._say("tensor", name, first)
            if first != name:
                continue
            if self.counts or not isinstance(tensor, nn.Parameter):
                found[name] = _checked(tensor)
            else:
                self._say(_checked(tensor).dtype, *tensor.shape)
        return found

    def _module(self, part: nn.Module) -> None:
        held = vars(part)
        if "forward" in held:
            raise _UnreadableError
        self._say(self._class(type(part)))
        for kind in ("_parameters", "_buffers", "_modules"):
            self._say(kind, [(key, value is None) for key, value in held[kind].items()])
        for key in sorted(held.keys() - _TOLD):
            if "hooks" in key and held[key]:
                raise _UnreadableError
            self._say(key, self._value(held[key]))

    def _value(self, value: Any) -> str:
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (*_BY_REPR, *_OPERATORS)):
            return f"{kind.__name__} {value!r}"
        if kind in (list, tuple, torch.Size):
            return f"{kind.__name__} {[self._value(item) for item in value]}"
        if kind in (dict, OrderedDict):
            return f"dict {[(self._value(key), self._value(item)) for key, item in value.items()]}"
        if kind in (set, frozenset):
            return f"set {sorted(self._value(item) for item in value)}"
        if isinstance(value, Tensor):
            return self.tensors.get(id(value)) or f"numbers {digest_of({'': _checked(value)})}"
        if isinstance(value, nn.Module):
            if id(value) not in self.parts:
                raise _UnreadableError
            return f"module {self.parts[id(value)]}"
        if isinstance(value, PretrainedConfig):
            return self._number(value, self._say_config)
        return self._code_value(value)

    def _code_value(self, value: Any) -> str:
        """Functions, classes, and what is made of them."""
        kind = type(value)
        if kind is types.FunctionType:
            return self._number(value, self._say_function)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, enum.Enum):
            return f"{self._class(kind)} {value.name}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, logging.Logger):
            return "logger"
        if kind in _BUILT_IN:
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, (type(None), types.ModuleType, type)):
                raise _UnreadableError
            return f"{value.__qualname__} of {getattr(value, '__module__', None)}"
        parts = _parts_of(value)
        if parts is None and kind.__module__ != "typing":
            raise _UnreadableError
        told = repr(value) if parts is None else [self._value(part) for part in parts]
        return f"{kind.__name__} {told}"

    def _maybe(self, value: Any, lenient: bool) -> str:
        """What can be said of a value; of the objects of a known package at least the class."""
        try:
            return self._value(value)
        except _UnreadableError:
            if not lenient:
                raise
        return f"some {type(value).__module__}.{type(value).__qualname__}"

    def _number(self, value: Any, say: Callable[[Any], None]) -> str:
        """A number for what is told once, by the order in which it was met."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.numbers)
            self.met.append(value)
            self.left.append(lambda: say(value))
        return f"{type(value).__name__} {self.numbers[id(value)]}"

    def _say_config(self, config: PretrainedConfig) -> None:
        attention = str(getattr(config, "_attn_implementation", None) or "eager")
        if attention != "eager" and not attention.startswith(STAND_INS):
            raise _UnreadableError  # the user's own
        written = {key: item for key, item in config.to_dict().items() if key not in _ORIGIN}
        self._say(self._class(type(config)), self._value(written))

    def _say_function(self, function: types.FunctionType) -> None:
        module = str(function.__globals__.get("__name__", ""))
        package = _package(module)
        lenient = package in _LENIENT
        self._say(module, function.__qualname__, _code(function.__code__))
        given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        given += [_content(cell) for cell in function.__closure__ or ()]
        self._say([self._maybe(value, lenient) for value in given])
        if package in _KNOWN:
            return
        if not lenient and _imports(function.__code__):
            raise _UnreadableError  # what comes of it is in no scope
        names, scope = sorted(set(_names(function.__code__))), function.__globals__
        seen: set[str] = set()
        for value in [scope[name] for name in names if name in scope]:
            self._say(self._maybe(value, lenient))
            if isinstance(value, types.ModuleType):
                self._inside(value, names, seen)

    def _inside(self, module: types.ModuleType, names: list[str], seen: set[str]) -> None:
        """What a function that looks these names up may reach through a module; of known packages what
        somebody put in the place of theirs."""
        if module.__name__ in seen:
            return
        seen.add(module.__name__)
        lenient, held = _package(module.__name__) in _LENIENT, vars(module)
        for name in names:
            value = held.get(name)
            if isinstance(value, types.ModuleType):
                self._inside(value, names, seen)
            elif name in held and (not lenient or _is_foreign(value)):
                self._say(module.__name__, name, self._value(value))

    def _class(self, value: type) -> str:
        return self._number(value, self._say_class)

    def _say_class(self, value: type) -> None:
        self._say(value.__module__, value.__qualname__, [self._class(b) for b in value.__bases__])
        lenient, held = _package(value.__module__) in _LENIENT, dict(vars(value))
        if lenient and not value.__module__.startswith("transformers.models."):
            held = {name: held[name] for name in ("forward",) if name in held}
        elif lenient and not issubclass(value, nn.Module):
            return
        for name in sorted(held.keys() - _IDLE):
            if lenient and name.startswith("_") and type(held[name]) in _DATA:
                continue  # transformers remembers things there
            self._say(name, self._maybe(held[name], lenient))


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_foreign(value: Any) -> bool:
    """Whether a function is of none of the packages whose code is as their versions say."""
    if not isinstance(value, types.FunctionType):
        return False
    return _package(str(value.__globals__.get("__name__", ""))) not in _LENIENT


def _imports(code: types.CodeType) -> bool:
    """Whether a function, or one that it makes, imports something that is of no known package."""
    steps = list(dis.get_instructions(code))
    for at, step in enumerate(steps):
        if step.opname != "IMPORT_NAME":
            continue
        level = steps[at - 2].argval  # behind it the names that are taken of the module
        if level != 0 or _package(step.argval) not in _LENIENT:
            return True
    return any(_imports(value) for value in code.co_consts if isinstance(value, types.CodeType))


def _checked(tensor: Tensor) -> Tensor:
    """The tensor, where it is an ordinary one with numbers."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_meta:
        raise _UnreadableError
    return tensor


def _parts_of(value: Any) -> list[Any] | None:
    """What a thing around functions is made of; None for anything else."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools._lru_cache_wrapper):
        return [value.__wrapped__]
    return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _code(code: types.CodeType) -> str:
    """What a function's code does, without the place where it is written."""
    sizes = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    told = (code.co_code, sizes, names, [_constant(value) for value in code.co_consts])
    return blake3(repr(told).encode()).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))  # its order differs from process to process
    return [_constant(item) for item in value] if isinstance(value, tuple) else repr(value)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code may look up, and those of the functions that it makes."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _names(value)
