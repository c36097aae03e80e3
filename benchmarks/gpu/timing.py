"""Times on a device, and on the host where a dry run has no device.

Three times of one call say different things. ``latency``: from an idle device to the end of the call's work, what a
loop that waits for the host sees. ``on_device``: the call's work alone, its inputs not in the cache. ``host``: how long
the host is kept before it may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.harness import timed
from lwkd.program.provenance import quartiles
from lwkd.program.turns import take_turns

Call = Callable[[], Any]

ROUNDS, FEWEST, WARM_UP = 15, 5, 3

OTHERS = 1 << 26
"""Numbers of other memory that are read before a call, 256 MiB, more than any GPU's cache holds."""

FASTEST_CLOCK = 2e9
"""Cycles a second: a device that waits for so many waits for a second, or a little longer."""


class Times(NamedTuple):
    """Seconds of one call."""

    latency: float
    on_device: float
    host: float


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(call: Call, device: torch.device, milliseconds: float) -> list[float]:
    """Seconds of the call's work, as often as it fits into ``milliseconds``, and once at least.

    Before each call other memory is read, so that nothing of the call's is in the cache and nothing there has yet to be
    written back, and the device waits for longer than the host takes, so that the whole call is in its queue when it
    begins: what is measured does not depend on the host.
    """
    if device.type != "cuda":
        return [timed(call)()]
    others = torch.zeros(OTHERS, device=device)
    ahead = int(FASTEST_CLOCK * (2 * host(call, device) + 20e-6))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: list[float] = []
    while not found or sum(found) < milliseconds / 1e3:
        others.sum()
        torch.cuda._sleep(ahead)
        begin.record()
        call()
        end.record()
        wait(device)
        found.append(begin.elapsed_time(end) / 1e3)
    return found


def times(call: Call, device: torch.device) -> Times:
    """All three; on a CPU each is the call's own duration."""
    if device.type != "cuda":
        return Times(*3 * [timed(call)()])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait(device)
    begin.record()
    host = timed(call)()
    end.record()
    end.synchronize()
    alone = sorted(on_device(call, device, milliseconds=1.0))
    return Times(begin.elapsed_time(end) / 1e3, alone[len(alone) // 2], host)


def host(call: Call, device: torch.device) -> float:
    """Seconds until the call returns; the device is idle before, so that no queue is full."""
    wait(device)
    return timed(call)()


def launches(call: Call, device: torch.device) -> dict[str, Any]:
    """What one call starts on a GPU, as the profiler sees it; None where it sees nothing at all."""
    names: list[str] = []
    if device.type == "cuda":
        wait(device)
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                wait(device)
        except RuntimeError as error:
            print(f"launches cannot be counted: {error}", flush=True)
            return {"kernels": None, "copies": None, "launched": None}
        names = [
            event.name
            for event in profile.events() or []
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
    if not names:
        return {"kernels": None, "copies": None, "launched": None}
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies, "launched": [name[:60] for name in names[:12]]}


def compare(
    implementations: Mapping[str, Call], device: torch.device, rounds: int = ROUNDS, longest: float = 8.0
) -> dict[str, Any]:
    """Times of all implementations in microseconds, in turns, and how many times longer than lwkd each one takes.

    Args:
        implementations: by name; ``lwkd`` must be among them, and must run. Another one that raises is left out, with
            what it said.
        device: where they run.
        rounds: turns of each.
        longest: seconds after which no further round is begun, however few there were.
    """
    running: dict[str, Call] = {}
    result: dict[str, Any] = {}
    for name, call in implementations.items():
        try:
            for _ in range(WARM_UP):
                times(call, device)
            running[name] = call
        except Exception as error:
            if name == "lwkd":
                raise
            result[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    turns = {name: lambda call=call: times(call, device) for name, call in running.items()}
    taken = take_turns(turns, rounds, fewest=FEWEST, seconds=longest)
    ours = Times(*zip(*taken["lwkd"], strict=True))
    for name, found in taken.items():
        of = Times(*zip(*found, strict=True))
        figures: dict[str, Any] = {
            f"{kind}_microseconds": quartiles([1e6 * s for s in getattr(of, kind)]) for kind in Times._fields
        }
        for kind in ("latency", "on_device"):
            pairs = zip(getattr(of, kind), getattr(ours, kind), strict=True)
            figures[f"{kind}_ratio"] = quartiles([other / mine for other, mine in pairs])
        result[name] = figures | launches(running[name], device)
    return {"rounds": len(taken["lwkd"]), "implementations": result}
