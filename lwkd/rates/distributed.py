"""Sums over the ranks of ``torch.distributed``."""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_recent: deque[Tensor] = deque(maxlen=8)
"""What was summed last on the CPU, where a thread of gloo may still hold it after the sum is there."""

PATIENCE = 5.0
"""Seconds that the end of Python waits for such threads; they let go within milliseconds."""


@atexit.register
def wait_until_let_go() -> None:
    """Wait until no thread of gloo holds a tensor of ours.

    To let go of one it needs the interpreter, and where that has ended meanwhile the process aborts ("terminate called
    without an active exception"). A tensor that C++ holds has one reference more.
    """
    end = time.monotonic() + PATIENCE
    while _recent and time.monotonic() < end:
        tensor = _recent.popleft()
        while sys.getrefcount(tensor) > 2 and time.monotonic() < end:  # this name, and the argument
            time.sleep(0.001)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks there are in a process group, None being the default one; 1 without ``torch.distributed``."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over all ranks, on the device of the tensor, which may be overwritten. Every rank has to call it.

    The sum is formed on that device where the process group has a backend for it (NCCL has none for the CPU), else on
    the current device of a kind for which it has one.

    Raises:
        RuntimeError: another rank has ended, or did not come within the group's timeout.
    """
    if world_size(group) == 1:
        return tensor
    kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    together = tensor if tensor.device.type in kinds else tensor.to(torch.device(kinds[0]))
    try:
        dist.all_reduce(together, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"the sum of lwkd's statistics over {world_size(group)} ranks did not come about: another rank has ended, "
            "or made no optimizer step within the group's timeout. Every rank of the group has to make every step; "
            "look at the first error of all ranks, and start again from the last checkpoint. Models that not all ranks "
            f"share need process_group=... ({error})"
        ) from error
    if together.device.type == "cpu":
        _recent.append(together)
    return together.to(tensor.device)


class Ranks:
    """The ranks over which statistics are summed.

    A copy shares the group; a pickle cannot hold it, and what comes out of one must be given a group to sum again.

    Args:
        group: None is the default group, as it is when it is asked for.

    Raises:
        TypeError: it is no process group.
        ValueError: this rank is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if group is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group is one that this rank is not in; give each rank the group of its own model")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is a {type(group).__name__}; expected a torch.distributed.ProcessGroup (of a "
                "DeviceMesh: mesh.get_group()), or None for all ranks"
            )
        self.group, self.lost = group, False

    @property
    def count(self) -> int:
        """How many there are."""
        return world_size(self.group)

    def summed(self, tensor: Tensor) -> Tensor:
        """See :func:`summed`."""
        return summed(tensor, self.group)

    def __deepcopy__(self, _: Any) -> Ranks:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None, "lost": self.lost or self.group is not None}
