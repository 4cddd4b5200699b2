"""What `cache_for` plans is found again, by another process too, for the same model and options alone."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoTokenizer, DynamicCache
from transformers.models.llama import modeling_llama

import einfold
from einfold import huggingface_plan
from einfold.compiler.identity import identity
from einfold.compiler.ir.kept import read, write
from einfold.errors import EinfoldError, RecipeError

from .. import models
from ..frontend import test_given_model as given
from ..quick import quick, rarely
from .test_huggingface_cache import METHODS, PACKED

IDS = torch.arange(60)[None] % 90 + 3

#: One of each family: what is measured, calibrated, kept beside the programs, or nothing of it.
OPTIONS = {
    name: (METHODS | PACKED)[name]
    for name in ("full", "int8", "compensation", "scores", "kivi", "cskv")
}


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were planned, in an empty folder of what is kept."""
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    made: list[str] = []
    plan = huggingface_plan.plan_cache

    def counted(model: Any, *arguments: Any) -> Any:
        made.append(model.source.name)
        return plan(model, *arguments)

    monkeypatch.setattr(huggingface_plan, "plan_cache", counted)
    return made


def logits(model: Any, **options: Any) -> torch.Tensor:
    """Of a prompt, and of tokens one by one behind it."""
    options = {key: value for key, value in options.items() if key != "target"}
    with einfold.cache_for(model, **options) as cache, torch.no_grad():
        parts = [model(IDS[:, :41], past_key_values=cache).logits]
        parts += [model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(41, 60)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", quick(OPTIONS, "compensation", "int8"))
def test_a_plan_that_is_found_again_gives_the_same_numbers(name: str, plans: list[str]) -> None:
    first = logits(models.build("llama"), **OPTIONS[name])
    again = logits(models.build("llama"), **OPTIONS[name])
    assert torch.equal(first, again)
    assert len(plans) == 1


@pytest.mark.parametrize("name", ["gemma3", rarely("gpt_oss")])
def test_other_architectures(name: str, plans: list[str]) -> None:
    first = logits(models.build(name))
    assert torch.equal(first, logits(models.build(name)))
    assert len(plans) == 1


SECOND = """
import torch, einfold
from tests import models
from tests.bridge import test_plans
from einfold import huggingface_plan

def refused(*_):
    raise AssertionError("it was planned again")

huggingface_plan.plan_cache = refused
torch.save(test_plans.logits(models.build("llama"), cache="int8"), {out!r})
"""


@pytest.mark.slow
def test_another_process_finds_it(plans: list[str], tmp_path: Path) -> None:
    """Its hashes of strings are others, so that sets have another order."""
    want = logits(models.build("llama"), cache="int8")
    assert len(plans) == 1
    out, root = tmp_path / "logits.pt", Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", SECOND.format(out=str(out))],
        check=True,
        env=environment,
        cwd=root,
    )
    torch.testing.assert_close(torch.load(out), want, rtol=0, atol=0)


def weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3


