"""Ctrl-C is raised at the end of a region that might lose it, and never becomes another error."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest
import torch

from einfold.compiler.frontend.modules import capture_module
from einfold.compiler.ir.interrupts import Later, tracing
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program

pytestmark = pytest.mark.usefixtures("handlers")


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of a program that runs in the foreground, whatever the tests run in."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(work: Callable[[], None]) -> bool:
    try:
        work()
    except KeyboardInterrupt:
        return True
    return False


def test_it_waits_for_the_end_of_a_region() -> None:
    reached = []

    def work() -> None:
        with Later():
            press()
            reached.append("the end")

    assert interrupted(work)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_press_does_not_wait() -> None:
    reached = []

    def work() -> None:
        with Later():
            press()
            press()
            reached.append("the end")

    assert interrupted(work)
    assert not reached


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("renamed", [True, False])
def test_what_swallows_or_renames_it_does_not_keep_it(hold: bool, renamed: bool) -> None:
    def work() -> None:
        with Later(hold):
            with suppress(BaseException):
                press()
            if renamed:
                raise RuntimeError("it went wrong")

    assert interrupted(work)


def test_regions_nest() -> None:
    reached = []

    def work() -> None:
        with tracing(), Later():
            with Later():
                press()
            reached.append("the end")

    assert interrupted(work)
    assert reached


def test_a_handler_of_the_programs_own_is_called_once() -> None:
    met = []

    def note(number: int, frame: FrameType | None) -> None:
        met.append(number)

    signal.signal(signal.SIGINT, note)
    with tracing(), Later():
        press()
    assert met == [signal.SIGINT]


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Later():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_are_left_alone() -> None:
    met: list[BaseException] = []

    def work() -> None:
        try:
            with Later():
                pass
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not met


def test_at_any_moment_of_reading_a_graph() -> None:
    """Torch's fake tensors make another exception of it, or none."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(20)))
    text = print_program(capture_module(layers, (torch.zeros(2, 8),)).program)
    started = time.perf_counter()
    parse(text)
    taken = time.perf_counter() - started
    chance, pressed = random.Random(0), 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGALRM, lambda number, frame: press())
    caught = 0
    for _ in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, taken * chance.random()))
            parse(text)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            caught += 1
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert caught == pressed > 5
