"""Contenders that take turns, step by step, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lwkd.program.errors import ProgramError
from lwkd.program.profile.inputs import Nets
from lwkd.program.profile.intervals import mean_overhead
from lwkd.program.profile.timed_step import Contender, Lap
from lwkd.signals import Attention, Signal

FEWEST, MOST = 3, 25
"""Rounds."""

FEW_ROWS = 4
"""Rows of the steps that come first: measurements cost the same on them, and steps next to nothing."""


@dataclass(frozen=True)
class Turn:
    """What a contender did in one round: a step that was not measured, and one that was (None: it never is)."""

    plain: Lap
    due: Lap | None = None

    def seconds(self, every: int) -> float:
        """Of a step, on average at this interval."""
        return self._mean(self.plain.seconds, None if self.due is None else self.due.seconds, every)

    def phase(self, name: str, every: int) -> float:
        """Seconds of one phase, on average at this interval."""
        return self._mean(self.plain.phases[name], None if self.due is None else self.due.phases[name], every)

    def added(self, bare_update: float, every: int) -> float:
        """Seconds that layer-wise rates add to a step, on average at this interval; see :meth:`Lap.added`."""
        due = None if self.due is None else self.due.added(bare_update)
        return self._mean(self.plain.added(bare_update), due, every)

    @staticmethod
    def _mean(plain: float, due: float | None, every: int) -> float:
        return plain if due is None else mean_overhead(due, plain, every)


def take_turns(
    contenders: Mapping[Any, Contender], nets: Nets, early: int, seconds: float, tell: Callable[[int], None]
) -> dict[Any, list[Turn]]:
    """Steps of all contenders, round by round; those that measure measure every other step.

    Args:
        contenders: by a name of any kind.
        nets: whose batch all see.
        early: steps before the first round, on few rows.
        seconds: after which no round is begun, but for the first few.
        tell: told the number of each round.
    """
    few = nets.first(FEW_ROWS)
    for contender in contenders.values():
        for _ in range(early):
            contender.step(few)
        for _ in range(2):
            contender.step(nets)
    found: dict[Any, list[Turn]] = {name: [] for name in contenders}
    order, begin, rounds = list(contenders), time.monotonic(), 0
    while rounds < FEWEST or (rounds < MOST and time.monotonic() - begin < seconds):
        tell(rounds + 1)
        for name in order:
            found[name].append(_turn(contenders[name], nets))
        rounds += 1
        random.Random(rounds).shuffle(order)  # nobody always comes after the same one
    return found


def _turn(contender: Contender, nets: Nets) -> Turn:
    if not contender.measures:
        return Turn(contender.step(nets))
    laps = {lap.measured: lap for lap in (contender.step(nets), contender.step(nets))}
    if len(laps) != 2:
        raise ProgramError(
            f"signal {contender.signal_name}: a step that was due had no pass of the student matched with one of the "
            "teacher",
            "both nets must be called once a step with the same batch; is one of them called inside the other?",
        )
    return Turn(laps[False], laps[True])


def alone(
    asked: Mapping[str, tuple[Signal, list[int], bool]],
    nets: Nets,
    features: tuple[list[torch.Tensor], list[torch.Tensor]],
    rounds: int,
    clock: Any,
) -> dict[str, dict[int, list[float]]]:
    """Seconds of measurements themselves by name and rows, in turns.

    Args:
        asked: by name, a signal, the numbers of rows, and whether the teacher's curvature is taken for known.
        nets: what is measured on.
        features: student's and teacher's, of all rows: what attention is measured on.
        rounds: how many.
        clock: by which.
    """
    calls = {
        (name, rows): _measurement(signal, nets.first(rows), features, rows, known)
        for name, (signal, sizes, known) in asked.items()
        for rows in sizes
    }
    found: dict[str, dict[int, list[float]]] = {
        name: {rows: [] for rows in sizes} for name, (_, sizes, _) in asked.items()
    }
    for round_ in range(rounds + 1):
        for (name, rows), call in calls.items():
            begin = clock.mark()
            call()
            end = clock.mark()
            clock.wait(end)
            if round_:  # the first is the warm-up
                found[name][rows].append(clock.between(begin, end))
    return found


def _measurement(
    signal: Signal, nets: Nets, features: tuple[list[torch.Tensor], list[torch.Tensor]], rows: int, known: bool
) -> Callable[[], object]:
    if isinstance(signal, Attention):
        student, teacher = ([feature[:rows] for feature in side] for side in features)
        return lambda: signal.measure(student, teacher)
    more = {"known": torch.ones(len(nets.pairing))} if known and signal.name == "hessian" else {}
    return lambda: signal.measure(nets.student, nets.teacher, nets.pairing, nets.inputs, seed=1, **more)
