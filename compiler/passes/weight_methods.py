"""What a recipe may choose for weights: a format with its options, and a solver that fills it.

    [weights]
    format = "int3"
    block = 64
    solver = {method = "gptq", damping = 0.05}

On the command line, and wherever a text stands for the table, the same is
`gptq:bits=3,block=64,damping=0.05` or `int3:block=64,solver=gptq,damping=0.05`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...errors import IRError, RecipeError
from ..budget.mix import Mix
from ..ir.options import values_of
from ..ir.quant.scheme import PRESETS, Preset, Scheme, find_scheme
from ..ir.quant.schemes.grouped import BITS, Grouped
from ..solve.decoupleq import DecoupleQ
from ..solve.gptq import GPTQ
from ..solve.solver import SOLVERS, Solver
from .method_text import Family, Method, built, split_text

#: What a solver fills where no format is named.
_FILLED = "int4"

#: The solver that is whatever is best for model and format; none where no text can be read through a model.
BEST = "best"

#: The widths of a mix, where nothing else is said.
WIDTHS = "2+4+8"

#: The best solvers, the best first; not every one fills every format.
_BEST: tuple[type[Solver], ...] = (DecoupleQ, GPTQ)

#: Options of a format of which nothing but the name is said, where its codes are solved: a fifth fewer bytes
#: than at its defaults, more than that faster (onnxruntime is faster over blocks of 128 than over shorter
#: ones), and a smaller loss; blocks are shorter where they fill a row.
_SOLVED: Mapping[str, Mapping[str, Any]] = {
    "int4": {"block": 128, "symmetric": False, "head": "same", "rotate": "auto"},
}

#: The word for whatever can be turned, and what that is.
AUTO = "auto"
_AUTO = ("residual",)

#: What may be turned before weights are rounded, in the words of `rotate`.
PLACES = ("residual", "values", "down")

#: Keys that leave it at the name.
_BARE = {"format", "embedding", "keep"}

#: The solvers, with their options.
SOLVER_METHODS: Mapping[str, Method] = Family((), SOLVERS)


def format_options(name: str) -> dict[str, Any]:
    """The options of a format and their defaults: fields of its scheme, but for those that its name says."""
    scheme = PRESETS[name].scheme
    if scheme is None:
        return {}
    kin = [p.scheme for p in PRESETS.values() if type(p.scheme) is type(scheme)]
    named = values_of(scheme)
    free = {k: v for k, v in named.items() if all(getattr(each, k) == v for each in kin)}
    return {name: _plain(value) for name, value in free.items()}


def _plain(value: Any) -> Any:
    """An option as a recipe has it: a scheme within a scheme by its text."""
    return str(value) if isinstance(value, Scheme) else value


def scheme_of(name: str, options: Mapping[str, Any]) -> Scheme | None:
    """A format's scheme with some of its options. Raises ValueError and RecipeError for others."""
    scheme = PRESETS[name].scheme
    if scheme is None:
        return None
    hints = get_type_hints(type(scheme))
    made = {
        key: _inner(key, value) if hints[key] is Scheme else _checked(key, value, hints[key])
        for key, value in options.items()
    }
    try:
        return replace(scheme, **made)  # type: ignore[type-var]
    except IRError as error:
        raise RecipeError(f"weights: {error}") from error


def _checked(key: str, value: Any, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"weights.{key}: {error.errors()[0]['msg']}, found {value!r}") from error


def _inner(name: str, text: Any) -> Scheme:
    """A scheme within a scheme: a format by its name, or a scheme by its text."""
    if not isinstance(text, str):
        raise ValueError(f"weights.{name} is a format or the text of a scheme, not {text!r}")
    try:
        return find_scheme(text)
    except IRError as error:
        raise ValueError(f"weights.{name}: {error}") from error


def solver_of(table: Mapping[str, Any]) -> Solver:
    """The solver that a recipe's table asks for; raises as `method_text.built`."""
    found: Solver = built("weights.solver", SOLVER_METHODS, table)
    return found


