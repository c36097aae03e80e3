"""A tensor on its way from the device to the host, which nothing has to wait for."""

from __future__ import annotations

import torch
from torch import Tensor


class Arrival:
    """A copy on the host that is there later.

    The values of a tensor on a GPU are copied into pinned memory behind what was launched before, and an event is put
    behind the copy: :meth:`tensor` waits for that event only. A tensor on the CPU is there at once, and is not copied.

    Args:
        tensor: what is to arrive; any shape and dtype. The caller leaves it alone afterwards.

    >>> arrival = Arrival(torch.tensor([1.0, 2.0]))
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
