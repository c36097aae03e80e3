"""What layer-wise rates cost beside a training step, signal by signal, at the default intervals.

Blocks of whole steps take turns, with and without rates, each implementation with nets of its own, made alike; a block
has as many steps as contain whole intervals of every signal, and ends when the device is idle. The bare optimizer runs
twice: what the second one differs by from the first is noise. The overhead of a signal is formed within each round.

Run by run.py; by hand ``python -m benchmarks.gpu.steps --out runs/gpu`` writes ``overhead.json`` and ``overhead.png``
there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Any

import torch

import lwkd
from benchmarks.gpu import groups, pictures, stage
from benchmarks.gpu.nets import Pair, batch_of, made, pairs
from benchmarks.gpu.timing import wait
from benchmarks.harness import SMALL, take_turns, timed
from benchmarks.training import distil
from lwkd.program.provenance import origin, quartiles
from lwkd.signals import Hessian, Jacobian

TARGETS = {"attention": 0.01, "jacobian": 0.03, "hessian": 0.03}
SIGNALS: dict[str, Any] = {
    "attention": "attention",
    "jacobian": "jacobian",
    # As it is for most of a training run: the frozen teacher's curvature is known, and not measured any more.
    "hessian": Hessian(tolerance=1e9),
}
BLOCK = lcm(Jacobian.every, Hessian.every)
EARLY = BLOCK if SMALL else 27 * Hessian.every
"""Steps of the Hessian signal before the first round: eight of the first 26 measure the teacher, which is known then."""

FEWEST, MOST = (2, 2) if SMALL else (5, 25)
"""Rounds of a pair."""


def step_of(pair: Pair, signal: Any, nets: Any, inputs: Any) -> Callable[[], None]:
    """A step with this signal; None is the bare optimizer. Each has copies of the nets, and so hooks of its own."""
    student, teacher = copy.deepcopy(nets)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    if signal is not None:
        pairing = lwkd.pair(student, teacher, inputs[0][:2])
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, signal=signal)
    return partial(distil, student, teacher, optimizer, *inputs, pair.half)


def block(step: Callable[[], None], steps: int, device: torch.device) -> Callable[[], float]:
    """Seconds a step, over a block of them."""

    def run() -> None:
        for _ in range(steps):
            step()
        wait(device)

    def turn() -> float:
        wait(device)
        return timed(run)() / steps

    return turn


def profile(pair: Pair, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step without rates, and the overhead with each signal: quartiles over rounds."""
    begin = time.perf_counter()
    torch._dynamo.reset()
    nets, inputs = made(pair, device), batch_of(pair, device)
    signals = {"bare": None, **SIGNALS, "bare again": None}
    steps = {name: step_of(pair, signal, nets, inputs) for name, signal in signals.items()}
    for name, step in steps.items():
        block(step, EARLY if name == "hessian" else BLOCK, device)()
    blocks = {name: block(step, BLOCK, device) for name, step in steps.items()}
    left = seconds - (time.perf_counter() - begin)
    times = take_turns(blocks, MOST, fewest=FEWEST, seconds=left)
    bare = times["bare"]
    return {
        "rounds": len(bare),
        "steps_in_a_block": BLOCK,
        "step_milliseconds": {name: quartiles([1e3 * s for s in found]) for name, found in times.items()},
        "overhead": {
            name: quartiles([t / b - 1 for t, b in zip(found, bare, strict=True)])
            for name, found in times.items()
            if name != "bare"
        },
    }


def main() -> int:
    """Exit status 1 if a pair could not be measured."""
    options, device = stage.options_of(__doc__)
    result: dict[str, Any] = {
        **origin(device),
        "targets": TARGETS,
        "intervals": {"attention": 1, "jacobian": Jacobian.every, "hessian": Hessian.every},
        "groups": groups.costs(device),
    }

    def attempt(pair: Pair, seconds: float) -> dict[str, Any]:
        return stage.attempted(partial(profile, pair, device, seconds), device)

    work = {pair.title: partial(attempt, pair) for pair in pairs()}
    stage.measured_in_time(options.out / "overhead.json", result, "pairs", work, options.until)
    pictures.overhead(result, options.out / "overhead.png")
    return int(any("error" in found for found in result["pairs"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
