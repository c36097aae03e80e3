"""The rate state of a run, and where it is kept (legend: L layers, S statistics a layer)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lwkd.nets.passes import staged
from lwkd.policies import Policy
from lwkd.rates.standard_error import StandardErrorEstimator
from lwkd.reference import RateState
from lwkd.signals import Signal

Mode = Literal["host", "mirrored", "device"]


class RateStore:
    """The policy's state, the standard errors, and what the signal remembers of the teacher.

    ``mode`` says where the state is kept:

    - ``"host"`` (the default): in small tensors of the CPU; the multipliers are Python numbers.
    - ``"mirrored"``: as before, and every update writes the multipliers to a tensor on the device too.
    - ``"device"``: the policy runs on the device, and nothing is read from there; the state on the host stands still.

    Tensors on the device are written in place and never replaced, so that a captured CUDA graph finds them.

    Args:
        policy: from divergences to multipliers.
        signal: what is measured.
        layers: L.
    """

    def __init__(self, policy: Policy, signal: Signal, layers: int) -> None:
        self.policy, self.signal = policy, signal
        self.mode: Mode = "host"
        self.errors = StandardErrorEstimator(layers, signal.statistics, getattr(policy, "momentum", 0.0))
        self.teacher = signal.memory(layers)
        self._on_host: RateState
        self._on_device: RateState | None = None  # kept once it is made
        self._numbers: list[float]
        self._counted: tuple[int, ...] | None = None  # None: all layers
        self._counted_at: Tensor | None = None
        self._set_host(policy.start(layers, signal.statistics))

    @property
    def state(self) -> RateState:
        """The state in force, on the device where it is kept."""
        if self.mode != "device":
            return self._on_host
        assert self._on_device is not None
        return self._on_device

    @property
    def multipliers(self) -> list[float] | Tensor:
        """Multipliers in force: L numbers, or in the modes of the device ``(L,)`` there, always the same tensor."""
        if self.mode == "host":
            return self._numbers
        assert self._on_device is not None
        return self._on_device.multipliers

    def move(self, device: torch.device | None, *, alone: bool) -> None:
        """Keep the multipliers on this device, or (None) on the host.

        The whole state goes to the device where an update needs nothing from the host: for a signal that is measured
        on the training passes, on a single rank (``alone``). Signals with passes of their own have standard errors and
        a memory of the teacher, which are kept on the host.
        """
        mode: Mode = "host"
        if device is not None:
            mode = "mirrored" if self.signal.replays or not alone else "device"
        there = self._on_device is not None and self._on_device.multipliers.device == device
        if mode == self.mode and (device is None or there):
            return
        if self.mode == "device":
            self._set_host(self.state)
        if device is not None and there:
            self._set_device(self._on_host)
        elif device is not None:
            host = [staged(tensor.detach(), device) for tensor in self._on_host]
            self._on_device = RateState(*(t.to(device, non_blocking=True, copy=True).contiguous() for t in host))
        self.mode = mode

    def count_layers(self, layers: Sequence[int]) -> None:
        """Only these layers have a say where the policy compares layers; none of them is as good as all."""
        counted = None if len(layers) in (0, len(self._numbers)) else tuple(layers)
        if counted != self._counted:
            self._counted, self._counted_at = counted, None

    def _counting(self, device: torch.device) -> dict[str, Any]:
        """Option of the policy's update; a policy that does not compare layers takes none."""
        if self._counted is None or "counted" not in inspect.signature(self.policy.update).parameters:
            return {}
        if self._counted_at is None or self._counted_at.device != device:
            counted = torch.tensor(self._counted, dtype=torch.int64, device="cpu")
            self._counted_at = staged(counted, device).to(device, non_blocking=True)
        return {"counted": self._counted_at}

    def update(self, statistics: Tensor) -> None:
        """A measurement ``(L, S)``, float64 on the host, becomes the next average, divergences and multipliers."""
        if self.teacher is not None:
            statistics = self.teacher.fold(statistics)
        before = self._on_host
        counting = self._counting(before.average.device)
        self._on_host = self.policy.update(before, statistics.float(), self.signal.ratio, **counting)
        self._numbers = self._on_host.multipliers.tolist()
        if self.signal.replays and int(self._on_host.counts[0]) > int(before.counts[0]):
            self.errors.update(statistics, before.average)
        if self.mode != "host":
            assert self._on_device is not None
            there = self._on_device.multipliers
            there.copy_(staged(self._on_host.multipliers, there.device), non_blocking=True)

    def update_on_device(self, statistics: Tensor, found_inf: Tensor | None) -> None:
        """The same without the host, in mode ``"device"``; where ``found_inf`` (scalar) is nonzero nothing changes."""
        given = self._counting(statistics.device)
        if found_inf is not None:
            given["found_inf"] = staged(found_inf, statistics.device).to(statistics.device, non_blocking=True)
        self._set_device(self.policy.update(self.state, statistics.float(), self.signal.ratio, **given))

    def standard_errors(self) -> Tensor:
        """Standard error ``(L,)`` of each divergence, float64; NaN where it is not known."""
        known = None
        if self.teacher is not None:
            known = torch.stack([torch.zeros_like(self.teacher.stderr), self.teacher.stderr], dim=1)
        return self.errors.stderr(self.state.average.cpu(), self.signal.divergence, known)

    def _set_host(self, state: RateState) -> None:
        self._on_host = RateState(*(tensor.detach().to("cpu", copy=True) for tensor in state))
        self._numbers = self._on_host.multipliers.tolist()

    def _set_device(self, state: RateState) -> None:
        """Overwrite the state on the device; waits for nothing."""
        assert self._on_device is not None
        with torch.no_grad():
            # Two calls, because a fused copy takes tensors of one dtype: the counts are integers.
            given = [staged(tensor.detach(), self._on_device.counts.device) for tensor in state]
            torch._foreach_copy_(list(self._on_device[:-1]), given[:-1], non_blocking=True)
            self._on_device.counts.copy_(given[-1], non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of the CPU."""
        return {
            "spread": self.errors.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            **{name: tensor.to("cpu", copy=True) for name, tensor in self.state._asdict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, in the tensors that there are."""
        self._set_host(RateState(**{name: state[name] for name in RateState._fields}))
        self.errors.load_state_dict(state["spread"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        if self._on_device is not None:
            self._set_device(self._on_host)
