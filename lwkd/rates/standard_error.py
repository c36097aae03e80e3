"""Standard errors of averaged divergences (legend: L layers, S statistics a layer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMOOTHING = 0.9
"""Weight of the past in the average of the covariance."""

AT_LEAST = 3
"""Measurements before a standard error means anything."""


class StandardErrorEstimator:
    r"""Standard error of each layer's divergence, from how far measurements fall from the average of those before.

    With ``q`` the sum of the squared weights in the momentum average (1 at first, then ``μ²q + (1−μ)²``), a new
    measurement differs from the average with covariance ``(1 + q) Σ``, and the average itself has ``q Σ``. The
    divergence's standard error is ``√(q gᵀ Σ g)``, ``g`` its gradient in the averaged statistics (delta method). A
    change of the layer between two measurements counts as noise too, so it never makes the error too small.

    Args:
        layers: L.
        statistics: S.
        momentum: μ of the policy.
    """

    def __init__(self, layers: int, statistics: int, momentum: float) -> None:
        self.momentum, self.count, self.weight = momentum, 0, 0.0
        self.covariance = torch.zeros(layers, statistics, statistics, dtype=torch.float64, device="cpu")

    def update(self, measured: Tensor, average: Tensor) -> None:
        """Add a usable measurement ``(L, S)``, given the average before it (ignored for the first)."""
        if self.count:
            off = (measured - average).double()
            found = off.unsqueeze(2) * off.unsqueeze(1) / (1 + self.weight)
            past = min(SMOOTHING, 1 - 1 / self.count)  # the plain mean at first, or one deviation would weigh most
            self.covariance = past * self.covariance + (1 - past) * found
            self.weight = self.momentum**2 * self.weight + (1 - self.momentum) ** 2
        else:
            self.weight = 1.0
        self.count += 1

    def stderr(self, average: Tensor, divergence: Callable[[Tensor], Tensor], known: Tensor | None = None) -> Tensor:
        """Standard error ``(L,)`` of ``divergence(average)``, float64; NaN before the third measurement.

        Args:
            average: the averaged statistics ``(L, S)``.
            divergence: forms ``(L,)`` from them.
            known: standard errors ``(L, S)`` of statistics that are averages already, whose noise cannot be seen from
                here (the frozen teacher's curvature); 0 for the others.
        """
        if self.count < AT_LEAST:
            return average.new_full((len(average),), float("nan"), dtype=torch.float64)
        with torch.enable_grad():
            at = average.detach().double().requires_grad_()
            slope = torch.autograd.grad(divergence(at).sum(), at)[0]
        variance = self.weight * torch.einsum("ls,lst,lt->l", slope, self.covariance, slope)
        if known is not None:
            variance = variance + (slope * known).square().sum(1)
        return variance.clamp(min=0).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"count": self.count, "weight": self.weight, "covariance": self.covariance.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off."""
        self.count, self.weight = state["count"], state["weight"]
        self.covariance = state["covariance"].to("cpu", copy=True)
