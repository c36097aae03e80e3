"""What a run saves, and runs that go on from it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def through_a_file(state: Any) -> Any:
    """Saved, and loaded with weights only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(student: nn.Module, optimizer: Any, shown: Any) -> list[Any]:
    """What a checkpoint holds."""
    return through_a_file([student.state_dict(), optimizer.state_dict(), shown.state_dict()])


def resume(state: list[Any], student: nn.Module, optimizer: Any, shown: Any) -> None:
    """Go on from a checkpoint."""
    student.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    if shown is not optimizer:
        shown.load_state_dict(state[2])


def assert_continues(run: Callable[..., tuple[list[Tensor], dict[str, float]]], steps: int) -> None:
    """Parameters and rates after a run in two parts, the second from what the first saved, are those of a whole one."""
    whole = run(range(steps))
    run(range(steps // 2), save=True)
    parameters, rates = run(range(steps // 2, steps), load=True)
    assert rates == whole[1]
    assert all(map(torch.equal, parameters, whole[0]))
