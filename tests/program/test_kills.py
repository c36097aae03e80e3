"""Runs that are killed (SIGKILL: nothing can be saved any more) at random moments end with the same bits when resumed.

In CI two; `make kills` (LWKD_KILLS: how many) a hundred. A failure names its seed, which gives the moments as shares
of the time that a run takes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time

import pytest
from program_runs import COMPARE, TINY, assert_same_run, lwkd

TRIES = int(os.environ.get("LWKD_KILLS", "2"))
pytestmark = pytest.mark.timeout(300 + 120 * TRIES)


def run(arguments: tuple[str, ...]) -> None:
    result = lwkd("distill", *TINY, *COMPARE, *arguments)
    print(result.output)
    sys.exit(result.exit_code)


@pytest.fixture(scope="module")
def started():
    """Starts the program in a process of its own; they are forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["program_runs", "torch._dynamo", "sklearn.datasets", "matplotlib.figure"])

    def start(*arguments):
        process = context.Process(target=run, args=(tuple(map(str, arguments)),))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(started, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    started("--out", out / "first").join()  # what the first one imports and caches takes longer
    began = time.monotonic()
    process = started("--out", out / "second")
    process.join()
    assert process.exitcode == 0
    assert_same_run(out / "second", out / "first")
    return out / "second", time.monotonic() - began


@pytest.mark.parametrize("seed", range(TRIES))
def test_a_killed_run_goes_on_to_the_same_bits(started, whole, tmp_path, seed):
    moments = random.Random(seed)
    out, seconds = whole
    for _ in range(moments.choice((1, 1, 2, 3))):
        process = started("--out", tmp_path, "--resume")
        process.join(moments.uniform(0, 1.1) * seconds)
        process.kill()
        process.join()
    process = started("--out", tmp_path, "--resume")
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path, out)
