"""Steps and measurements are timed in turns: what is found in each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from lwkd.program.errors import ProgramError
from lwkd.program.profile.inputs import Nets
from lwkd.program.profile.timed_step import StepTime, TimedStep
from lwkd.program.turns import take_turns
from lwkd.rates.device import Clock
from lwkd.signals import Signal

Key = TypeVar("Key")

FEWEST, MOST = 3, 25
"""Rounds."""

FEW_ROWS = 4
"""Rows of the warm-up steps: a measurement costs on them what it always costs, the rest of a step next to nothing."""


def mean_overhead(due: float, not_due: float, every: int) -> float:
    """Mean cost of an update, when one update in ``every`` is measured.

    >>> mean_overhead(due=0.1, not_due=0.0, every=10)
    0.01
    """
    return (due + (every - 1) * not_due) / every


@dataclass(frozen=True)
class Round:
    """One round of a timed step: a step without a measurement, and one with it (None where nothing is measured)."""

    plain: StepTime
    due: StepTime | None = None

    def seconds(self, every: int) -> float:
        """Of a step, on average at this interval."""
        return self._mean(lambda step: step.seconds, every)

    def phase(self, name: str, every: int) -> float:
        """Seconds of one phase, on average at this interval."""
        return self._mean(lambda step: step.phases[name], every)

    def added(self, bare_update: float, every: int) -> float:
        """Seconds that layer-wise rates add to a step, on average at this interval; see :meth:`StepTime.added`."""
        return self._mean(lambda step: step.added(bare_update), every)

    def _mean(self, of: Callable[[StepTime], float], every: int) -> float:
        return of(self.plain) if self.due is None else mean_overhead(of(self.due), of(self.plain), every)


def time_steps(
    steps: Mapping[Key, TimedStep], nets: Nets, early: int, seconds: float, tell: Callable[[int], None]
) -> dict[Key, list[Round]]:
    """Time all steps in turns; those that measure make two steps a round, one of them measured.

    Args:
        steps: by any key.
        nets: their batch is the same for all steps.
        early: warm-up steps, on few rows.
        seconds: after which no round is begun, but for the first few.
        tell: called with the number of each round, from 1 on.
    """
    few = nets.first(FEW_ROWS)
    for step in steps.values():
        for _ in range(early):
            step.run(few)
        for _ in range(2):
            step.run(nets)
    rounds = {key: partial(_round, step, nets) for key, step in steps.items()}
    return take_turns(rounds, MOST, fewest=FEWEST, seconds=seconds, shuffled=True, tell=tell)


def _round(step: TimedStep, nets: Nets) -> Round:
    if not step.measures:
        return Round(step.run(nets))
    found = {took.measured: took for took in (step.run(nets), step.run(nets))}
    if len(found) != 2:
        raise ProgramError(
            f"signal {step.signal.name if step.signal else None}: a step that was due had no pass of the student "
            "matched with one of the teacher",
            "both nets must be called once a step with the same batch; is one of them called inside the other?",
        )
    return Round(found[False], found[True])


def time_measurements(
    asked: Mapping[str, tuple[Signal, list[int], bool]],
    nets: Nets,
    features: tuple[list[torch.Tensor], list[torch.Tensor]],
    rounds: int,
    clock: Clock,
) -> dict[str, dict[int, list[float]]]:
    """Seconds of measurements themselves, outside steps, by name and rows.

    Args:
        asked: by name: a signal, the numbers of rows, and whether the teacher's curvature is taken for known.
        nets: what is measured on.
        features: student's and teacher's, of all rows: what attention is measured on.
        rounds: how many.
        clock: takes the times.
    """

    def timed(call: Callable[[], object]) -> float:
        begin = clock.mark()
        call()
        end = clock.mark()
        clock.wait(end)
        return clock.between(begin, end)

    calls = {
        (name, rows): partial(timed, _measurement(signal, nets.first(rows), features, rows, known))
        for name, (signal, sizes, known) in asked.items()
        for rows in sizes
    }
    found = take_turns(calls, rounds, warm_up=1, shuffled=True)
    return {name: {rows: found[name, rows] for rows in sizes} for name, (_, sizes, _) in asked.items()}


def _measurement(
    signal: Signal, nets: Nets, features: tuple[list[torch.Tensor], list[torch.Tensor]], rows: int, known: bool
) -> Callable[[], object]:
    measure: Any = signal.measure
    if not signal.replays:
        student, teacher = ([feature[:rows] for feature in side] for side in features)
        return lambda: measure(student, teacher)
    layers = len(nets.pairing)
    more = {"known": torch.ones(layers)} if known and signal.memory(layers) is not None else {}
    return lambda: measure(nets.student, nets.teacher, nets.pairing, nets.inputs, seed=1, **more)
