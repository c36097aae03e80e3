"""The rate state in tensors of a device, which nobody reads (legend: L layers, S statistics a layer)."""

from __future__ import annotations

import torch
from torch import Tensor

from lwkd.policies import Policy
from lwkd.reference import RateState, Ratio


class DeviceRates:
    """A rate state in tensors that are written in place and never replaced, so that a captured CUDA graph finds them.

    Args:
        state: what they hold at first; on any device.
        device: where they live.
    """

    def __init__(self, state: RateState, device: torch.device) -> None:
        self.device = device
        self.state = RateState(*(tensor.detach().to(device, copy=True).contiguous() for tensor in state))

    @property
    def multipliers(self) -> Tensor:
        """Multipliers in force ``(L,)``, always the same tensor."""
        return self.state.multipliers

    def set(self, state: RateState) -> None:
        """Take these values over; nothing is waited for."""
        with torch.no_grad():
            # Two calls, because a fused copy takes tensors of one dtype: the counts are integers.
            torch._foreach_copy_(list(self.state[:-1]), [t.detach() for t in state[:-1]], non_blocking=True)
            self.state.counts.copy_(state.counts, non_blocking=True)

    def update(self, policy: Policy, statistics: Tensor, ratio: Ratio, found_inf: Tensor | None) -> None:
        """One update of the rates, all of it on the device.

        Args:
            policy: the rule.
            statistics: ``(L, S)`` float32, on the device.
            ratio: how a divergence is formed from them.
            found_inf: scalar on the device; where it is nonzero nothing changes.
        """
        given = {} if found_inf is None else {"found_inf": found_inf}
        self.set(policy.update(self.state, statistics, ratio, **given))
