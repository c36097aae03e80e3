"""A policy and bases that do what the optimizer's tests ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import lwkd
from lwkd.reference import RateState


class Script:
    """A policy with the multipliers of a list, one row a measurement; the last ones stay."""

    def __init__(self, rows: Sequence[Sequence[float]], freezes: bool = False) -> None:
        self.rows, self.freezes = rows, freezes

    def start(self, layers: int, statistics: int) -> RateState:
        return lwkd.Constant(self.rows[0]).start(layers, statistics)

    def update(self, state: RateState, statistics: Tensor, ratio: Any, found_inf: Tensor | None = None) -> RateState:
        new = lwkd.Constant().update(state, statistics, ratio, found_inf)
        return new._replace(multipliers=torch.tensor(self.rows[min(int(new.counts[0]), len(self.rows) - 1)]))

    def state_dict(self) -> dict[str, Any]:
        return {}


class SeesGroups(torch.optim.SGD):
    """A base that notes the learning rate under which it steps each parameter, and counts in its groups."""

    def step(self, closure: Any = None) -> Any:
        self.seen = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class WritesRate(torch.optim.SGD):
    """A base that halves its own learning rate at every step, as adaptive-rate optimizers do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2
        return loss


class TwoSteps(torch.optim.SGD):
    """SAM with the two methods that its loops call in place of ``step``; the second steps a base of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self._parameters():
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=0.01)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._parameters():
            p.copy_(self.state[p]["before"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss


class Breaks(torch.optim.SGD):
    """A base whose step raises in the middle."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("out of memory")
