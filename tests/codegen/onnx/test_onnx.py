"""Each operator's ONNX lowering against its reference meaning, in both flavours, over odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from einfold.compiler.codegen.onnx.lower import lower
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.weights import Weight
from einfold.compiler.ir.weights_file import write_weights
from einfold.compiler.passes.weight_quant.explicit_zeros import ExplicitZeros
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.errors import UnsupportedError

from ...programs import program

FLAVOURS = ["ort", "portable"]


def compare(
    found: Program, flavour: str, folder: Path, tolerance: float = 1e-5, **inputs: Any
) -> None:
    """Runs a program by the reference and on onnxruntime; every output must agree."""
    want = Interpreter(found).run({name: torch.as_tensor(value) for name, value in inputs.items()})
    session, names = build(found, flavour, folder)
    feeds = {name: torch.as_tensor(value).numpy() for name, value in inputs.items()}
    used = {node.name for node in session.get_inputs()}
    got = session.run(None, {name: value for name, value in feeds.items() if name in used})
    for name, value in zip(names, got, strict=True):
        np.testing.assert_allclose(value, want[name].numpy(), rtol=tolerance, atol=tolerance)


def build(found: Program, flavour: str, folder: Path, accuracy: int = 0) -> tuple[Any, list[str]]:
    copies = {name: found.weights[name].load() for name in found.weights}
    again = parse(
        print_program(found), lambda name, declared: Weight.of(copies[name]), any_operator=True
    )
    placements, _ = write_weights(again.weights, folder / "w.safetensors")
    model = lower(again, "w.safetensors", placements, flavour, accuracy)
    ir.save(model, folder / "m.onnx")
    if flavour == "portable":
        onnx.checker.check_model(str(folder / "m.onnx"), full_check=True)
        assert all(node.domain == "" for node in model.graph)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return session, found.output_names()


UNARY = [
    "neg",
    "exp",
    "tanh",
    "sigmoid",
    "relu",
    "cos",
    "sin",
    "square",
    "silu",
    "abs",
    "rsqrt",
    "erf",
    "floor",
]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_elementwise(flavour: str, tmp_path: Path) -> None:
    lines = ['input %x "x" : f32[B, 5]', 'input %y "y" : f32[B, 5]']
    for name in UNARY:
        lines.append(f"call %u_{name} = aten.{name}.default(%x) : f32[B, 5]")
    for name in ("add", "sub", "mul", "div"):
        lines.append(f"call %b_{name} = aten.{name}.Tensor(%x, %y) : f32[B, 5]")
        lines.append(f"call %s_{name} = aten.{name}.Tensor(%x, 3) : f32[B, 5]")
    lines.append("call %gt = aten.gt.Scalar(%x, 0.5) : bool[B, 5]")
    lines.append("call %mf = aten.masked_fill.Scalar(%x, %gt, -7.0) : f32[B, 5]")
    lines.append("call %wh = aten.where.self(%gt, %x, %y) : f32[B, 5]")
    lines.append("call %cl = aten.clamp.default(%x, none, 0.7) : f32[B, 5]")
    lines.append("call %pw = aten.pow.Tensor_Scalar(%x, 3) : f32[B, 5]")
    lines.append('call %ge = aten.gelu.default(%x, approximate="tanh") : f32[B, 5]')
    lines.append("call %gn = aten.gelu.default(%x) : f32[B, 5]")
    lines.append("call %h = aten._to_copy.default(%x, dtype=f16) : f16[B, 5]")
    lines.append("call %hh = aten._to_copy.default(%h, dtype=f32) : f32[B, 5]")
    outputs = [
        line.split()[1]
        for line in lines
        if line.startswith("call") and "%gt =" not in line and "%h =" not in line
    ]
    lines += [f'output "{name[1:]}" = {name}' for name in outputs]
    x = torch.rand(3, 5) + 0.1
    compare(program("\n".join(lines)), flavour, tmp_path, x=x, y=torch.rand(3, 5) + 0.5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shapes(flavour: str, tmp_path: Path) -> None:
    found = program("""
        input %x "x" : f32[B, S, 6]
        call %b = aten.sym_size.int(%x, 0) : sym(B)
        call %s = aten.sym_size.int(%x, 1) : sym(S)
        call %r = aten.reshape.default(%x, [%b, %s, 2, 3]) : f32[B, S, 2, 3]
        call %t = aten.transpose.int(%r, 1, 2) : f32[B, 2, S, 3]
        call %m = builtin.mul(%b, 2) : sym(2*B)
        call %f = aten.reshape.default(%t, [%m, %s, 3]) : f32[2*B, S, 3]
        call %g = aten.reshape.default(%f, [%b, -1, %s, 3]) : f32[B, 2, S, 3]
        call %p = aten.permute.default(%g, [0, 2, 1, 3]) : f32[B, S, 2, 3]
        call %v = aten.reshape.default(%p, [-1, 6]) : f32[B*S, 6]
        call %u = aten.unsqueeze.default(%x, 1) : f32[B, 1, S, 6]
        call %e = aten.expand.default(%u, [%b, 4, %s, 6]) : f32[B, 4, S, 6]
        call %c = aten.cat.default([%x, %x], -1) : f32[B, S, 12]
        call %w = aten.split_with_sizes.default(%c, [5, 7], -1) : (f32[B, S, 5], f32[B, S, 7])
        call %w1 = builtin.getitem(%w, 1) : f32[B, S, 7]
        call %sl = aten.slice.Tensor(%c, 2, 1, 9, 2) : f32[B, S, 4]
        call %se = aten.select.int(%x, 2, 3) : f32[B, S]
        call %sm = aten.softmax.int(%x, -1) : f32[B, S, 6]
        call %su = aten.sum.dim_IntList(%x, [1], true) : f32[B, 1, 6]
        call %me = aten.mean.dim(%x, [-1]) : f32[B, S]
        call %tk = aten.topk.default(%x, 2) : (f32[B, S, 2], i64[B, S, 2])
        call %tv = builtin.getitem(%tk, 0) : f32[B, S, 2]
        call %ti = builtin.getitem(%tk, 1) : i64[B, S, 2]
        output "v" = %v
        output "f" = %f
        output "e" = %e
        output "w1" = %w1
        output "sl" = %sl
        output "se" = %se
        output "sm" = %sm
        output "su" = %su
        output "me" = %me
        output "tv" = %tv
        output "ti" = %ti
    """)
    compare(found, flavour, tmp_path, x=torch.randn(2, 5, 6))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("rank", [2, 3])
def test_norms_linears_and_gates(flavour: str, rank: int, tmp_path: Path) -> None:
    t = "B, S" if rank == 3 else "B"
    gates = "\n".join(
        f'call %g{i} = einfold.gated_activation(%x, %y, "{kind}") : f32[{t}, 8]\noutput "g{i}" = %g{i}'
        for i, kind in enumerate(("silu", "gelu", "gelu_tanh", "relu"))
    )
    calls, outputs = [], []
    for line in gates.splitlines():
        (outputs if line.startswith("output") else calls).append(line)
    body = f"""
        weight @w : f32[8]
        weight @b : f32[8]
        weight @m : f32[5, 8]
        weight @mb : f32[5]
        input %x "x" : f32[{t}, 8]
        input %y "y" : f32[{t}, 8]
        read %w "w" : f32[8]
        read %b "b" : f32[8]
        read %m "m" : f32[5, 8]
        read %mb "mb" : f32[5]
        call %n1 = einfold.rms_norm(%x, %w, 1e-05) : f32[{t}, 8]
        call %n2 = einfold.layer_norm(%x, %w, %b, 1e-05) : f32[{t}, 8]
        call %a1 = einfold.add_rms_norm(%x, %y, %w, 1e-05) : (f32[{t}, 8], f32[{t}, 8])
        call %a10 = builtin.getitem(%a1, 0) : f32[{t}, 8]
        call %a11 = builtin.getitem(%a1, 1) : f32[{t}, 8]
        call %a2 = einfold.add_layer_norm(%x, %y, %w, %b, 1e-05) : (f32[{t}, 8], f32[{t}, 8])
        call %a20 = builtin.getitem(%a2, 0) : f32[{t}, 8]
        call %a21 = builtin.getitem(%a2, 1) : f32[{t}, 8]
        call %l1 = einfold.linear(%x, %m, none) : f32[{t}, 5]
        call %l2 = einfold.linear(%x, %m, %mb) : f32[{t}, 5]
        {chr(10).join(calls)}
        output "n1" = %n1
        output "n2" = %n2
        output "a10" = %a10
        output "a11" = %a11
        output "a20" = %a20
        output "a21" = %a21
        output "l1" = %l1
        output "l2" = %l2
        {chr(10).join(outputs)}
    """
    shape = (3, 4, 8) if rank == 3 else (3, 8)
    compare(program(body), flavour, tmp_path, x=torch.randn(shape), y=torch.randn(shape))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("width", "block", "symmetric"),
    [(64, 32, True), (64, 16, False), (128, 128, True), (72, 32, False)],
)
def test_packed_weights(
    flavour: str, bits: int, width: int, block: int, symmetric: bool, tmp_path: Path
) -> None:
    """Odd widths are padded to whole groups; embedding and head read one packed weight."""
    found = program(f"""
        weight @e : f32[130, {width}]
        weight @u.weight : f32[24, {width}]
        weight @ub : f32[24]
        input %ids "input_ids" : i64[B, S]
        read %e "e" : f32[130, {width}]
        read %u "u.weight" : f32[24, {width}]
        read %ub "ub" : f32[24]
        call %h = einfold.embedding(%ids, %e) : f32[B, S, {width}]
        call %y = einfold.linear(%h, %u, %ub) : f32[B, S, 24]
        call %l = einfold.linear(%h, %e, none) : f32[B, S, 130]
        output "y" = %y
        output "logits" = %l
    """)
    QuantizeWeights(Grouped(bits, block, symmetric)).run(found)
    odd_groups = bits == 4 and -(-width // block) % 2 == 1
    if flavour == "portable":
        ExplicitZeros().run(found)
        if odd_groups and not symmetric:
            with pytest.raises(UnsupportedError, match="odd number of groups"):
                build(found, flavour, tmp_path)
            return
    compare(found, flavour, tmp_path, tolerance=2e-4, input_ids=torch.randint(0, 130, (2, 3)))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shared_weights_lie_in_the_file_once(flavour: str, tmp_path: Path) -> None:
    found = program("""
        weight @e : f32[300, 64]
        input %ids "input_ids" : i64[B, S]
        read %e "e" : f32[300, 64]
        call %h = einfold.embedding(%ids, %e) : f32[B, S, 64]
        call %l = einfold.linear(%h, %e, none) : f32[B, S, 300]
        output "logits" = %l
    """)
    for weights in ("fp32", "int8"):
        if weights == "int8":
            QuantizeWeights(Grouped(8, 32)).run(found)
            if flavour == "portable":
                ExplicitZeros().run(found)
        build(found, flavour, tmp_path)
        payload = found.weights.nbytes
        assert (tmp_path / "w.safetensors").stat().st_size < payload + 1024
        assert (tmp_path / "m.onnx").stat().st_size < 8192


CACHED = """
    weight @cos : f32[64, {half}]
    weight @sin : f32[64, {half}]
    weight @sinks : f32[{heads}]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, {heads}, {size}]
    input %k "k" : f32[B, S, {kv}, {size}]
    input %v "v" : f32[B, S, {kv}, {value}]
    weight @ks : f32[{kv}, {size}]
    weight @vs : f32[{kv}, {value}]
    input %kc "cache.0.0.key" : {cache}[B, {kv}, C, {key_width}]
    input %vc "cache.0.0.value" : {cache}[B, {kv}, C, {value_width}]
    input %past "lengths" : i64[B]
    input %count "count" : f32[B, {kv}]
    read %cos "cos" : f32[64, {half}]
    read %sin "sin" : f32[64, {half}]
    read %sinks "sinks" : f32[{heads}]
    read %ks "ks" : f32[{kv}, {size}]
    read %vs "vs" : f32[{kv}, {value}]
    call %a = einfold.cached_attention(%q, %k, %v, %kc, %vc, %past, {count}, {arguments}) : ({types})
    call %o = builtin.getitem(%a, 0) : f32[B, S, {heads}, {value}]
    call %k2 = builtin.getitem(%a, 1) : {cache}[B, {kv}, C, {key_width}]
    call %v2 = builtin.getitem(%a, 2) : {cache}[B, {kv}, C, {value_width}]
    output "o" = %o
    output "cache.0.0.key" = %k2
    output "cache.0.0.value" = %v2
