"""The kernels that stream features, compiled in several ways: which registers, or asynchronous copies, are fastest.

``kernels/spec.py`` chooses by the bytes that a loop keeps in flight, as the machine code shows them. Whether the memory
agrees is measured here, on inputs of real nets, in turns. Part of ``ops.json``.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.inputs import Case, work
from benchmarks.gpu.timing import Call, on_device, wait
from benchmarks.harness import SMALL, take_turns
from benchmarks.shapes import stages
from lwkd.kernels import images, spec
from lwkd.kernels.interface import TUNING, Setting
from lwkd.ops.extension import _C

TRIED: dict[str, Setting | None] = {
    "as shipped": None,
    "left alone": {"STAGES": 1},
    "64 registers": {"STAGES": 1, "maxnreg": 64},
    "80 registers": {"STAGES": 1, "maxnreg": 80},
    "3 stages": {"STAGES": 3},
}
"""Names of tunings; None is what spec.py states."""

CALLS = 10
"""Of which the times of the kernels are averaged."""

ROUNDS, SECONDS = (2, 1.0) if SMALL else (7, 2.0)


def use(tuning: Setting | None) -> None:
    """Compile the kernels that stream features in this way from now on; those that were loaded are forgotten."""

    def find(text: str, architecture: int) -> tuple[bytes, str, list[int], int, int, int]:
        variant = spec.parse(text)
        if tuning is None or not set(TUNING) & set(variant.setting):
            return images.find(text, architecture)
        return _tuned(text, f"sm_{architecture}", tuple(tuning.items()))

    _C.set_image_provider(find)


_made: dict[tuple[Any, ...], tuple[bytes, str, list[int], int, int, int]] = {}


def _tuned(text: str, target: str, tuning: tuple[tuple[str, Any], ...]) -> tuple[bytes, str, list[int], int, int, int]:
    from lwkd.kernels.compile import compile_variant, image_of

    if (text, target, tuning) not in _made:
        image = image_of(compile_variant(text, target, dict(tuning)), text, target)
        found = image.code, image.entry, list(image.parameters), image.hidden, image.shared, image.warps
        _made[text, target, tuning] = found
    return _made[text, target, tuning]


def cases() -> list[Case]:
    """Stages of an ImageNet net at two batch sizes, in each dtype and memory order."""
    shapes = {"small": stages(2, 4, 8, 2)} if SMALL else {f"B={batch}": stages(batch, 64, 56, 4) for batch in (64, 1)}
    return [
        Case(op, f"imagenet {size}", of, dtype, memory)
        for op in ("divergence", "jacobian sums")
        for (size, of), dtype, memory in itertools.product(
            shapes.items(), (torch.float32, torch.bfloat16), ("contiguous", "channels_last")
        )
        if op == "divergence" or memory == "contiguous"
    ]


def kernel_times(call: Call, device: torch.device) -> dict[str, float]:
    """Microseconds of each kernel of a call, as shipped: the second stage beside the first."""
    use(None)
    call()
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        wait(device)
    found = {event.key: event.device_time_total for event in profile.key_averages()}
    return {
        name: round(total / CALLS, 2) for name, total in found.items() if name.startswith(("attention", "jacobian"))
    }


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Microseconds on the device by tuning, and the gigabytes a second that the best one reads."""
    job = work(case, device)
    call = job.implementations["lwkd"]

    def turn(tuning: Setting | None) -> float:
        use(tuning)
        call()  # loads
        found = sorted(on_device(call, device, milliseconds=5.0))
        return 1e6 * found[len(found) // 2]

    shipped = kernel_times(call, device)
    taken = take_turns({name: partial(turn, of) for name, of in TRIED.items()}, ROUNDS, seconds=SECONDS)
    medians = {name: sorted(found)[len(found) // 2] for name, found in taken.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "microseconds": {name: [round(min(found), 2), round(max(found), 2)] for name, found in taken.items()},
        "best": best,
        "kernels_microseconds": shipped,
        "gigabytes_a_second": round(job.bytes / medians[best] / 1e3, 1),
    }


def variants(device: torch.device) -> dict[str, Any]:
    """By case; nothing without a GPU, or without a Triton that could compile."""
    if device.type != "cuda" or images.triton_version() is None:
        return {}
    try:
        return {case.name: measured(case, device) for case in cases()}
    finally:
        use(None)
