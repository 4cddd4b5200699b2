"""What is measured: rows of recipes, in three sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from einfold.compiler.ir.quant.scheme import PRESETS
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.compiler.solve.solver import SOLVERS


@dataclass(frozen=True)
class Row:
    """One form of a model. It runs in onnxruntime, or by the reference where that has no operator for it."""

    name: str
    """As the command line spells it."""
    recipe: dict[str, Any] = field(default_factory=dict)
    reference: bool = False

    @property
    def table(self) -> dict[str, Any]:
        return {**self.recipe, "target": "reference" if self.reference else "onnx"}


def _weights(name: str, level: int | None = None, **options: Any) -> Row:
    recipe: dict[str, Any] = {"weights": options}
    if level is not None:
        recipe["onnx"] = {"accuracy_level": level}
    return Row(name, recipe)


def _text(text: str) -> Row:
    """Weights as the command line spells them, in products in float32."""
    return Row(f"--weights {text}", {"weights": text, "onnx": {"accuracy_level": 0}})


def _cache(family: str, method: str, **options: Any) -> Row:
    shown = ",".join(f"{key}={value}" for key, value in options.items())
    name = f"--{family} {method}" + (f":{shown}" if shown else "")
    integers = method in ("turboquant", "abq") and options.get("bits", 4) == 4
    reference = (family == "quant" and not integers) or method in ("minicache", "cskv")
    return Row(name, {"cache": {family: {"method": method, **options}}}, reference)


_FLOAT = Row("float32")
_INT4: dict[str, Any] = {"format": "int4", "block": 32, "head": "int8"}
_INT8_CACHE = Row("--cache int8", {"cache": {"storage": "int8"}})
_INT4_CACHE = Row("--cache int4", {"cache": {"storage": "int4"}})
_RAZOR = _cache("prune", "razor_attention")
_STACK = Row(
    "--weights int8 --cache int8 --prune razor_attention",
    {
        "weights": {"format": "int8"},
        "cache": {"storage": "int8", "prune": {"method": "razor_attention"}},
    },
)

#: Fixed, so that figures of one day stand beside those of another.
QUICK = (
    _FLOAT,
    _weights("--weights int8", format="int8"),
    _weights("--weights int4", format="int4"),
    _weights("--recipe int4", **_INT4),
    _weights("--recipe int4-exact", 0, **_INT4),
    _weights("--recipe int4-128", format="int4", block=128, symmetric=False, head="same"),
    _INT8_CACHE,
    _RAZOR,
    _cache("quant", "kivi", bits=4),
    _cache("quant", "turboquant"),
    _cache("share", "cross_layer"),
    _STACK,
)

#: What of a loss is the scheme, the head and its embedding, or the accuracy level of the products.
WEIGHTS = (
    _FLOAT,
    _weights("fp16", format="fp16"),
    *(
        _weights(
            f"{bits}, block {block}, head {head}, level {level}",
            level,
            format=bits,
            block=block,
            head=head,
        )
        for bits, block, head in (
            ("int8", 32, "same"),
            ("int8", 128, "same"),
            ("int4", 32, "int8"),
            ("int4", 32, "same"),
            ("int4", 16, "int8"),
            ("int4", 64, "int8"),
            ("int4", 128, "int8"),
            ("int4", 128, "same"),
        )
        for level in (0, 4)
    ),
    *(
        _weights(
            f"int4 asymmetric, block {block}, head int8, level 0",
            0,
            format="int4",
            block=block,
            head="int8",
            symmetric=False,
        )
        for block in (16, 32, 128)
    ),
)

#: Texts that the model writes to be calibrated on, beside the one that it writes first.
_SEEDS = (1, 2)


def _read(text: str, seed: int = 0, tokens: int | None = None) -> Row:
    """Weights that are solved on another text, or on fewer tokens of one."""
    found, calibration = _text(text), {"seed": seed, "tokens": tokens}
    name = (
        found.name + (f", {tokens:,} tokens" if tokens else "") + (f", text {seed}" if seed else "")
    )
    given = {key: value for key, value in calibration.items() if value}
    return Row(name, found.recipe | {"calibration": given})


#: Solvers on two formats, and every format rounded to nearest; heads in 8 bits but where int4 stands alone.
SOLVERS_AND_FORMATS = (
    *(
        _read(f"decoupleq:bits={bits},block={block},symmetric=false", seed)
        for bits, block in ((4, 32), (3, 64))
        for seed in _SEEDS
    ),
    *(
        _text(f"decoupleq:bits={bits},block={block},symmetric=false,rotate=true")
        for bits, block in ((4, 32), (3, 64))
    ),
    *(
        _text(f"{text},rotate=true")
        for text in (
            "round_to_nearest:bits=3,block=64,symmetric=false",
            "int8:block=0,activations=int8",
            "gptq:bits=8,block=0,activations=int8",
            "gptq:format=qserve",
        )
    ),
    # Places that are turned beside the residual stream.
    *(
        _text(f"{text},rotate={places}")
        for text, places in (
            ("int8:block=0,activations=int8", "residual+values"),
            ("int8:block=0,activations=int8", "residual+down"),
            ("gptq:format=qserve", "residual+down"),
            ("decoupleq:bits=3,block=64,symmetric=false", "residual+values"),
        )
    ),
    # What int4 alone stores for widths such as 576, turned and not.
    *(
        _read(text, seed)
        for text in ("int4", "decoupleq:bits=4,block=64,symmetric=false,head=same")
        for seed in _SEEDS
    ),
    # Whole ranges, and half of the tokens.
    *(
        _read(f"{name}:bits={bits},block={block},symmetric=false,fit=false", seed, 8192)
        for bits, block in ((4, 32), (3, 64))
        for name in ("gptq", "awq")
        for seed in (0, *_SEEDS)
    ),
    *(
        _text(f"{name}:bits={bits},block={block},symmetric=false")
        for bits, block in ((4, 32), (3, 64))
        for name in SOLVERS
    ),
    *(
        # onnxruntime widens planes one by one, and holds all of them: of the real model more than 24 GB.
        Row(f"--weights {name}", {"weights": name}, reference=True)
        if name == "planes"
        else _text(name)
        for name, preset in PRESETS.items()
        if preset.scheme is not None and not preset.scheme.nearly_exact
    ),
)


#: Formats that choose for whole groups, which `gptq` does not write column by column.
_WHOLE_GROUPS = ("olive", "trellis")


def _solved(name: str) -> Row:
    """A format as `gptq` fills it, the best solver of most; else as `awq` does, which takes all."""
    shown = f"{'awq' if name in _WHOLE_GROUPS else 'gptq'}:format={name}"
    return Row(f"--weights {shown}", _text(shown).recipe, reference=name == "planes")


#: What papers say of formats: outliers beside plain groups at about 3.5 bits, a trellis beside scalars at 3
#: and at 2; rounded to nearest and solved. `spqr` and `trellis` at their defaults stand above.
ORDERS = (
    *(
        _text(f"{solver}:bits={bits},block={block},symmetric=false,scales=f16")
        for bits, block in ((3, 32), (3, 128), (2, 64))
        for solver in ("round_to_nearest", "gptq")
    ),
    _text("trellis:bits=2"),
    _text("awq:format=trellis,bits=2"),
)

#: All formats solved; `int4`, `int3` and `qserve` stand above.
FILLED = tuple(
    _solved(name)
    for name, preset in PRESETS.items()
    if preset.scheme is not None
    and not preset.scheme.nearly_exact
    and name not in ("int4", "int3", "qserve")
)

#: Products of integers, and the same weights with activations as they are; `qserve` stands above.
ACTIVATIONS = tuple(
    _text(text)
    for text in (
        "int8:block=0",
        "int8:block=0,activations=int8",
        "gptq:bits=8,block=0,activations=int8",
        "int4:block=0,activations=int8",
        "int4:block=128,symmetric=false",
        "qserve:activations=f32",
        "gptq:format=qserve,activations=f32",
        "gptq:format=qserve",
    )
)

#: Half of 1,024 tokens, a quarter and an eighth.
_BUDGETS = (512, 256, 128)


#: Methods of `tokens` for every head, whose defaults are 256 of them.
_FLAT = ("expected_attention", "locret", "snapkv", "kvcrush", "pyramid_kv", "h2o", "ems")


def _by_head(method: str, tokens: int, **options: Any) -> Row:
    """A method that compares heads, which are to be right for 1,024 tokens."""
    return _cache("prune", method, tokens=tokens, share=tokens / 1024, **options)


def _budgets() -> Iterator[Row]:
    """Methods that keep a number of tokens, at three budgets. Those whose defaults are one of these have no
    row of their own for it."""
    for tokens in _BUDGETS:
        for method in ("kvzip", "ada_kv"):
            yield _by_head(method, tokens)
    for tokens in (512, 128):
        for method in _FLAT:
            yield _cache("prune", method, tokens=tokens)
        yield _cache("prune", "streaming_llm", recent=tokens - 4)


def _stack(*rows: Row, storage: str | None = None) -> Row:
    """Several forms of a cache at once, over a storage of its slots where one is given."""
    cache: dict[str, Any] = {} if storage is None else {"storage": storage}
    for row in rows:
        cache |= row.recipe["cache"]
    names = [*([] if storage is None else [f"--cache {storage}"]), *(row.name for row in rows)]
    return Row(" ".join(names), {"cache": cache}, any(row.reference for row in rows))


#: Pages of 8 that choose about as well as the default's of 4.
LIKE_KEYS = {"page": 8, "alike": 256, "spread": 0.35}

#: Every method at its defaults, budgets, more bits and channels, and stacks. A row of the real model is two
#: minutes of one core in onnxruntime, and more by the reference.
CACHE = (
    _FLOAT,
    _INT8_CACHE,
    _INT4_CACHE,
    *(_cache(family, name) for family, known in FAMILIES.items() for name in known),
    *_budgets(),
    _cache("prune", "razor_attention", recent=256),
    _cache("prune", "duo_attention", full=0.5),
    _by_head("ada_kv", 256, by="expected_attention"),
    _by_head("kvzip", 256, by="locret"),
    _cache("prune", "locret", prefill="exact"),
    _cache("prune", "locret", sinks=0),
    _cache("prune", "h2o", prefill="streaming"),
    _cache("prune", "pyramid_kv", by="expected_attention"),
    _cache("prune", "zipvl", by="h2o"),
    _cache("prune", "elastic_cache", merge=False),
    _cache("quant", "kivi", bits=4),
    _cache("quant", "turboquant", bits=3),
    _cache("quant", "abq", bits=3),
    _cache("quant", "mustafar", sparsity=0.7),
    _cache("quant", "mustafar", sparsity=0.7, dtype="i8"),
    _cache("quant", "abq", bits=4, order="none"),
    _cache("share", "cskv", keep=0.5),
    _cache("share", "cross_layer", layers=1),
    _cache("share", "matryoshka_kv", keep=0.5),
    _cache("share", "matryoshka_kv", steps=0),
    *(_stack(_by_head("kvzip", tokens), storage="int8") for tokens in (512, 256)),
    _stack(_cache("prune", "kvzip"), storage="int4"),
    _stack(_by_head("kvzip", 256), _cache("quant", "kivi", bits=4)),
    _stack(_cache("prune", "duo_attention"), storage="int8"),
    _stack(_cache("prune", "duo_attention"), _cache("quant", "kivi", bits=4)),
    _cache("read", "quest", **LIKE_KEYS),
    _cache("read", "quest", linear=0.5),
    _stack(_cache("prune", "snapkv", tokens=512), _cache("read", "quest", tokens=128, linear=0.5)),
    _stack(_cache("prune", "kvzip"), _cache("read", "quest")),
    _stack(_cache("prune", "kvzip"), _cache("read", "quest", linear=0.5)),
    _stack(_cache("read", "quest"), storage="int8"),
    _stack(_cache("read", "quest", **LIKE_KEYS), storage="int8"),
    _stack(_cache("read", "shadowkv"), storage="int8"),
    _STACK,
)

SETS = {
    "quick": QUICK,
    "weights": (*WEIGHTS, *SOLVERS_AND_FORMATS, *ORDERS, *FILLED, *ACTIVATIONS),
    "cache": CACHE,
}