"""

INT8 = {"cache": "i8", "scales": "%ks, %vs"}
INT4 = {"cache": "u8", "scales": "%ks, %vs"}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group": {"heads": 2, "kv": 2},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": "%sinks"},
    "all of it": {"window": 4, "softcap": 2.0, "sinks": "%sinks"},
    "rotary": {"rotary": "%pos, %cos, %sin"},
    "interleaved": {"rotary": "%pos, %cos, %sin", "pairing": "true"},
    "partial rotary": {"rotary": "%pos, %cos, %sin", "half": 4},
    "rotary of 8": {"rotary": "%pos, %cos, %sin", "size": 8, "half": 4, "value": 8},
    "head of 12": {"rotary": "%pos, %cos, %sin", "size": 12, "half": 6, "value": 12},
    "head of 20, window": {"size": 20, "value": 20, "window": 2},
    "values of another size": {"value": 8},
    "int8": INT8,
    "int8, rotary": {**INT8, "rotary": "%pos, %cos, %sin"},
    "int8, head of 24, partial rotary": {
        **INT8,
        "rotary": "%pos, %cos, %sin",
        "size": 24,
        "value": 24,
        "half": 4,
    },
    "int8, all of it": {**INT8, "window": 4, "softcap": 2.0, "sinks": "%sinks"},
    "int4": INT4,
    "int4, rotary": {**INT4, "rotary": "%pos, %cos, %sin"},
    "int4, head of 24": {**INT4, "size": 24, "value": 24},
    "int4, all of it": {**INT4, "window": 4, "softcap": 2.0, "sinks": "%sinks"},
    "count": {"count": "%count"},
    "count, rotary": {"count": "%count", "rotary": "%pos, %cos, %sin"},
    "count, all of it": {"count": "%count", "softcap": 2.0, "sinks": "%sinks"},
    "count, head of 12": {"count": "%count", "size": 12, "value": 12},
    "int8, count": {**INT8, "count": "%count", "rotary": "%pos, %cos, %sin"},
    "int8, count, all of it": {**INT8, "count": "%count", "softcap": 2.0, "sinks": "%sinks"},
    "int4, count, all of it": {**INT4, "count": "%count", "softcap": 2.0, "sinks": "%sinks"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_attention(flavour: str, variant: str, tmp_path: Path) -> None:
    """A first chunk, a chunk over a past, then decoding rows of unequal length together."""
    options: dict[str, Any] = {
        "heads": 4,
        "kv": 2,
        "size": 16,
        "value": 16,
        "half": 8,
        "window": 0,
        "softcap": 0.0,
        "sinks": "none",
        "rotary": "none, none, none",
        "pairing": "false",
        "cache": "f32",
        "scales": "none, none",
        "count": "none",
    }
    options |= VARIANTS[variant]
    halves = 1 + (options["cache"] == "u8")
    options |= {"key_width": options["size"] // halves, "value_width": options["value"] // halves}
    arguments = "{sinks}, {rotary}, {scales}, 0, 0.3, {window}, {softcap}, {pairing}".format(
        **options
    )
    types = (
        "f32[B, S, {heads}, {value}], {cache}[B, {kv}, C, {key_width}], {cache}[B, {kv}, C, {value_width}]"
    ).format(**options)
    scales = {
        # Powers of two: a code must not hang on how a target divides.
        name: torch.exp2(torch.randint(-6, -4, (options["kv"], options[part])).float())
        for name, part in (("ks", "size"), ("vs", "value"))
    }
    found = program(CACHED.format(**options, arguments=arguments, types=types), **scales)
    if options["cache"] != "f32" and flavour == "portable":
        with pytest.raises(UnsupportedError, match=r"layer 0: .* of codes"):
            build(found, flavour, tmp_path)
        return
    session, _ = build(found, flavour, tmp_path)
    reference = Interpreter(found)
    used = {node.name for node in session.get_inputs()}
    heads, kv, size, value = (options[key] for key in ("heads", "kv", "size", "value"))
    generator = torch.Generator().manual_seed(0)

    def step(
        batch: int, lengths: list[int], new: int, caches: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        past = torch.tensor(lengths)
        inputs = {
            "input_ids": torch.zeros(batch, new, dtype=torch.long),
            "position_ids": past[:, None] + torch.arange(new),
            "q": randn(batch, new, heads, size),
            "k": randn(batch, new, kv, size),
            "v": randn(batch, new, kv, value),
            "lengths": past,
            # Nothing behind slot 0 in the first row, some tokens in the others, or the other way round.
            "count": (torch.arange(batch)[:, None] + new) % 2 * torch.full((batch, kv), 5.0),
            **caches,
        }
        want = reference.run(inputs)
        got = session.run(None, {n: t.numpy() for n, t in inputs.items() if n in used})
        named = dict(zip(want, got, strict=True))
        # An output is a mean of values, so its rounding goes by the largest of them, not by itself.
        largest = max(1.0, float(want["cache.0.0.value"].abs().max()))
        if stored is not torch.float32:
            largest = 1.0
        np.testing.assert_allclose(named["o"], want["o"].numpy(), rtol=2e-5, atol=2e-6 * largest)
        for row, length in enumerate(lengths):
            valid = length + new
            for name in ("cache.0.0.key", "cache.0.0.value"):
                np.testing.assert_allclose(
                    named[name][row, :, :valid],
                    want[name][row, :, :valid].numpy(),
                    rtol=2e-5,
                    atol=2e-6,
                )
        want.pop("o")
        return want

    stored = {"f32": torch.float32, "i8": torch.int8, "u8": torch.uint8}[options["cache"]]
    lowest, highest = (0, 256) if stored is torch.uint8 else (-9, 9)
    empty = {
        f"cache.0.0.{part}": torch.zeros(2, kv, 24, options[f"{part}_width"], dtype=stored)
        for part in ("key", "value")
    }
    first = int(options["count"] != "none")  # slot 0 is taken from the start
    for tensor in empty.values():
        lead = tensor[:, :, :first]
        lead.copy_(torch.randint(lowest, highest, lead.shape, generator=generator))
    one = {name: tensor[:1].clone() for name, tensor in empty.items()}
    one = step(1, [first], 7, one)
    one = step(1, [first + 7], 5, one)
    step(1, [first + 12], 1, one)
    if first:
        # GroupQueryAttention takes no rows together over slots in use; the engine runs them apart.
        both = {
            name: torch.randint(lowest, highest, t.shape, generator=generator).to(stored)
            for name, t in empty.items()
        }
    else:
        both = step(2, [0, 0], 6, empty)
    step(2, [first + 6, first + 3], 1, both)


EXPERTS = """
    weight @gu : f32[4, 48, 32]
    weight @gub : f32[4, 48]
    weight @dn : f32[4, 32, 24]
    weight @dnb : f32[4, 32]
    input %x "x" : f32[B, 32]
    input %i "i" : i64[B, 2]
    input %w "w" : f32[B, 2]
    read %gu "gu" : f32[4, 48, 32]
    read %gub "gub" : f32[4, 48]
    read %dn "dn" : f32[4, 32, 24]
    read %dnb "dnb" : f32[4, 32]
    call %y = einfold.experts(%x, %i, %w, %gu, {gub}, %dn, {dnb}, "{kind}", 1.7, 7.0) : f32[B, 32]
    output "y" = %y
