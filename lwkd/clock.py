"""Clocks: what an update and a measurement have taken, on the host or on a GPU's own time line."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks in time, and how far they are apart."""

    device: torch.device

    def mark(self) -> Any:
        """Now."""

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another; both have passed."""

    def passed(self, mark: Any) -> bool:
        """Whether a mark has passed; waits for nothing."""

    def wait(self, mark: Any) -> None:
        """Wait until a mark has passed."""


class HostClock:
    """The host's own clock, for work that is done when the call returns."""

    device = torch.device("cpu")

    def mark(self) -> float:
        """Seconds, from some moment on."""
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        """Seconds from one mark to another."""
        return end - begin

    def passed(self, mark: float) -> bool:
        """Always: a mark of the host is in the past."""
        return True

    def wait(self, mark: float) -> None:
        """Nothing to wait for."""


class DeviceClock:
    """Events on the current stream of a GPU: what passes there between two of them, while the host is elsewhere.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event behind all that was launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events that have passed."""
        return begin.elapsed_time(end) / 1000

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the GPU has come that far."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Until the GPU has come that far."""
        mark.synchronize()


def clock_of(device: torch.device) -> Clock:
    """The clock for nets on this device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
