"""Tokens that leave a cache between steps, against what should be there by definition."""

from __future__ import annotations

import gc
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einfold.compiler.ir.kv.codes.half_bytes import as_slots, numbers
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import Buffer, CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.storage import read_storage
from einfold.compiler.ir.types import DTYPES as TORCH_TYPES
from einfold.errors import EinfoldError
from einfold.runtime.cache import Cache

HEADS, SIZE = 2, 4


def layout(window: Window, storage: str = "f32") -> CacheLayout:
    group = HeadGroup((0, 1), window, read_storage(storage))
    return CacheLayout((LayerCache(0, HEADS, SIZE, SIZE, (group,)),))


def write(cache: Cache, tokens: Any) -> None:
    """What a step does: tokens [rows, new, heads, size] go behind the used slots."""
    new = tokens.shape[1]
    cache.make_room(new)
    for row, used in enumerate(cache.clocks["slots.0"]):
        for part, sign in (("key", 1), ("value", -1)):
            slots = cache.buffers[f"cache.0.0.{part}"][row]
            slots[:, used : used + new] = as_slots(sign * tokens[row].swapaxes(0, 1), slots)
    cache.advance(new)


windows = st.builds(
    Window,
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["exact", "streaming"]),
)


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(1, 30), st.data())
def test_a_window_holds_its_sinks_the_newest_tokens_and_the_mean_of_the_rest(
    window: Window, total: int, data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(1, total))
    text = np.random.default_rng(0).standard_normal((2, total, HEADS, SIZE)).astype(np.float32)
    cache = Cache.allocate(layout(window), 2, total, prompt)
    seen = 0
    while seen < total:
        end = prompt if seen < prompt else total
        new = data.draw(st.integers(1, min(cache.step_limit(), end - seen)))
        write(cache, text[:, seen : seen + new])
        seen += new
        if seen == prompt:
            cache.settle()
        kept = int(cache.clocks["slots.0"][0]) - window.compensation
        for row in range(2):
            for part, sign in (("key", 1), ("value", -1)):
                slots = cache.buffers[f"cache.0.0.{part}"][row][:, window.compensation :]
                words = sign * text[row, :seen].transpose(1, 0, 2)
                recent = max(0, kept - window.sinks)
                sinks = min(window.sinks, kept)
                np.testing.assert_array_equal(slots[:, :sinks], words[:, :sinks])
                np.testing.assert_array_equal(
                    slots[:, sinks:kept], words[:, seen - recent :] if recent else words[:, :0]
                )
                gone = words[:, sinks : seen - recent]
                if window.compensation:
                    count = cache.buffers["cache.0.0.count"][row]
                    assert (count == gone.shape[1]).all()
                    if gone.shape[1]:
                        mean = cache.buffers[f"cache.0.0.{part}"][row][:, 0]
                        np.testing.assert_allclose(mean, gone.mean(1), rtol=1e-5, atol=1e-6)
        assert kept == seen or kept >= window.sinks + window.recent


def test_rows_move_by_their_own_length() -> None:
    cache = Cache.allocate(layout(Window(1, 2, 2)), 2, 20)
    text = np.arange(2 * 9 * HEADS * SIZE, dtype=np.float32).reshape(2, 9, HEADS, SIZE)
    write(cache, text[:, :4])
    cache.clocks["slots.0"][1] = 2  # row 1 has seen two tokens, and two of padding
    cache.lengths[1] = 2
    write(cache, text[:, 4:6])
    assert cache.clocks["slots.0"].tolist() == [5, 4]
    assert cache.lengths.tolist() == [6, 4]
    keys = cache.buffers["cache.0.0.key"]
    np.testing.assert_array_equal(keys[0][:, :5], text[0, [0, 2, 3, 4, 5]].transpose(1, 0, 2))
    np.testing.assert_array_equal(keys[1][:, :4], text[1, [0, 1, 4, 5]].transpose(1, 0, 2))


def test_the_mean_of_integers_is_rounded_only_where_it_is_stored() -> None:
    cache = Cache.allocate(layout(Window(0, 1, 1, compensation=True), "i8"), 1, 20)
    for step in range(8):
        write(cache, np.full((1, 1, HEADS, SIZE), step, np.float32))
    gone = np.arange(int(cache.buffers["cache.0.0.count"][0, 0]))
    assert len(gone) == 6
    np.testing.assert_allclose(cache.buffers["cache.0.0.mean_key"][0], gone.mean())
    assert cache.buffers["cache.0.0.key"][0, 0, 0].tolist() == [round(gone.mean())] * SIZE
    assert cache.buffers["cache.0.0.value"].dtype == np.int8


