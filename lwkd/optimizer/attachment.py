"""The other form of the wrapper: :func:`attach` works on the user's own optimizer object."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lwkd.optimizer.caught_steps import StepHooks
from lwkd.optimizer.metrics import RateMetrics
from lwkd.optimizer.nested import where_steps_come
from lwkd.optimizer.param_groups import STEP_HOOKS
from lwkd.optimizer.step import LayerwiseStep
from lwkd.optimizer.wrapper import LayerwiseOptimizer
from lwkd.pairing import Pairing
from lwkd.policies import Policy
from lwkd.signals import Signal


class Attachment(RateMetrics):
    """What :func:`attach` returns: the rates of an optimizer whose ``step`` was patched."""

    def __init__(self, optimizer: Optimizer, layerwise: LayerwiseStep) -> None:
        self._layerwise, self._optimizer, self.active = layerwise, optimizer, True
        self._on_load: RemovableHandle | None = None
        base_step = optimizer.step
        self._hooks = StepHooks(optimizer, layerwise)
        if hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):
            self._on_load = optimizer.register_load_state_dict_post_hook(lambda _: layerwise.note_load())

        @functools.wraps(base_step)
        def step(opt: Optimizer, *args: Any, **kwargs: Any) -> Any:
            with self._hooks.acting(False):
                return (hooked_step if self.active else bare_step)(opt, *args, **kwargs)

        def bare_step(opt: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return base_step(*args, **kwargs)

        def layerwise_step(opt: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return layerwise(base_step, *args, **kwargs)

        # A base that never ran the constructor of Optimizer has no hooks.
        has_hooks = vars(optimizer).keys() >= STEP_HOOKS
        hooked_step = Optimizer.profile_hook_step(layerwise_step) if has_hooks else layerwise_step
        step.lwkd_attachment = self  # type: ignore[attr-defined]
        self._had_own_step = vars(optimizer).get("step")
        # A bound method, because schedulers that patch step in turn ask it for its function.
        self._patched = types.MethodType(step, optimizer)
        optimizer.step = self._patched  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the optimizer its own step back and remove the hooks from both nets."""
        self._layerwise.close()
        self._hooks.remove()
        if self._on_load is not None:
            self._on_load.remove()
        self.active = False
        # A scheduler may have patched over ours; then the inactive one stays and only passes calls on.
        if vars(self._optimizer).get("step") is self._patched:
            if self._had_own_step is None:
                del self._optimizer.step
            else:
                self._optimizer.step = self._had_own_step  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """The rates; the optimizer's own state dict stays what it was."""
        return self._layerwise.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        self._layerwise.load_state_dict(state_dict)


def attach(
    optimizer: Optimizer,
    student: nn.Module,
    teacher: nn.Module,
    pairing: Pairing,
    *,
    signal: str | Signal = "attention",
    policy: Policy | None = None,
    every: int | None = None,
    samples: int | None = None,
    budget: float | None = None,
    process_group: distributed.ProcessGroup | None = None,
) -> Attachment:
    """Give the user's own optimizer object a learning rate per layer, by patching ``step`` on that instance.

    For loops that insist on the object they made. Arguments and errors as for :class:`LayerwiseOptimizer`. The
    optimizer's class, groups and state dict stay as they are; the rates are saved with the handle's ``state_dict``.
    A copy of the optimizer is a bare one.

    Returns:
        A handle with ``rates``, ``divergences``, ``skipped``, ``state_dict`` and ``detach``.
    """
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LayerwiseOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a bare torch.optim.Optimizer")
    inner = where_steps_come(optimizer)
    attached = getattr(inner.step, "lwkd_attachment", None)
    if attached is not None and attached.active:
        raise ValueError("this optimizer is attached already; call detach() on the first handle")
    layerwise = LayerwiseStep(
        optimizer,
        student,
        teacher,
        pairing,
        signal=signal,
        policy=policy,
        every=every,
        samples=samples,
        budget=budget,
        process_group=process_group,
    )
    return Attachment(inner, layerwise)
