"""What layer-wise rates cost beside a training step, signal by signal, at the default intervals.

Blocks of whole steps take turns, with and without rates, each contender with nets of its own, made alike; a block has
as many steps as contain whole intervals of every signal, and ends when the device is idle. The bare optimizer runs
twice: what the second one differs by from the first is noise. The overhead of a signal is formed within each round.

Run by run.py; by hand, from ``benchmarks/``: ``python -m gpu.steps --out ../runs/gpu`` writes ``overhead.json`` and
``overhead.png`` there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from math import lcm
from typing import Any

import torch

import lwkd
from gpu import groups, pictures
from gpu.nets import Pair, batch_of, made, pairs, step_of
from gpu.options import measuring
from gpu.record import provenance, write
from lwkd.program.provenance import quartiles
from lwkd.signals import Hessian, Jacobian

TARGETS = {"attention": 0.01, "jacobian": 0.03, "hessian": 0.03}
SIGNALS: dict[str, Any] = {
    "attention": "attention",
    "jacobian": "jacobian",
    # As it is for most of a training run: the frozen teacher's curvature is known, and not measured any more.
    "hessian": Hessian(tolerance=1e9),
}
BLOCK = lcm(Jacobian.every, Hessian.every)
RESERVE = 10.0
"""Seconds that are kept for the pair that is being measured when time is up, and for the picture."""

FEWEST, MOST = 5, 25
"""Rounds of a pair."""


def idle(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contender(pair: Pair, signal: Any, device: torch.device, nets: Any, inputs: Any) -> Callable[[], None]:
    """A step with this signal; None is the bare optimizer. Each has copies of the nets, and so hooks of its own."""
    student, teacher = copy.deepcopy(nets)
    base = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    if signal is None:
        return step_of(pair, base, student, teacher, *inputs)
    pairing = lwkd.pair(student, teacher, inputs[0][:2])
    wrapped = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, signal=signal)
    return step_of(pair, wrapped, student, teacher, *inputs)


def block(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds a step, over a block of them."""
    idle(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    idle(device)
    return (time.perf_counter() - begin) / steps


def profile(pair: Pair, device: torch.device, seconds: float, small: bool) -> dict[str, Any]:
    """Milliseconds of a step without rates, and the overhead with each signal: quartiles over rounds."""
    begin = time.perf_counter()
    torch._dynamo.reset()
    nets, inputs = made(pair, device), batch_of(pair, device)
    steps = {name: contender(pair, signal, device, nets, inputs) for name, signal in (("bare", None), *SIGNALS.items())}
    steps["bare again"] = contender(pair, None, device, nets, inputs)
    # A warm-up of one block each; the Hessian needs eight measurements until the teacher's curvature counts as known.
    for name, step in steps.items():
        block(step, 9 * Hessian.every if name == "hessian" and not small else BLOCK, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds, fewest = 0, 2 if small else FEWEST
    while rounds < fewest or (rounds < MOST and time.perf_counter() - begin < seconds and not small):
        for name, step in steps.items():
            times[name].append(block(step, BLOCK, device))
        rounds += 1
    bare = times["bare"]
    return {
        "rounds": rounds,
        "steps_in_a_block": BLOCK,
        "step_milliseconds": {name: quartiles([1e3 * s for s in found]) for name, found in times.items()},
        "overhead": {
            name: quartiles([t / b - 1 for t, b in zip(found, bare, strict=True)])
            for name, found in times.items()
            if name != "bare"
        },
    }


def attempted(pair: Pair, device: torch.device, seconds: float, small: bool) -> dict[str, Any]:
    """One pair, or what kept it from being measured."""
    try:
        return profile(pair, device, seconds, small)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    """Exit status 1 if a pair could not be measured."""
    options, device = measuring(__doc__, seconds="shared out among the pairs")
    begin = time.perf_counter()
    wanted = pairs(options.small)
    result: dict[str, Any] = {
        **provenance(device),
        "targets": TARGETS,
        "intervals": {"attention": 1, "jacobian": Jacobian.every, "hessian": Hessian.every},
        "groups": groups.costs(device, options.small),
        "pairs": {},
        "not_reached": [],
    }
    write(options.out / "overhead.json", result)
    try:
        while wanted and (options.small or time.perf_counter() - begin < options.seconds - RESERVE):
            left = options.seconds - RESERVE - (time.perf_counter() - begin)
            found = attempted(wanted[0], device, left / len(wanted), options.small)
            title = wanted.pop(0).title
            result["pairs"][title] = found
            write(options.out / "overhead.json", result)
            print(title, found.get("overhead", found), flush=True)
    except KeyboardInterrupt:  # out of time after all: what there is, is kept
        print("interrupted", flush=True)
    result["not_reached"] = [pair.title for pair in wanted]
    write(options.out / "overhead.json", result)
    pictures.overhead(result, options.out / "overhead.png")
    return int(any("error" in found for found in result["pairs"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