def read_weights(text: str) -> dict[str, Any]:
    """The table that a text stands for: `FORMAT` or `SOLVER`, and options of both, by key and value.

    Raises ValueError where it is written otherwise.
    """
    name, options = split_text("weights", text)
    table: dict[str, Any] = {}
    if name in SOLVERS:
        options = {"solver": name, **options}
    elif name in PRESETS:
        table["format"] = name
    else:
        known = f"formats: {', '.join(PRESETS)}; solvers: {', '.join(SOLVERS)}"
        raise ValueError(f"weights is a format or a solver, not {name[:200]!r} ({known})")
    chosen = options.pop("solver", "")
    solver = {"method": chosen} if chosen else {}
    own = SOLVER_METHODS[chosen].defaults() if chosen in SOLVERS else {}
    for key, value in options.items():
        if key in own:
            solver[key] = value
        elif key == "bits" and "format" not in table and f"int{value}" in PRESETS:
            table["format"] = f"int{value}"
        else:
            table[key] = value
    return table | ({"solver": solver} if solver else {})


def laid_over(table: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A recipe's table with what a text says over it. Options that another format had are left out."""
    over = read_weights(text)
    under = dict(table)
    name = over.get("format", under.get("format", "fp32"))
    if name != under.get("format") and name in PRESETS:
        others = {key for known in PRESETS for key in format_options(known)}
        gone = others - format_options(name).keys()
        under = {key: value for key, value in under.items() if key not in gone}
    return under | over


def spelled_out(table: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A table of a recipe with every option of its format and solver. `keys` are those of any format, with
    their defaults.

    Raises ValueError and RecipeError with a sentence for what is wrong in it.
    """
    found = {**keys, **table}
    if found["solver"] is not None and "format" not in table:
        found["format"] = _FILLED
    bare = table.keys() <= _BARE and found["format"] in _SOLVED
    if bare or found["solver"] == {"method": BEST}:
        found["solver"] = BEST
    name = found["format"]
    if name not in PRESETS:
        return found  # refused where it is read
    known = format_options(name)
    for key in table:
        if key not in known and key not in keys:
            takes = f"takes {', '.join(known)}" if known else "has no options"
            raise ValueError(f"weights has an unknown key {key[:200]!r}; {name} {takes}")
    scheme = scheme_of(name, {key: value for key, value in table.items() if key in known})
    found |= {key: _plain(getattr(scheme, key)) for key in known}
    mix_of(found, scheme)
    found["activations"] = _activations(found["activations"], name, scheme)
    found["rotate"] = _rotate(found["rotate"])
    if found["rotate"] and (scheme is None or scheme.nearly_exact):
        raise ValueError(
            f"weights.rotate spreads what stands out before weights are rounded to few levels, and {name} "
            "has no such levels; leave it out, or take a format such as int4"
        )
    if isinstance(found["solver"], str) and found["solver"] != BEST:
        found["solver"] = {"method": found["solver"]}
    if isinstance(found["solver"], Mapping):
        solver = solver_of(found["solver"])
        if scheme is None or scheme.nearly_exact:
            raise ValueError(f"weights.solver {solver.name} chooses codes, and {name} has none")
        if reason := solver.refuses(scheme):
            raise ValueError(f"weights.solver: {reason}")
        found["solver"] = {"method": solver.name, **values_of(solver)}
    return found


def _rotate(asked: Any) -> bool | str | None:
    """What is to be turned, as a recipe has it: a truth value, "auto", or places. Raises ValueError."""
    if asked is None:
        return None
    if asked == AUTO:
        return AUTO
    try:
        return TypeAdapter(bool).validate_python(asked)
    except ValidationError:
        places = str(asked).split("+")
    if unknown := [place for place in places if place not in PLACES]:
        raise ValueError(
            f"weights.rotate is true, false, {AUTO}, or names places joined by +, of {', '.join(PLACES)}; "
            f"it has none that is called {unknown[0][:200]!r}"
        )
    return "+".join(place for place in PLACES if place in places)


def places_of(rotate: bool | str | None) -> tuple[str, ...]:
    """The places that are to be turned, in their order."""
    if rotate == AUTO:
        return _AUTO
    if isinstance(rotate, str):
        return tuple(rotate.split("+"))
    return ("residual",) if rotate else ()


def _activations(asked: Any, name: str, scheme: Scheme | None) -> Any:
    """What linears read where a recipe asks so, or does not. Raises ValueError for weights whose products
    would not be of integers."""
    if asked == "int8" and (scheme is None or not scheme.integer_rows):
        stored = "as they come" if scheme is None else f"stored in {scheme.describe()}"
        raise ValueError(
            "weights.activations = int8 is for products of integers, whose weights have one scale a row, and "
            f"those of {name} are {stored}; use int8 or int4 with block=0, or qserve"
        )
    return asked or ("f32" if scheme is None else scheme.activations)


def mix_of(table: Mapping[str, Any], scheme: Scheme | None) -> Mix | None:
    """The mix of widths that a recipe's table asks for. Raises ValueError for what is wrong in it."""
    if table["bpw"] is None:
        if table["widths"] != WIDTHS:
            raise ValueError(
                "weights.widths are what a mix chooses among; give the bits a weight too, as bpw=4.5"
            )
        return None
    if not isinstance(scheme, Grouped):
        raise ValueError(
            f"weights.bpw chooses among integers of several widths, and {table['format']} is none; use a "
            "format such as int4, whose options they then have"
        )
    try:
        bpw = float(table["bpw"])
    except (TypeError, ValueError) as error:
        shown = repr(table["bpw"])[:200]
        raise ValueError(f"weights.bpw is a number of bits, not {shown}") from error
    try:
        widths = dict.fromkeys(int(width) for width in str(table["widths"]).split("+"))
        return Mix(bpw, tuple(widths))
    except (ValueError, IRError) as error:
        shown = str(table["widths"])[:200]
        reason = error if isinstance(error, IRError) else "widths are numbers joined by +, as 2+4+8"
        raise ValueError(f"weights.widths: {reason}, found {shown!r}") from error


def explaining(table: Mapping[str, Any]) -> Preset:
    """The format whose rounding a resolved table's weights are at most: of a mix, integers of its average."""
    bpw = table.get("bpw")
    if bpw is None:
        return PRESETS.find(table["format"])
    return PRESETS.find(f"int{max(bits for bits in BITS if bits <= max(BITS[0], bpw))}")


def settled(
    table: Mapping[str, Any],
    keys: Mapping[str, Any],
    reads: bool,
    zero_points: bool,
    width: int = 0,
) -> dict[str, Any]:
    """What a table with the solver `best` stands for; table and keys as `spelled_out` gives and takes them.

    `reads`: whether a text can be read through the model; `zero_points`: whether the target takes any;
    `width`: of the model's states, where it is known. Rows that whole blocks do not fill are padded, and a
    shorter block that does costs fewer bytes.
    """
    own = {key: value for key, value in table.items() if key in format_options(table["format"])}
    scheme = scheme_of(table["format"], own)
    able = (
        [s.name for s in _BEST if scheme is not None and not s().refuses(scheme)] if reads else []
    )
    if not able:
        return {**table, "solver": None}
    solved = {**table, "solver": {"method": able[0]}}
    bare = spelled_out({key: table[key] for key in _BARE}, keys)
    if table != bare:
        return solved
    better = {**_SOLVED[table["format"]]}
    if not zero_points and "symmetric" in better:
        better["symmetric"] = True
    better["block"] = next(
        (block for block in (better["block"], 64, 32) if width % block == 0), better["block"]
    )
    return solved | better
