"""Pages of mapped checkpoints go when memory is given back, and come back when they are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from einfold.compiler.frontend.huggingface import ModelSource, load_state
from einfold.compiler.ir import mapped
from einfold.compiler.ir.heap import give_back

from .. import models

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system tells of its mappings on Linux alone"
)

NUMBERS = 1 << 20


def resident(file: Path) -> int:
    """Bytes of a file that are among this process's memory, its own copies of pages apart."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1] == str(file)
        elif ours and words[0] in ("Rss:", "Anonymous:"):
            found += int(words[1]) * 1024 * (1 if words[0] == "Rss:" else -1)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mapped, "_files", set())
    path = tmp_path.resolve() / "model.safetensors"
    save_file({"weight": torch.arange(NUMBERS, dtype=torch.float32)}, path)
    return path


def numbers(file: Path) -> Tensor:
    """Those of the file, mapped so that they may be written to without changing it."""
    behind = file.stat().st_size // 4 - NUMBERS
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    return torch.tensor([], dtype=torch.float32).set_(storage, behind, (NUMBERS,))


def test_pages_go_and_are_read_again(file: Path) -> None:
    held = numbers(file)
    wanted = held.clone()
    assert resident(file) >= 4 * NUMBERS
    give_back()
    assert resident(file) >= 4 * NUMBERS  # nobody said that it may be read again
    mapped.read_again([file])
    give_back()
    assert resident(file) == 0
    assert torch.equal(held, wanted)


def test_what_was_written_stays(file: Path) -> None:
    held, other = numbers(file), numbers(file)
    assert other.sum() == held.sum()
    held[NUMBERS // 2] = -1.0
    mapped.read_again([file])
    give_back()
    assert held[NUMBERS // 2] == -1.0
    assert other[NUMBERS // 2] == NUMBERS // 2


def test_links_are_followed(file: Path) -> None:
    link = file.with_name("link.safetensors")
    link.symlink_to(file)
    held = numbers(link)
    assert held.sum() > 0
    mapped.read_again([link])
    give_back()
    assert resident(file) == 0


def test_a_checkpoint_that_was_loaded_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_files", set())
    folder = models.save("llama", tmp_path.resolve() / "model", vocab_size=4096)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    give_back()
    state = load_state(ModelSource("model", folder), config)
    before = {name: each.clone() for name, each in state.items()}
    assert resident(folder / "model.safetensors") > 1 << 20
    give_back()
    assert resident(folder / "model.safetensors") == 0
    assert all(torch.equal(each, before[name]) for name, each in state.items())