def buffer_dtype(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.double()


def config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def training(model: Any) -> None:
    model.train()


def class_of_a_part(model: Any) -> None:
    class Other(nn.SiLU):
        pass

    model.model.layers[0].mlp.act_fn = Other()


NAMED = [
    given.lora,
    given.wrapped,
    given.head_with_bias,
    given.head_of_its_own,
    given.head_tied,
    given.activation,
    given.rotary,
    given.scaling,
    given.epsilon,
    given.subclass,
    given.half,
    weight,
    buffer_dtype,
    config,
    training,
    class_of_a_part,
]


def forward_in_an_instance(model: Any) -> None:
    model.model.norm.forward = model.model.norm.forward


def object_of_an_unknown_kind(model: Any) -> None:
    model.model.helper = object()


def module_beside_the_tree(model: Any) -> None:
    model.model.others = [nn.Linear(2, 2)]


def attention_of_the_users_own(model: Any) -> None:
    AttentionInterface.register("of_the_user", modeling_llama.eager_attention_forward)
    model.config._attn_implementation = "of_the_user"


NAMELESS = [
    given.hook,
    given.pre_hook,
    given.bound_method,
    given.computed_weight,
    given.plain_tensor,
    forward_in_an_instance,
    object_of_an_unknown_kind,
    module_beside_the_tree,
    attention_of_the_users_own,
]


def changed(change: Callable[[Any], None]) -> Any:
    model = models.build("llama")
    torch.manual_seed(1)
    change(model)
    return model


@pytest.mark.parametrize("change", NAMED, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_another_name(change: Callable[[Any], None]) -> None:
    name = identity(changed(change))
    assert name is not None
    assert name == identity(changed(change))
    assert name != identity(models.build("llama"))


@pytest.mark.parametrize("change", NAMELESS, ids=lambda change: change.__name__)
def test_what_cannot_be_read_has_no_name(change: Callable[[Any], None]) -> None:
    assert identity(changed(change)) is None


def test_hooks_of_every_module_leave_none_named() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: None)
    try:
        assert identity(models.build("llama")) is None
    finally:
        handle.remove()
    assert identity(models.build("llama")) is not None
    assert identity(models) is None  # it is no module


def scaled(q: Any, k: Any, *_: Any, **__: Any) -> Any:
    return q * FACTOR, k


FACTOR = 2.0


def test_code_that_a_forward_reaches_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of transformers replaced, a constant that it reads, a method of a class replaced."""
    model = models.build("llama")
    names = [identity(model)]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    names.append(identity(model))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    names.append(identity(model))
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    names.append(identity(model))
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x + 1)
    names.append(identity(model))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    names.append(identity(model))
    assert None not in names
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert identity(model) == names[0]


def test_use_leaves_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Generating, another cache that is installed, another attention of transformers, compiling, copying."""
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    model = models.build("llama")
    name = identity(model)
    model.generate(IDS, max_new_tokens=3, do_sample=False, past_key_values=DynamicCache())
    assert identity(model) == name
    with einfold.cache_for(model):
        assert identity(model) == name
    model.set_attn_implementation("eager")
    model.config.name_or_path = "elsewhere"
    assert identity(model) == identity(copy.deepcopy(model)) == name
    model.compile(backend="eager")
    assert identity(model) == name
    model.save_pretrained(tmp_path / "saved")
    first, second = (type(model).from_pretrained(tmp_path / "saved") for _ in range(2))
    assert identity(first) == identity(second)


def test_a_model_with_a_hook_is_planned_each_time(plans: list[str]) -> None:
    model = changed(given.hook)
    assert torch.equal(logits(model), logits(model))
    assert len(plans) == 2


@pytest.mark.slow
def test_options_versions_and_tokens_count(
    plans: list[str], text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build("llama", vocab_size=300)
    tokenizer, text = AutoTokenizer.from_pretrained(text_model), tmp_path / "text.txt"
    text.write_text("the pass key is hidden in the text of the model " * 200)

    def count(**options: Any) -> int:
        einfold.cache_for(model, **options).release()
        return len(plans)

    int8: dict[str, Any] = {"cache": "int8"}
    assert count(**int8) == count(**int8) == 1
    assert count(**int8, context=100) == 2
    assert count(**int8, tokenizer=tokenizer) == count(**int8, tokenizer=tokenizer) == 3
    told: dict[str, Any] = {"recipe": {"calibration": {"text": text}}, "tokenizer": tokenizer}
    assert count(**int8, **told) == count(**int8, **told) == 4
    text.write_text("in the key of the model the pass is hidden text " * 200)
    assert count(**int8, **told) == 5
    assert count(**int8, recipe={"calibration": {"tokens": 512}}) == 6
    assert count(prune="streaming_llm:sinks=2,recent=9,slack=5") == 7
    assert count(prune="streaming_llm:sinks=2,recent=10,slack=5") == 8
    monkeypatch.setattr(huggingface_plan, "_versions", lambda: ["another"])
    assert count(**int8) == 9


def test_a_plan_that_was_not_checked_is_none_where_it_should_be(plans: list[str]) -> None:
    model = models.build("llama")
    for check, count in ((False, 1), (False, 1), (True, 2), (True, 2), (False, 2)):
        einfold.cache_for(model, check=check).release()
        assert len(plans) == count


def test_a_plan_that_could_not_be_compared_is_not_kept(
    plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("it needs a GPU")

    monkeypatch.setattr("einfold.evaluate.original.original_logits", fails)
    model = models.build("llama")
    for count in (1, 2):
        einfold.cache_for(model).release()
        assert len(plans) == count


def test_what_is_refused_is_refused_again(plans: list[str], tmp_path: Path) -> None:
    model = models.build("llama", num_hidden_layers=4)
    for _ in range(2):
        with pytest.raises(EinfoldError, match="each layer must keep its own cache"):
            einfold.cache_for(model, share="minicache")
        with pytest.raises(RecipeError, match="is longer than"):
            einfold.cache_for(model, context=100_000)
    assert not (tmp_path / "caches").exists()


def damaged(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


def test_a_damaged_entry_is_made_again(plans: list[str], tmp_path: Path) -> None:
    model = models.build("llama")
    want = logits(model, cache="int8")
    (path,) = (tmp_path / "caches").iterdir()
    path.write_bytes(damaged(path.read_bytes()))
    for _ in range(2):
        assert torch.equal(logits(model, cache="int8"), want)
        assert len(plans) == 2


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan in a folder of what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("kept")
        patch.setenv("EINFOLD_CACHE", str(home))
        einfold.cache_for(models.build("llama"), cache="int8").release()
    (path,) = (home / "caches").iterdir()
    assert huggingface_plan._read(path, True) is not None
    return path


def another_place(data: dict[str, Any]) -> None:
    data["of"] = "another"


def not_checked(data: dict[str, Any]) -> None:
    data["checked"] = False


def no_layout(data: dict[str, Any]) -> None:
    data["layout"] = []


def strange_layout(data: dict[str, Any]) -> None:
    data["layout"] = [line.replace("heads=0,1", "heads=0,7") for line in data["layout"]]


def layer_less(data: dict[str, Any]) -> None:
    data["layers"].pop()


def other_operator(data: dict[str, Any]) -> None:
    text = data["layers"][0]["program"]
    data["layers"][0]["program"] = text.replace("einfold.cached_attention", "aten.from_file")


def weight_less(data: dict[str, Any]) -> None:
    data["layers"][0]["weights"].clear()


def weight_of_another_shape(data: dict[str, Any]) -> None:
    weights = data["layers"][0]["weights"]
    weights |= {name: tensor[:1] for name, tensor in weights.items()}


def no_table(data: dict[str, Any]) -> None:
    data.clear()


FOREIGN = [
    another_place,
    not_checked,
    no_layout,
    strange_layout,
    layer_less,
    other_operator,
    weight_less,
    weight_of_another_shape,
    no_table,
]


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
def test_a_whole_entry_of_something_else_is_none(
    change: Callable[[Any], None], entry: Path, tmp_path: Path
) -> None:
    raw = read(entry, 1 << 30)
    assert raw is not None
    data = torch.load(io.BytesIO(raw), weights_only=True)
    change(data)
    path = tmp_path / entry.name
    assert write(path, lambda file: torch.save(data, file))
    assert huggingface_plan._read(path, True) is None
