"""The rate state on the host: what a measurement that has arrived makes of it (legend: L layers, S statistics)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwkd.policies import Policy
from lwkd.rates.standard_error import StandardErrorEstimator
from lwkd.reference import RateState
from lwkd.signals import Attention, Hessian, Signal


class HostRates:
    """State of the policy, spread of the measurements and the teacher's curvature, in small tensors of the CPU.

    Args:
        policy: the rule.
        signal: what is measured.
        layers: L.
    """

    def __init__(self, policy: Policy, signal: Signal, layers: int) -> None:
        self.policy, self.signal = policy, signal
        self.spread = StandardErrorEstimator(layers, signal.statistics, getattr(policy, "momentum", 0.0))
        self.teacher = signal.memory(layers) if isinstance(signal, Hessian) else None
        self.set(policy.start(layers, signal.statistics))

    def set(self, state: RateState) -> None:
        """Go on with this state, wherever it lies."""
        self.state = RateState(*(tensor.detach().to("cpu", copy=True) for tensor in state))
        self.multipliers: list[float] = self.state.multipliers.tolist()

    def update(self, statistics: Tensor) -> None:
        """Statistics ``(L, S)``, float64, of all passes and ranks → the next average, divergences and multipliers."""
        if self.teacher is not None:
            statistics = self.teacher.fold(statistics)
        before = self.state
        self.state = self.policy.update(before, statistics.float(), self.signal.ratio)
        if not isinstance(self.signal, Attention) and int(self.state.counts[0]) > int(before.counts[0]):
            self.spread.update(statistics, before.average)
        self.multipliers = self.state.multipliers.tolist()

    def standard_errors(self, average: Tensor) -> Tensor:
        """Standard error ``(L,)`` of the divergence of averaged statistics ``(L, S)``; NaN where it is not known."""
        known = None
        if self.teacher is not None:
            known = torch.stack([torch.zeros_like(self.teacher.stderr), self.teacher.stderr], dim=1)
        return self.spread.stderr(average, self.signal.divergence, known)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the policy's state is saved by whoever knows where it is in force."""
        return {
            "spread": self.spread.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, with the policy's state beside it."""
        self.set(RateState(**{name: state[name] for name in RateState._fields}))
        self.spread.load_state_dict(state["spread"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