"""


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("bias", "kind"), [(False, "silu"), (True, "swiglu_clamped")])
@pytest.mark.parametrize("bits", [0, 4])
def test_experts(flavour: str, bias: bool, kind: str, bits: int, tmp_path: Path) -> None:
    """Experts that no token chose run on zero rows."""
    names = {"gub": "%gub", "dnb": "%dnb"} if bias else {"gub": "none", "dnb": "none"}
    found = program(EXPERTS.format(kind=kind, **names))
    if bits:
        QuantizeWeights(Grouped(bits, 16)).run(found)
        if flavour == "portable":
            found = program(EXPERTS.format(kind=kind, **names))
            QuantizeWeights(Grouped(8, 16)).run(found)
            ExplicitZeros().run(found)
    index = torch.tensor([[0, 2], [2, 3], [0, 3]])
    compare(
        found, flavour, tmp_path, tolerance=1e-4, x=torch.randn(3, 32), i=index, w=torch.rand(3, 2)
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_has_no_lowering_goes_through_torch(flavour: str, tmp_path: Path) -> None:
    found = program("""
        input %x "x" : f32[B, 5]
        call %a = aten.expm1.default(%x) : f32[B, 5]
        call %b = aten.expm1.default(%a) : f32[B, 5]
        call %c = aten.cumsum.default(%b, 1) : f32[B, 5]
        output "c" = %c
    """)
    compare(found, flavour, tmp_path, tolerance=1e-4, x=torch.rand(3, 5))


def test_torch_is_asked_for_an_opset_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over int8 brings in the newest one, which torch's exporter may not write."""
    asked = []
    export = torch.onnx.export

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options["opset_version"])
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", watched)
    found = program("""
        weight @s : f32[1, 16]
        input %ids "input_ids" : i64[B, S]
        input %q "q" : f32[B, S, 4, 16]
        input %k "k" : f32[B, S, 1, 16]
        input %kc "cache.0.0.key" : i8[B, 1, C, 16]
        input %vc "cache.0.0.value" : i8[B, 1, C, 16]
        input %past "lengths" : i64[B]
        read %s "s" : f32[1, 16]
        call %a = einfold.cached_attention(%q, %k, %k, %kc, %vc, %past, none, none, none, none, none, \
%s, %s, 0, 0.3, 0, 0.0, false) : (f32[B, S, 4, 16], i8[B, 1, C, 16], i8[B, 1, C, 16])
        call %o = builtin.getitem(%a, 0) : f32[B, S, 4, 16]
        call %c = aten.cumsum.default(%o, 1) : f32[B, S, 4, 16]
        output "c" = %c
    """)
    build(found, "ort", tmp_path)
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == 26
    assert asked == [23]


def test_what_nobody_can_lower_is_named(tmp_path: Path) -> None:
    found = program("""
        input %x "x" : f32[4, 4]
        call %a = aten.linalg_inv.default(%x) : f32[4, 4]
        output "b" = %a
    """)
    with pytest.raises(UnsupportedError, match=r"aten.linalg_inv.default at %a"):
        build(found, "ort", tmp_path)


def test_offsets_past_two_gigabytes(tmp_path: Path) -> None:
    """A weight beyond 2 GiB of a (sparse) file is read where it lies."""
    from einfold.compiler.ir.weights_file import Placement

    found = program("""
        weight @w : f32[4, 8]
        input %x "x" : f32[B, 8]
        read %w "w" : f32[4, 8]
        call %y = einfold.linear(%x, %w, none) : f32[B, 4]
        output "y" = %y
    """)
    weight = found.weights["w"].load()
    offset = 5 * 2**30
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(weight.numpy().tobytes())
    place = Placement(offset, 128, torch.float32, (4, 8))
    ir.save(lower(found, "w.safetensors", {"w": place}), tmp_path / "m.onnx")
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 8)
    (got,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, (x @ weight.T).numpy(), rtol=1e-5, atol=1e-6)
