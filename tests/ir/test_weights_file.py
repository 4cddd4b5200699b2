from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open

from einfold.compiler.ir.weights import Weight, WeightStore, derive
from einfold.compiler.ir.weights_file import ALIGNMENT, write_weights
from einfold.errors import IRError


def store() -> WeightStore:
    found = WeightStore()
    found.add("odd", Weight.of(torch.arange(3, dtype=torch.float32)))
    found.add("big", Weight.of(torch.randn(64, 64)))
    found.add("codes", Weight.of(torch.randint(0, 255, (5, 7), dtype=torch.uint8)))
    found.add("half", Weight.of(torch.randn(32, 32), torch.float16))
    return found


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    weights = store()
    want = {name: weights[name].load() for name in weights}
    placements, digest = write_weights(weights, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    assert blake3(data).hexdigest() == digest
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(want)
        for name, tensor in want.items():
            assert torch.equal(file.get_tensor(name), tensor)
            place = placements[name]
            raw = data[place.offset : place.offset + place.length]
            assert raw == tensor.numpy().tobytes()
    assert placements["big"].offset % ALIGNMENT == placements["half"].offset % ALIGNMENT == 0


def test_weights_are_released_as_they_are_written(tmp_path: Path) -> None:
    weights = store()
    write_weights(weights, tmp_path / "w.safetensors")
    with pytest.raises(IRError, match="no data"):
        weights["big"].load()
    assert weights["big"].shape == (64, 64)


def test_parts_of_one_computation_are_computed_once() -> None:
    calls = []

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return torch.ones(2), torch.zeros(3, dtype=torch.uint8)

    first, second = derive([((2,), torch.float32), ((3,), torch.uint8)], compute)
    assert not calls
    assert first.load().tolist() == [1, 1]
    assert second.load().tolist() == [0, 0, 0]
    assert len(calls) == 1


def test_a_derived_weight_must_come_out_as_described() -> None:
    (weight,) = derive([((2,), torch.float32)], lambda: (torch.ones(3),))
    with pytest.raises(IRError, match="came out as"):
        weight.load()
