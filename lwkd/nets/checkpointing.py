"""Activation checkpointing (``torch.utils.checkpoint``) inside passes that the library makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint as checkpoints

from lwkd.nets.precision import Shared


class _PassedThrough:
    """``CheckpointFunction``, whose function simply runs where that is asked for."""

    def __init__(self, own: Any, asked: Callable[[], bool]) -> None:
        self.own, self.asked = own, asked

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args) if self.asked() else self.own.apply(function, preserve, *args)


def passing_checkpoints(asked: Callable[[], bool]) -> Shared:
    """A change of torch by which checkpointed parts of a net run as they are, in passes for which this is asked.

    Reentrant checkpoints have no derivative but that of ``backward()``, and neither kind has a forward mode. Those that
    are not reentrant go on saving memory in passes with a graph.

    Args:
        asked: whether the current pass is one of the library's own.
    """

    @contextmanager
    def change() -> Iterator[None]:
        function, generator = checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator

        def generated(*args: Any, **kwargs: Any) -> Any:
            recorded = torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
            return generator(*args, **kwargs) if recorded or not asked() else iter((None,))

        checkpoints.CheckpointFunction = _PassedThrough(function, asked)  # type: ignore[misc, assignment]
        checkpoints._checkpoint_without_reentrant_generator = generated
        try:
            yield
        finally:
            checkpoints.CheckpointFunction = function  # type: ignore[misc]
            checkpoints._checkpoint_without_reentrant_generator = generator

    return Shared(change)
