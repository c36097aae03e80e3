"""Times on a device, and on the host where a dry run has no device.

Three times of one call say different things. ``latency``: from an idle device to the end of the call's work, what a
loop that waits for the host sees. ``on_device``: the call's work alone, with the host far enough ahead that the device
never waits for it. ``host``: how long the host is kept before it may go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

Call = Callable[[], Any]

CYCLES = 2.0e9
"""A second of a GPU's clock, no less than any GPU has."""


class Launches(NamedTuple):
    """What one call starts on the device."""

    kernels: int
    copies: int
    names: list[str]


class HostClock:
    """For the dry run: all three times are the call's own duration."""

    device = torch.device("cpu")
    cache_bytes = 1 << 12

    def latency(self, call: Call) -> float:
        """Seconds of one call."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    host = latency

    def on_device(self, call: Call, head_start: float) -> tuple[float, bool]:
        """Seconds of one call, and that the host was ahead, which says nothing here."""
        return self.latency(call), True

    def launches(self, call: Call) -> Launches | None:
        """Nothing is launched."""
        return None

    def wait(self) -> None:
        """Nothing to wait for."""


class DeviceClock:
    """Events on the current stream of a GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.launches(lambda: torch.zeros(1, device=device))  # the first profile finds the profiler half awake

    def latency(self, call: Call) -> float:
        """Seconds from the start of the call, on an idle device, to the end of its work."""
        self.wait()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def host(self, call: Call) -> float:
        """Seconds until the call returns; the device is idle before, so that no queue is full."""
        self.wait()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def on_device(self, call: Call, head_start: float) -> tuple[float, bool]:
        """Seconds of the device's work, and whether the host was ahead of it all the time.

        Args:
            call: what is timed.
            head_start: seconds for which the device is kept busy with nothing, so that the host can launch everything;
                0 leaves it idle.
        """
        self.wait()
        if head_start:
            torch.cuda._sleep(int(head_start * CYCLES))
        self._begin.record()
        call()
        self._end.record()
        ahead = not self._begin.query()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3, ahead

    def launches(self, call: Call) -> Launches | None:
        """What one call starts on the device, as the profiler sees it; None where it sees nothing at all."""
        self.wait()
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                self.wait()
        except RuntimeError as error:
            print(f"launches cannot be counted: {error}", flush=True)
            return None
        names = [
            event.name
            for event in profile.events() or []
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
        return Launches(len(names) - len(copies), len(copies), names) if names else None

    def wait(self) -> None:
        """Until the device is idle."""
        torch.cuda.synchronize(self.device)


Clock = HostClock | DeviceClock


def clock_of(device: torch.device) -> Clock:
    """The clock for this device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
