"""einfold: an inference compiler for transformer models.

    import einfold
    einfold.compile("path/to/model", "model.einfold", weights="int4")
    model = einfold.load("model.einfold")
    print(model.generate("Once upon a time", max_new_tokens=64).text)

Importing this package loads neither torch nor transformers; each function loads what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from .api import compile, estimate, export_checkpoint, export_onnx
    from .encoder import Encoder
    from .encoder_decoder import EncoderDecoder
    from .explaining import explain, explain_export
    from .huggingface_cache import cache_for
    from .model import Model, load
    from .planning import Plan, plan

    __version__: str

__all__ = [
    "Encoder",
    "EncoderDecoder",
    "Model",
    "Plan",
    "__version__",
    "cache_for",
    "compile",
    "errors",
    "estimate",
    "explain",
    "explain_export",
    "export_checkpoint",
    "export_onnx",
    "load",
    "plan",
]

_HOMES = {
    "cache_for": "huggingface_cache",
    "Encoder": "encoder",
    "EncoderDecoder": "encoder_decoder",
    "compile": "api",
    "estimate": "api",
    "explain": "explaining",
    "explain_export": "explaining",
    "export_checkpoint": "api",
    "export_onnx": "api",
    "Model": "model",
    "load": "model",
    "Plan": "planning",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__version__":
        from importlib import metadata

        return metadata.version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
