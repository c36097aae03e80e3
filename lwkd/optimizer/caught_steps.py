"""Steps that reach an optimizer past whoever would scale them, caught by its step hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lwkd.optimizer.param_groups import STEP_HOOKS, Call
from lwkd.optimizer.step import LayerwiseStep


class StepHooks:
    """Acts on steps that reach an optimizer past whoever would scale them: frameworks keep a step that they saw first.

    Where ``step`` raises, the optimizer has its own groups back when it is next stepped or saved.

    Args:
        optimizer: the base.
        layerwise: what a step is put into.
        acts: whether every step is scaled, or (False) those inside :meth:`acting` alone.
    """

    def __init__(self, optimizer: Optimizer, layerwise: LayerwiseStep, *, acts: bool = True) -> None:
        self._layerwise, self._acts = layerwise, acts
        self._open: contextlib.AbstractContextManager[Call] | None = None
        self._handles = []
        # Hooks fire once a step, if the step of one class has them.
        hooked = [kind for kind in type(optimizer).__mro__ if getattr(vars(kind).get("step"), "hooked", False)]
        if len(hooked) == 1 and vars(optimizer).keys() >= STEP_HOOKS:
            self._handles = [
                optimizer.register_step_pre_hook(self._begin),
                optimizer.register_step_post_hook(self._end),
            ]
            # timm's Lookahead has hooks of steps only; they fire once somebody has called zero_grad on one.
            if hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
                self._handles.append(optimizer.register_state_dict_pre_hook(lambda _: self._give_up()))

    def __bool__(self) -> bool:
        """Whether this optimizer calls step hooks."""
        return bool(self._handles)

    @contextlib.contextmanager
    def acting(self, acts: bool) -> Iterator[None]:
        """Steps inside are scaled, or (False) left alone, since they are scaled already."""
        before, self._acts = self._acts, acts
        try:
            yield
        finally:
            self._acts = before

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._acts:
            return None
        self._give_up()
        step = self._layerwise.around(args[1:], kwargs)
        call_args, call_kwargs = step.__enter__()
        self._open = step
        return (optimizer, *call_args), call_kwargs

    def _end(self, *_: Any) -> None:
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(None, None, None)

    def _give_up(self) -> None:
        """After a step that raised: the optimizer's own groups are put back."""
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(RuntimeError, RuntimeError("the step of the optimizer raised"), None)

    def remove(self) -> None:
        """Let go of the optimizer."""
        self._give_up()
        for handle in self._handles:
            handle.remove()
