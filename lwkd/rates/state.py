"""Where the rates live: on the host, or with the learning rates on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd.optimizer.param_groups import DeviceScaling, Group, HostScaling, LayerOf, LrScaling
from lwkd.policies import Policy
from lwkd.rates.device_rates import DeviceRates
from lwkd.rates.distributed import world_size
from lwkd.rates.host_rates import HostRates
from lwkd.rates.schedule import Schedule
from lwkd.reference import RateState
from lwkd.signals import Attention, Signal


def why_on_host(groups: Sequence[Group], device: torch.device, fused_step: bool = False) -> str | None:
    """What keeps rates from staying on the device; None where nothing does.

    They stay where the learning rates are read there: every group has a tensor on this CUDA device for a learning rate,
    and the base is fused or capturable, or the step is our own.

    Args:
        groups: the base's parameter groups.
        device: the device of the student.
        fused_step: whether the step is that of :class:`lwkd.optimizer.fused_step.FusedStep`.
    """
    if device.type != "cuda":
        return f"the student is on {device}, not on a CUDA device"
    for index, group in enumerate(groups):
        rate = group.get("lr")
        if not isinstance(rate, Tensor):
            return f"the learning rate of parameter group {index} is {rate!r}, not a tensor on {device}"
        if rate.device != device:
            return f"the learning rate of parameter group {index} is a tensor on {rate.device}, not on {device}"
        if not (fused_step or group.get("fused") or group.get("capturable")):
            return f"parameter group {index} is neither fused nor capturable"
    return None if groups else "there is no parameter group"


def check_captured(signal: Signal, schedule: Schedule, on_host: str | None) -> None:
    """Check that what is done for an update can be part of a CUDA graph.

    Args:
        signal: what is measured.
        schedule: when.
        on_host: why the rates are on the host; None where they are on the device.

    Raises:
        RuntimeError: it cannot; says what was found and what to do.
    """
    if not isinstance(signal, Attention):
        found = f"the {signal.name} signal makes passes of its own. Use signal='attention'"
    elif schedule.budget is not None or schedule.every != 1:
        kind = f"budget={schedule.budget}" if schedule.budget is not None else f"every={schedule.every}"
        found = f"found {kind}, and a graph does the same at every replay. Use every=1 and no budget"
    elif world_size() > 1:
        found = f"statistics are summed over {world_size()} ranks, which a graph does not do. Train on one"
    elif on_host is not None:
        found = f"the host reads the rates: {on_host}. Use a fused or capturable base with a tensor lr on the GPU"
    else:
        return
    raise RuntimeError(
        f"a CUDA graph is being captured; {found}, or capture without lwkd's step. The rates are as they were"
    )


class RateStore:
    """The rate state, and where it lives.

    On the host (the default) a measurement is taken in when it has arrived. On a device there are two ways: the
    device ``leads``, which means that measurements become rates there and the host's state stands still; or it follows,
    which means that the host goes on as before and only writes the multipliers to the device.

    Args:
        policy: the rule.
        signal: what is measured.
        layers: L.
    """

    def __init__(self, policy: Policy, signal: Signal, layers: int) -> None:
        self.policy, self.signal = policy, signal
        self.host = HostRates(policy, signal, layers)
        self.leads = False
        self._device: DeviceRates | None = None  # kept once it is made: a captured graph may hold its tensors
        self._in_use = False

    @property
    def state(self) -> RateState:
        """The state in force, where it lives."""
        return self._device.state if self.leads and self._device is not None else self.host.state

    def move(self, device: torch.device | None) -> None:
        """Live on this device, or (None) on the host; what is there already stays as it is.

        The device leads where the host has nothing to add: for attention, which knows neither spread nor memory.
        """
        leads = device is not None and isinstance(self.signal, Attention) and world_size() == 1
        known = device is None or (self._device is not None and self._device.device == device)
        if known and (device is not None, leads) == (self._in_use, self.leads):
            return
        state = self.state
        if self.leads:
            self.host.set(state)
        if device is not None and not known:
            self._device = DeviceRates(state, device)
        elif device is not None and self._device is not None:
            self._device.set(self.host.state)
        self._in_use, self.leads = device is not None, leads

    def update(self, statistics: Tensor) -> None:
        """Take in a measurement ``(L, S)``, float64, that has arrived on the host."""
        self.host.update(statistics)
        if self._in_use and self._device is not None:
            self._device.multipliers.copy_(self.host.state.multipliers, non_blocking=True)

    def update_there(self, statistics: Tensor, found_inf: Tensor | None) -> None:
        """Take in a measurement ``(L, S)`` on the device that leads, unless ``found_inf`` (scalar) is nonzero."""
        assert self._device is not None
        if found_inf is not None:
            found_inf = found_inf.to(self._device.device, non_blocking=True)
        self._device.update(self.policy, statistics.float(), self.signal.ratio, found_inf)

    @property
    def multipliers(self) -> Tensor:
        """Multipliers in force ``(L,)`` on the device where they were moved to."""
        assert self._device is not None
        return self._device.multipliers

    def scale(self, layer_of: LayerOf) -> LrScaling:
        """How a step scales the learning rates of parameters, given their layers (None: not at all)."""
        if self._in_use and self._device is not None:
            return DeviceScaling(layer_of, self._device.multipliers)

        def multiplier_of(parameter: Tensor) -> float:
            layer = layer_of(parameter)
            return 1.0 if layer is None else self.host.multipliers[layer]

        return HostScaling(multiplier_of)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of the CPU."""
        return {
            **self.host.state_dict(),
            **{name: tensor.to("cpu", copy=True) for name, tensor in self.state._asdict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, in the tensors that there are."""
        self.host.load_state_dict(state)
        if self._device is not None:
            self._device.set(self.host.state)
