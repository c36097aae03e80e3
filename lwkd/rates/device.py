"""What differs between a CPU and a GPU: clocks, copies to the host, and the capture of CUDA graphs."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor


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


class HostCopy:
    """A copy on the host that is there later.

    The values of a tensor on a GPU are copied into pinned memory behind what was launched before, and an event is put
    behind the copy: :meth:`tensor` waits for that event only. A tensor on the CPU is there at once, and is not copied.

    Args:
        tensor: what is to arrive; any shape and dtype. The caller leaves it alone afterwards.

    >>> arrival = HostCopy(torch.tensor([1.0, 2.0]))
    >>> arrival.deferred, arrival.tensor()
    (False, tensor([1., 2.]))
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type != "cpu":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def deferred(self) -> bool:
        """Whether there is anything to wait for: False for a tensor of the CPU."""
        return self._event is not None

    def tensor(self) -> Tensor:
        """The values, on the CPU; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def capturing() -> bool:
    """Whether the current stream is being captured; False where CUDA is not in use.

    >>> capturing()
    False
    """
    # Asked first, because without a driver the other question is an error.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
