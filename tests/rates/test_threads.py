"""Two trainings in two threads of one process: own passes one after the other, and no feature of the other's pass."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from signal_runs import SIGNALS
from toy import batches, loss_of, make, nets, train

import lwkd

STEPS = 6


def _training(seed: int, teacher: Any, **options: Any) -> tuple[Callable[[], None], Any]:
    student, _, pairing = nets(seed)
    optimizer, shown = make(
        "wrapper", torch.optim.SGD(student.parameters(), lr=0.05), student, teacher, pairing, **options
    )
    return lambda: train(optimizer, student, teacher, STEPS, seed=seed), shown


def _in_threads(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("signal", ["jvp", "difference", "ggn"])
def test_measurements_that_overlap_are_those_of_each_alone(signal: str) -> None:
    found = []
    for together in (True, False):
        trainings, shown = zip(
            *[_training(seed, nets()[1], signal=SIGNALS[signal], every=1) for seed in (0, 1)], strict=True
        )
        for calls in [trainings] if together else [[one] for one in trainings]:
            _in_threads(*calls)
        found.append([(one.passes["measured"], one.divergences) for one in shown])
    assert found[0] == found[1]
    assert found[0][0][0] == STEPS


class _Waits(torch.nn.Module):
    """A stage that lets the other thread's pass catch up."""

    def __init__(self, stage: torch.nn.Module, wait: Callable[[], Any]) -> None:
        super().__init__()
        self.stage, self.wait = stage, wait

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.stage(x)
        self.wait()
        return found


def test_a_teachers_pass_that_another_threads_ran_into_is_not_compared() -> None:
    teacher = nets()[1]
    meet = threading.Barrier(2, timeout=10)
    shared = copy.deepcopy(teacher)
    shared.low = _Waits(shared.low, meet.wait)

    def once(seed: int) -> Any:
        student, _, _ = nets(seed)
        pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
        optimizer, shown = make("wrapper", torch.optim.SGD(student.parameters(), lr=0.0), student, shared, pairing)
        x, y = next(iter(batches(1, seed=seed)))
        return shown, lambda: (loss_of(student, shared, x, y).backward(), optimizer.step())

    (one, first), (other, second) = once(0), once(1)
    _in_threads(first, second)
    assert one.passes["measured"] + other.passes["measured"] < 2
    meet.abort()  # alone, nobody is waited for
    shared.low.wait = lambda: None
    for shown, call in ((one, first), (other, second)):
        before = shown.passes["measured"]
        call()
        assert shown.passes["measured"] == before + 1
