"""What layer-wise rates cost beside a training step, signal by signal.

Jacobian and Hessian are measured oftener than by default, so that a block has several measurements; what they cost at
the default interval follows from that. Blocks of whole steps take turns, with and without rates, each implementation
with nets of its own, made alike; a block has as many steps as contain whole intervals of every signal, and ends when
the device is idle. The bare optimizer runs twice: what the second one differs by from the first is noise. The
overhead of a signal is formed within each round.

Run by run.py; by hand ``python -m benchmarks.gpu.steps --out runs/gpu`` writes ``overhead.json`` and ``overhead.png``
there.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Any
from unittest import mock

import torch

import lwkd
from benchmarks.gpu import groups, pictures, stage
from benchmarks.gpu.nets import Pair, batch_of, made, pairs
from benchmarks.gpu.timing import wait
from benchmarks.harness import SMALL, timed
from benchmarks.training import distil
from lwkd.nets import passes
from lwkd.program.provenance import origin, quartiles
from lwkd.program.turns import take_turns
from lwkd.signals import Hessian, default_interval, signal_named

TF32 = "jacobian in TF32"
"""What the Jacobian would cost if its passes were made as the training's are: IEEE convolutions take longer."""

TARGETS = {"attention": 0.01, "jacobian": 0.03, "hessian": 0.03}
SIGNALS: dict[str, Any] = {
    "attention": "attention",
    "jacobian": "jacobian",
    TF32: "jacobian",
    # As it is for most of a training run: the frozen teacher's curvature is known, and not measured any more.
    "hessian": Hessian(tolerance=1e9),
}
INTERVALS = {"attention": 1, "jacobian": 10, TF32: 10, "hessian": 5}
"""Updates from one measurement to the next here."""

BLOCK = lcm(*INTERVALS.values())
EARLY = BLOCK if SMALL else 27 * INTERVALS["hessian"]
"""Steps of the Hessian signal before the first round: the teacher's curvature is known after eight measurements, the
last of which is that of the 26th due update."""

FEWEST, MOST = (2, 2) if SMALL else (5, 25)
"""Rounds of a pair."""


def default_intervals(device: torch.device) -> dict[str, int]:
    """Updates from one measurement of each signal to the next, where the user does not choose."""
    return {name: default_interval(signal_named(signal), device) for name, signal in SIGNALS.items()}


def step_of(pair: Pair, name: str, nets: Any, inputs: Any) -> Callable[[], None]:
    """A step with the signal of this name, or the bare one. Each has copies of the nets, and so hooks of its own."""
    student, teacher = copy.deepcopy(nets)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    if name in SIGNALS:
        pairing = lwkd.pair(student, teacher, inputs[0][:2])
        chosen: Any = {"signal": SIGNALS[name], "every": INTERVALS[name], "policy": lwkd.Relative()}
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, **chosen)
    return partial(distil, student, teacher, optimizer, *inputs, pair.half)


def block(step: Callable[[], None], steps: int, device: torch.device, *, ieee: bool = True) -> Callable[[], float]:
    """Seconds a step, over a block of them; without ``ieee`` measurements leave the switches of precision alone."""

    def run() -> None:
        with contextlib.nullcontext() if ieee else mock.patch.object(passes, "ieee_float32", contextlib.nullcontext):
            for _ in range(steps):
                step()
            wait(device)

    def turn() -> float:
        wait(device)
        return timed(run)() / steps

    return turn


class Contenders:
    """The implementations of a pair, of which one that raises is left out, with what it said, and the others go on."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    def attempt(self, name: str, turn: Callable[[], Any]) -> Any:
        """What the turn gives, or None once it has raised.

        Raises:
            Exception: what the bare optimizer raises, without which there is nothing to compare with.
        """
        if name in self.failed:
            return None
        try:
            return turn()
        except Exception as error:
            if name == "bare":
                raise
            self.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None


def profile(pair: Pair, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step, the steps that a measurement takes, the overhead by default: quartiles over rounds."""
    begin = time.perf_counter()
    torch._dynamo.reset()
    nets, inputs = made(pair, device), batch_of(pair, device)
    contenders = Contenders()
    blocks = {}
    for name in ("bare", *SIGNALS, "bare again"):

        def prepared(name: str = name) -> Callable[[], float]:
            step, ieee = step_of(pair, name, nets, inputs), name != TF32
            block(step, EARLY if name == "hessian" else BLOCK, device, ieee=ieee)()
            return block(step, BLOCK, device, ieee=ieee)

        blocks[name] = contenders.attempt(name, prepared)
    turns = {
        name: partial(contenders.attempt, name, turn) for name, turn in blocks.items() if name not in contenders.failed
    }
    left = seconds - (time.perf_counter() - begin)
    times = take_turns(turns, MOST, fewest=FEWEST, seconds=left)
    for name in contenders.failed:
        times.pop(name, None)
    bare = times["bare"]
    measurements = {
        name: [INTERVALS[name] * (t / b - 1) for t, b in zip(times[name], bare, strict=True)]
        for name in SIGNALS
        if name in times
    }
    by_default = default_intervals(device)
    return {
        "rounds": len(bare),
        "steps_in_a_block": BLOCK,
        "failed": contenders.failed,
        "step_milliseconds": {name: quartiles([1e3 * s for s in found]) for name, found in times.items()},
        "steps_a_measurement": {name: quartiles(found) for name, found in measurements.items()},
        "overhead": {
            **{name: quartiles([s / by_default[name] for s in found]) for name, found in measurements.items()},
            "bare again": quartiles([t / b - 1 for t, b in zip(times["bare again"], bare, strict=True)]),
        },
    }


def main() -> int:
    """Exit status 1 if a pair, one of its signals, or the groups could not be measured."""
    options, device = stage.options_of(__doc__)
    result: dict[str, Any] = {
        **origin(device),
        "targets": TARGETS,
        "signals": list(SIGNALS),
        "intervals": INTERVALS,
        "default_intervals": default_intervals(device),
        "groups": stage.attempted(partial(groups.costs, device), device),
    }

    def attempt(pair: Pair, seconds: float) -> dict[str, Any]:
        return stage.attempted(partial(profile, pair, device, seconds), device)

    work = {pair.title: partial(attempt, pair) for pair in pairs()}
    stage.measured_in_time(options.out / "overhead.json", result, "pairs", work, options.until)
    pictures.overhead(result, options.out / "overhead.png")
    measured = result["groups"], *result["pairs"].values()
    return int(any("error" in found or found.get("failed") for found in measured))


if __name__ == "__main__":
    raise SystemExit(main())
