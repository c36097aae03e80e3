"""The step of SGD and AdamW with a rate for each parameter in one launch, instead of a group for each rate.

On a GPU a step with a group for each rate launches a kernel for each group, and the host is busy with that for longer
than the GPU. Here a user's group is one launch (for each dtype), whatever the rates in it. The base optimizer's own
state is used, as its own fused form keeps it, so that its checkpoints stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lwkd.ops.step import adamw_step, sgd_step
from lwkd.optimizer.param_groups import Group, LayerOf
from lwkd.rates.device import capturing

Pair = tuple[Tensor, Tensor]
Scaler = dict[str, Any]

DTYPES = torch.float32, torch.float16, torch.bfloat16


def why_not_fused(optimizer: Optimizer) -> str | None:
    """What keeps an optimizer from being stepped this way; None where nothing does.

    >>> why_not_fused(torch.optim.Adam([torch.ones(2)]))
    'the optimizer is a torch.optim.adam.Adam, neither torch.optim.SGD nor torch.optim.AdamW'
    """
    kind = type(optimizer)
    if kind is not SGD and kind is not AdamW:
        return (
            f"the optimizer is a {kind.__module__}.{kind.__qualname__}, neither torch.optim.SGD nor torch.optim.AdamW"
        )
    for index, group in enumerate(optimizer.param_groups):
        where = f"parameter group {index}"
        if group["differentiable"]:
            return f"{where} has differentiable=True"
        options = {"weight_decay": group["weight_decay"], "betas": group.get("betas", ())}
        for name, value in options.items():
            if any(isinstance(one, Tensor) for one in (value if isinstance(value, tuple) else (value,))):
                return f"{where} has a tensor for {name}, not a number"
        for number, parameter in enumerate(group["params"]):
            found = _why_not_a_parameter(parameter, group["params"][0].device)
            if found is not None:
                return f"parameter {number} of {where} {found}"
    return None


def _why_not_a_parameter(parameter: Tensor, device: torch.device) -> str | None:
    if is_traceable_wrapper_subclass(parameter):
        return f"is a {type(parameter).__name__}, not a plain tensor"
    if not _on_gpu(parameter):
        return f"is on {parameter.device}, not on a CUDA device"
    if parameter.device != device:
        return f"is on {parameter.device}, and the first one of the group on {device}"
    if parameter.dtype not in DTYPES:
        return f"is {parameter.dtype}, not one of {', '.join(map(str, DTYPES))}"
    return None


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


class FusedStep:
    """Steps an SGD or AdamW with a rate for each layer, one launch for each of the user's groups and dtype.

    States that are missing are made as the base's fused form makes them; an AdamW that kept its steps on the host
    (neither fused nor capturable) has them on the device from the first step on. SGD takes one launch more in a step
    that brings new momentum buffers to a group that has some.

    Args:
        optimizer: the base.

    Raises:
        ValueError: it cannot be stepped this way; says what was found and what to do.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        found = why_not_fused(optimizer)
        if found is not None:
            raise ValueError(
                f"fused_step=True does not work here: {found}. Leave it out: rates are then parameter groups"
            )
        self.optimizer = optimizer

    def step(self, layer_of: LayerOf, multipliers: Tensor, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            layer_of: index of a parameter's layer; None for those that keep the learning rate of their group.
            multipliers: ``(layers,)`` float32 on the device of the parameters.
            closure: evaluates the loss again, before the step.

        Returns:
            The loss, where there is a closure.

        Raises:
            TypeError: for a sparse gradient.
            ValueError: for a state that does not fit its parameter.
            RuntimeError: a CUDA graph is being captured, and there are states to be made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step_group = self._sgd if isinstance(self.optimizer, SGD) else self._adamw
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                moved = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
                if moved:
                    device = moved[0][0].device
                    step_group(group, moved, layer_of, multipliers.to(device), self._scaler(device))
        # A scheduler that was made before this is told of steps by the base's own step, and warns where there is none.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return loss

    def _scaler(self, device: torch.device) -> Scaler:
        """What a GradScaler left at the base for the length of this step."""
        left = {name: getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf")}
        return {
            name: None if value is None else value.to(device, torch.float32, non_blocking=True)
            for name, value in left.items()
        }

    def _sgd(self, group: Group, moved: list[Pair], layer_of: LayerOf, multipliers: Tensor, scaler: Scaler) -> None:
        options = {name: group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")}
        state, with_buffers, lr = self.optimizer.state, group["momentum"] != 0, _learning_rate(group)
        known: list[Pair] = []
        new: list[Pair] = []
        for pair in moved:
            (new if with_buffers and state[pair[0]].get("momentum_buffer") is None else known).append(pair)
        for parameter, _ in new:
            _not_while_capturing()
            # Not empty: where the gradients of the first step are infinite, the next one averages with what is here.
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for first, pairs in ((False, known), (True, new)):
            if pairs:
                parameters, gradients = zip(*pairs, strict=True)
                buffers = [state[parameter]["momentum_buffer"] for parameter in parameters] if with_buffers else []
                layers = _layers(parameters, layer_of)
                sgd_step(parameters, gradients, buffers, multipliers, layers, lr, first=first, **options, **scaler)

    def _adamw(self, group: Group, moved: list[Pair], layer_of: LayerOf, multipliers: Tensor, scaler: Scaler) -> None:
        options = {name: group[name] for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize")}
        parameters, gradients = zip(*moved, strict=True)
        states = [self._adamw_state(parameter, group["amsgrad"]) for parameter in parameters]
        adamw_step(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            multipliers,
            _layers(parameters, layer_of),
            _learning_rate(group),
            **options,
            **scaler,
        )

    def _adamw_state(self, parameter: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            _not_while_capturing()
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
            state.update({name: torch.zeros_like(parameter) for name in names})
        elif state["step"].device != parameter.device or state["step"].dtype != torch.float32:
            _not_while_capturing()
            state["step"] = state["step"].to(parameter.device, torch.float32)
        return state


def _layers(parameters: Sequence[Tensor], layer_of: LayerOf) -> list[int]:
    return [-1 if (layer := layer_of(parameter)) is None else layer for parameter in parameters]


def _learning_rate(group: Group) -> float | Tensor:
    """A number, or a tensor on the device; one on the host is as good as a number."""
    lr = group["lr"]
    return lr.float() if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _not_while_capturing() -> None:
    if capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and the optimizer has states to make, which every replay would make anew. "
            "Run one step before the capture"
        )
