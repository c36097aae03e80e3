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
from benchmarks.harness import SMALL
from benchmarks.shapes import stages
from lwkd.kernels import images, spec
from lwkd.kernels.interface import Setting
from lwkd.ops.extension import _C
from lwkd.program.turns import take_turns

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


Loadable = tuple[bytes, str, list[int], int, int, int]
"""An image as the C++ extension takes it."""

_made: dict[tuple[str, str], Loadable] = {}
"""By variant and name of the tuning."""


def use(name: str) -> None:
    """Compile the kernels that stream features in this way from now on; those that were loaded are forgotten."""

    def find(text: str, architecture: int) -> Loadable:
        if TRIED[name] is None or not streams(text):
            return images.find(text, architecture)
        if (text, name) not in _made:
            _made[text, name] = tuned(text, f"sm_{architecture}", name)
        return _made[text, name]

    _C.set_image_provider(find)


def streams(text: str) -> bool:
    """Whether this variant has a loop over features."""
    return "STAGES" in spec.parse(text).setting


def tuned(text: str, target: str, name: str) -> Loadable:
    """The image of a variant with this tuning."""
    from lwkd.kernels.compile import compile_variant, image_of

    image = image_of(compile_variant(text, target, TRIED[name]), text, target)
    return image.code, image.entry, list(image.parameters), image.hidden, image.shared, image.warps


def compile_all(cases: list[Case], device: torch.device) -> None:
    """Every tuning of what the cases launch, in several processes: one after another would take a minute."""
    from lwkd.kernels.compile import in_parallel

    asked: dict[str, None] = {}

    def find(text: str, architecture: int) -> Loadable:
        if streams(text):
            asked[text] = None
        return images.find(text, architecture)

    _C.set_image_provider(find)
    for case in cases:
        work(case, device, sets=1).implementations["lwkd"]()
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    wanted = [(text, target, name) for text in asked for name, tuning in TRIED.items() if tuning is not None]
    for (text, _, name), image in zip(wanted, in_parallel(tuned, wanted), strict=True):
        _made[text, name] = image


def cases() -> list[Case]:
    """Stages of an ImageNet net at two batch sizes, in each dtype and memory order."""
    shapes = {"small": stages(2, 4, 8, 2)} if SMALL else {f"B={batch}": stages(batch, 64, 56, 4) for batch in (64, 1)}
    return [
        Case(op, f"imagenet {size}", of, dtype, memory, compiles=False)
        for op in ("divergence", "jacobian sums")
        for (size, of), dtype, memory in itertools.product(
            shapes.items(), (torch.float32, torch.bfloat16), ("contiguous", "channels_last")
        )
        if op == "divergence" or memory == "contiguous"
    ]


def kernel_times(call: Call, device: torch.device) -> dict[str, float]:
    """Microseconds of each kernel of a call, as shipped: the second stage beside the first."""
    use("as shipped")
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

    def turn(name: str) -> float:
        use(name)
        call()  # loads
        found = sorted(on_device(call, device, milliseconds=5.0))
        return 1e6 * found[len(found) // 2]

    shipped = kernel_times(call, device)
    taken = take_turns({name: partial(turn, name) for name in TRIED}, ROUNDS, seconds=SECONDS)
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
        compile_all(cases(), device)
        return {case.name: measured(case, device) for case in cases()}
    finally:
        use("as shipped")
