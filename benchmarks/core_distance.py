"""How far apart two cores are: the time that a cache line takes from one to the other.

Cores that share a cache hand a line over in 30 to 60 ns, cores of different chiplets in 150 to 300. Which
of the two a virtual machine's processors are may change from second to second, as the host moves them about,
and engines that pass much between their threads take up to twice as long while they are apart. So each round
notes it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

#: Two threads, each on a core of its own, that count up one number in turns; prints nanoseconds a turn.
_SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { TURNS = 200000 };
static _Atomic int number;

static void stay(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void count(int first) {
    for (int turn = first; turn < TURNS; turn += 2) {
        while (atomic_load(&number) != turn) {}
        atomic_store(&number, turn + 1);
    }
}

static void *other(void *core) {
    stay(*(int *)core);
    count(1);
    return 0;
}

int main(int argc, char **argv) {
    int near = atoi(argv[1]), far = atoi(argv[2]);
    struct timespec start, end;
    pthread_t thread;
    stay(near);
    pthread_create(&thread, 0, other, &far);
    clock_gettime(CLOCK_MONOTONIC, &start);
    count(0);
    pthread_join(thread, 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%f\n", ((end.tv_sec - start.tv_sec) * 1e9 + end.tv_nsec - start.tv_nsec) / TURNS);
}
"""


@cache
def _program() -> Path | None:
    """The compiled program; None where there is no C compiler or it cannot compile this."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="core-distance-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = folder / "distance.c"
    source.write_text(_SOURCE)
    made = subprocess.run(
        [compiler, "-O2", "-pthread", str(source), "-o", str(folder / "distance")],
        capture_output=True,
        check=False,
    )
    return None if made.returncode else folder / "distance"


def core_distance() -> float | None:
    """Nanoseconds that a cache line takes between the first two cores of this process.

    None on one core, without a C compiler, or where threads cannot be kept on cores.
    """
    program = _program()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if program is None or len(cores) < 2:
        return None
    words = [str(program), str(cores[0]), str(cores[1])]
    try:
        ran = subprocess.run(words, capture_output=True, check=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return float(ran.stdout)
