"""What it costs on the host that layer-wise rates split a parameter group: one optimizer step with 1 to 16 groups."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu.clock import clock_of
from gpu.nets import Pair, batch_of, convolutional, made, step_of
from lwkd.program.provenance import quartiles

GROUPS = (1, 4, 8, 16)
TENSORS, SIDE = 64, 256
BASES = {"SGD": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, fused=True)}
BASES["AdamW"] = lambda groups: torch.optim.AdamW(groups, 0.01, fused=True)
ROUNDS, STEPS = 51, 20


def optimizer_steps(device: torch.device, small: bool) -> dict[str, Any]:
    """Microseconds that ``step`` keeps the host: equal tensors shared out among groups, which take turns."""
    side, clock = 8 if small else SIDE, clock_of(device)
    found: dict[str, Any] = {}
    for name, base in BASES.items():
        optimizers = {}
        for count in GROUPS:
            tensors = [torch.randn(side, side, device=device, requires_grad=True) for _ in range(TENSORS)]
            for tensor in tensors:
                tensor.grad = torch.randn_like(tensor)
            share = TENSORS // count
            optimizers[count] = base([{"params": tensors[i : i + share]} for i in range(0, TENSORS, share)])
        times: dict[int, list[float]] = {count: [] for count in GROUPS}
        for turn in range(3 + (5 if small else ROUNDS)):
            for count, optimizer in optimizers.items():
                seconds = clock.host(optimizer.step)
                if turn >= 3:
                    times[count].append(1e6 * seconds)
        found[name] = {str(count): quartiles(of) for count, of in times.items()}
    return found


def small_step(device: torch.device, small: bool) -> dict[str, float]:
    """Microseconds of a training step that is too small for the device to be the bottleneck."""
    pair = Pair("cnn_16→cnn_8", convolutional("cnn_16"), convolutional("cnn_8"), 28, 2 if small else 64, False)
    student, teacher = made(pair, device)
    optimizer = BASES["SGD"](student.parameters())
    step, clock = step_of(pair, optimizer, student, teacher, *batch_of(pair, device)), clock_of(device)
    times = []
    for turn in range(3 + (2 if small else 15)):
        clock.wait()
        begin = time.perf_counter()
        for _ in range(2 if small else STEPS):
            step()
        clock.wait()
        if turn >= 3:
            times.append(1e6 * (time.perf_counter() - begin) / (2 if small else STEPS))
    return quartiles(times)


def costs(device: torch.device, small: bool) -> dict[str, Any]:
    """Both, and the share of the small step that more groups than one add."""
    steps, step = optimizer_steps(device, small), small_step(device, small)
    added = {
        name: {count: round((of["median"] - found["1"]["median"]) / step["median"], 4) for count, of in found.items()}
        for name, found in steps.items()
    }
    return {
        "tensors": TENSORS,
        "optimizer_step_microseconds_on_the_host": steps,
        "small_training_step_microseconds": step,
        "added_share_of_the_small_step": added,
    }
