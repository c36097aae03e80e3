"""Where nets are."""

from __future__ import annotations

import torch
from torch import nn

from lwkd.names import unwrap


def device_of(net: nn.Module) -> torch.device:
    """The device of the net's first parameter; the CPU for a net without any.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    first = next(net.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def on_one_device(student: nn.Module, teacher: nn.Module, of_student: torch.device, of_teacher: torch.device) -> None:
    """Check that both nets can be compared.

    Raises:
        RuntimeError: what is compared is on different devices; both nets are named.
    """
    if of_student != of_teacher:
        raise RuntimeError(
            f"the student ({type(unwrap(student)).__name__}) is on {of_student}, the teacher "
            f"({type(unwrap(teacher)).__name__}) on {of_teacher}; both must be on one device to be compared. Call "
            f"teacher.to({str(of_student)!r}) before training"
        )
