"""What it costs on the host that layer-wise rates split a parameter group: one optimizer step with 1 to 16 groups."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.nets import Pair, batch_of, convolutional, made
from benchmarks.gpu.timing import host, wait
from benchmarks.harness import SMALL, timed
from benchmarks.training import distil
from lwkd.program.provenance import quartiles
from lwkd.program.turns import take_turns

GROUPS = (1, 4, 8, 16)
TENSORS, SIDE = 64, 8 if SMALL else 256
ROUNDS, STEPS = (2, 2) if SMALL else (51, 20)
BASES = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.01, fused=True),
}


def optimizer_steps(device: torch.device) -> dict[str, Any]:
    """Microseconds that ``step`` keeps the host: equal tensors shared out among groups, which take turns."""
    found: dict[str, Any] = {}
    for name, base in BASES.items():
        steps = {}
        for count in GROUPS:
            tensors = [torch.randn(SIDE, SIDE, device=device, requires_grad=True) for _ in range(TENSORS)]
            for tensor in tensors:
                tensor.grad = torch.randn_like(tensor)
            share = TENSORS // count
            groups = [{"params": tensors[i : i + share]} for i in range(0, TENSORS, share)]
            steps[str(count)] = partial(host, base(groups).step, device)
        taken = take_turns(steps, ROUNDS, warm_up=3)
        found[name] = {count: quartiles([1e6 * seconds for seconds in of]) for count, of in taken.items()}
    return found


def small_step(device: torch.device) -> dict[str, float]:
    """Microseconds of a training step that is too small for the device to be the bottleneck."""
    pair = Pair("cnn_16→cnn_8", convolutional("cnn_16"), convolutional("cnn_8"), 28, 2 if SMALL else 64, False)
    student, teacher = made(pair, device)
    x, y = batch_of(pair, device)
    optimizer = BASES["SGD"](student.parameters())

    def block() -> None:
        for _ in range(STEPS):
            distil(student, teacher, optimizer, x, y)
        wait(device)

    taken = take_turns({"step": timed(block)}, 2 if SMALL else 15, warm_up=3)
    return quartiles([1e6 * seconds / STEPS for seconds in taken["step"]])


def costs(device: torch.device) -> dict[str, Any]:
    """Both, and the share of the small step that more groups than one add."""
    steps, step = optimizer_steps(device), small_step(device)
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