def test_the_mean_of_codes_of_four_bits_goes_into_half_bytes() -> None:
    cache = Cache.allocate(layout(Window(0, 1, 1, compensation=True), "i4/channel"), 1, 20)
    for step in range(8):
        write(cache, np.full((1, 1, HEADS, SIZE), step, np.float32))
    assert cache.buffers["cache.0.0.key"].shape[3] == SIZE // 2
    gone = np.arange(int(cache.buffers["cache.0.0.count"][0, 0]))
    np.testing.assert_allclose(cache.buffers["cache.0.0.mean_value"][0], -gone.mean())
    for part, mean in (("key", gone.mean()), ("value", -gone.mean())):
        assert numbers(cache.buffers[f"cache.0.0.{part}"])[0, 0, 0].tolist() == [round(mean)] * SIZE


@pytest.mark.parametrize("storage", ["f32", "i8", "i4/channel"])
def test_a_device_s_tensors_are_kept_as_arrays_are(storage: str) -> None:
    """Torch and NumPy beside each other through moves, means and the end of the prompt."""
    text = np.random.default_rng(0).standard_normal((2, 20, HEADS, SIZE)).astype(np.float32) * 20
    text = text if storage == "f32" else text.round()

    def tensors(spec: Buffer) -> torch.Tensor:
        return torch.zeros(spec.shape, dtype=TORCH_TYPES[spec.dtype])

    held = layout(Window(1, 4, 2, compensation=True), storage)
    plain = Cache.allocate(held, 2, 20, 8)
    device = Cache.allocate(held, 2, 20, 8, tensors)
    for start, end in [(0, 5), (5, 8), (8, 9), (9, 11), (11, 12), (12, 13)]:
        write(plain, text[:, start:end])
        write(device, torch.from_numpy(text[:, start:end]))
        if end == 8:
            plain.settle()
            device.settle()
    assert plain.buffers["cache.0.0.count"].max() > 4
    for name, buffer in device.buffers.items():
        assert isinstance(buffer, torch.Tensor)
        np.testing.assert_allclose(buffer.numpy(), plain.buffers[name], rtol=1e-5, atol=1e-5)
    assert device.nbytes == plain.nbytes


def test_a_step_larger_than_the_slack_is_refused() -> None:
    cache = Cache.allocate(layout(Window(1, 4, 2)), 1, 100)
    assert cache.step_limit() == 2
    write(cache, np.zeros((1, 7, HEADS, SIZE), np.float32))
    with pytest.raises(EinfoldError, match="3 tokens in one step do not fit 7 slots"):
        cache.make_room(3)


def test_a_short_context_needs_no_moves() -> None:
    window = Window(1, 4, 2, compensation=True)
    cache = Cache.allocate(layout(window), 1, 6)
    assert cache.buffers["cache.0.0.key"].shape == (1, HEADS, 7, SIZE)
    assert cache.step_limit() == 6
    assert replace(window, slack=9).slots(6) == 7


def mapped() -> int:
    """Bytes of shared memory that are resident: the buffers that are mapped one by one, and nothing else
    of what a process of many tests holds."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssShmem:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_settled_prompt_gives_its_memory_back() -> None:
    """To the system: what the C library holds in its heap, where arrays of this size would go, is not
    counted as mapped."""
    group = HeadGroup((0, 1), Window(1, 200, 60))
    many = CacheLayout(tuple(LayerCache(n, 2, 64, 64, (group,)) for n in range(8)))
    gc.collect()  # caches of earlier tests, or they would go in between
    empty = mapped()
    cache = Cache.allocate(many, 1, 8000, 8000)
    for buffer in cache.buffers.values():
        buffer[:] = 1
    peak = mapped()
    cache.advance(8000)
    cache.settle()
    for buffer in cache.buffers.values():
        buffer[:] = 1
    steady = mapped()
    slack = mmap.PAGESIZE * len(cache.buffers)  # the last page of each buffer
    assert 0 <= peak - empty - int(many.bytes(1, 8000, 8000)) <= slack  # type: ignore[arg-type]
    assert 0 <= steady - empty - int(many.bytes(1, 8000)) <= slack  # type: ignore[arg-type]
