"""What differs between a CPU and a GPU: clocks, copies to the host, and CUDA graphs that are being captured."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Clock(Protocol):
    """Marks in time, and the seconds between them."""

    device: torch.device

    def mark(self) -> Any:
        """A mark at the present moment."""

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another; both have passed."""

    def passed(self, mark: Any) -> bool:
        """Whether a mark has passed; does not wait."""

    def wait(self, mark: Any) -> None:
        """Wait until a mark has passed."""

    def release(self, mark: Any) -> None:
        """Take back a mark that has passed and is not used any more."""


class HostClock:
    """The host's own clock, for work that is done when the call returns."""

    device = torch.device("cpu")

    def mark(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        """Seconds from one mark to another."""
        return end - begin

    def passed(self, mark: float) -> bool:
        """Always: a mark of the host is in the past."""
        return True

    def wait(self, mark: float) -> None:
        """Nothing to wait for."""

    def release(self, mark: float) -> None:
        """A number is nothing to keep."""


class DeviceClock:
    """CUDA events on the current stream of a GPU, which the host need not wait for.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: list[torch.cuda.Event] = []  # to make an event takes longer than to record it

    def mark(self) -> torch.cuda.Event:
        """An event behind all that was launched so far."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events that have passed."""
        return begin.elapsed_time(end) / 1000

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the GPU has reached the event."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Wait until the GPU has reached the event."""
        mark.synchronize()

    def release(self, mark: torch.cuda.Event) -> None:
        """Record the event again in a later :meth:`mark`."""
        self._spare.append(mark)

    def __getstate__(self) -> dict[str, Any]:
        """Events mean nothing in another process, and one of two copies would record those of the other."""
        return {"device": self.device, "_spare": []}


def clock_of(device: torch.device) -> Clock:
    """The clock for nets on this device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


class HostCopy:
    """Asynchronous device-to-host copy; :meth:`tensor` waits for it.

    A tensor on a GPU is copied into pinned memory on the current stream, followed by an event: :meth:`tensor` waits for
    that event only. A tensor on the CPU is kept as it is.

    Args:
        tensor: any shape and dtype. The caller leaves it alone afterwards.

    >>> copy = HostCopy(torch.tensor([1.0, 2.0]))
    >>> copy.deferred, copy.tensor()
    (False, tensor([1., 2.]))
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type != "cpu":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def deferred(self) -> bool:
        """Whether there is a copy to wait for: False for a tensor of the CPU."""
        return self._event is not None

    def tensor(self) -> Tensor:
        """The values on the CPU, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


class Written:
    """What was written on the current stream of a device, up to now, and may be read on another stream later.

    A stream other than the default one may be gone by then, so that an event is kept of it: one for each object of this
    class, and none where all is done on the default stream. On the CPU nothing is kept.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = 0  # the handle of the default stream
        self._event: torch.cuda.Event | None = None
        self._captured = False
        if _on_gpu(device):
            self._captured = capturing()
            self._stream = torch._C._cuda_getCurrentRawStream(device.index)
            if self._stream:
                self._event = torch.cuda.current_stream(device).record_event()

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Written | None:
        """For tensors that were just written; None where none of them is on a GPU."""
        for tensor in tensors:
            if _on_gpu(tensor.device):
                return cls(tensor.device)
        return None

    def read(self, tensors: Iterable[Tensor], what: str) -> None:
        """Before these tensors are read on the current stream, which waits for them; the host does not.

        Their memory is not used again before that stream has read them, whoever lets go of them and when.

        Args:
            tensors: what was written; those that are on the CPU are left out.
            what: they are called in messages.

        Raises:
            RuntimeError: of writing and reading, one is captured in a CUDA graph and the other is not; or a tensor is
                sparse or nested, whose memory torch cannot keep for another stream.
        """
        if not _on_gpu(self._device):
            return
        if self._captured != capturing():
            made, read = ("while", "outside of it") if self._captured else ("before", "in it")
            raise RuntimeError(
                f"{what} were made {made} a CUDA graph was captured, and are read {read}: a replay would not make them "
                "again. Capture the passes of both nets and the step, or none of them"
            )
        if self._event is None and torch._C._cuda_getCurrentRawStream(self._device.index) == 0:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._event is None:
            stream.wait_stream(torch.cuda.default_stream(self._device))
        else:
            stream.wait_event(self._event)  # even of a stream with the same handle, which may be another one
        if stream.cuda_stream == self._stream:
            return
        for tensor in tensors:
            if _on_gpu(tensor.device):
                if tensor.layout != torch.strided:
                    raise RuntimeError(
                        f"{what} have the layout {tensor.layout}, and were made on another stream than they are read "
                        "on. Call both nets and step() on one stream, or with dense tensors"
                    )
                tensor.record_stream(stream)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream: what is launched runs later, nothing can be read.

    >>> capturing()
    False
    """
    # Asked first, because without a driver the other question is an error.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
