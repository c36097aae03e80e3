"""Policies: from the divergence of each layer to its learning-rate multiplier.

A policy is a small value with a ``state_dict``; what changes from measurement to measurement lives in a
:class:`lwkd.reference.RateState`, so that one policy object can serve several optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lwkd import ops
from lwkd.reference import Policy as RuleName
from lwkd.reference import RateState, Ratio, initial_rates


class Policy(Protocol):
    """What the optimizer asks of a policy.

    One that compares layers may say so by an attribute ``compares_layers``, and take an argument ``counted`` in
    ``update``: indices of the layers that have a say, where some are frozen.
    """

    def start(self, layers: int, statistics: int) -> RateState:
        """State before the first measurement of ``layers`` layers with ``statistics`` numbers each."""

    def update(self, state: RateState, statistics: Tensor, ratio: Ratio, found_inf: Tensor | None = None) -> RateState:
        """State after a measurement ``(layers, statistics)``; ``state`` itself is not modified.

        ``found_inf`` (scalar tensor) is given where the rates stay on the device and a GradScaler is in use: where it
        is nonzero, the state stays as it is. Nothing may then be read from the device.
        """

    def state_dict(self) -> dict[str, Any]:
        """The settings, as plain values."""


@dataclass(frozen=True)
class _Rule:
    gamma: float = 1.0
    momentum: float = 0.9
    clamp: tuple[float, float] = (0.5, 1.5)
    normalize: bool = False
    rule: ClassVar[RuleName]

    def __post_init__(self) -> None:
        low, high = self.clamp
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"clamp is {self.clamp}; expected (low, high) with 0 <= low <= high, both finite")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; expected a number in [0, 1)")
        if self.gamma != self.gamma or abs(self.gamma) == float("inf"):
            raise ValueError(f"gamma is {self.gamma}; expected a finite number")
        object.__setattr__(self, "clamp", (float(low), float(high)))

    def start(self, layers: int, statistics: int) -> RateState:
        """All multipliers 1, nothing measured."""
        return initial_rates(layers, statistics)

    @property
    def compares_layers(self) -> bool:
        """Whether a layer's multiplier depends on those beside it."""
        return self.normalize or self.rule == "relative"

    def update(
        self,
        state: RateState,
        statistics: Tensor,
        ratio: Ratio,
        found_inf: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> RateState:
        """One fused rate update, :func:`lwkd.ops.update_rates`.

        Args:
            state: of the last update.
            statistics: ``(layers, statistics)``.
            ratio: how they become divergences.
            found_inf: as in :class:`Policy`.
            counted: indices (int64) of the layers that have a say; None is all. For these everything is as if there
                were no others, whatever was measured there. The others are averaged, and keep their multipliers.
        """

        def updated(state: RateState, statistics: Tensor) -> RateState:
            new, _, _ = ops.update_rates(
                state,
                statistics,
                divergence=ratio,
                policy=self.rule,
                gamma=self.gamma,
                momentum=self.momentum,
                clamp=self.clamp,
                normalize=self.normalize,
                found_inf=found_inf,
            )
            return new

        if counted is None:
            return updated(state, statistics)
        some = RateState._make([*(tensor[counted] for tensor in state[:-1]), state.counts])
        some, whole = updated(some, statistics[counted]), updated(state, statistics)
        whole = whole._replace(multipliers=state.multipliers)
        rows = zip(whole[:-1], some[:-1], strict=True)
        return RateState._make([*(all_.index_copy(0, counted, mine) for all_, mine in rows), some.counts])

    def state_dict(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return {"policy": self.rule, **asdict(self)}


@dataclass(frozen=True)
class Relative(_Rule):
    r"""A layer that lags behind the others moves faster: ``m_l = clamp((e_l / mean(e))^gamma)``.

    With a single pair ``e_l = mean(e)`` and the multiplier is always 1. A layer without a trainable parameter in the
    optimizer has no say in the mean, and keeps the multiplier that it had.

    Args:
        gamma: exponent; negative is the opposite rule (aligned layers move faster).
        momentum: weight of the past in the average of the statistics; counts measurements, in [0, 1).
        clamp: smallest and largest multiplier.
        normalize: rescale after clamping so that the mean multiplier is 1.

    Source: our reading of arXiv 2407.04871.

    >>> policy = Relative(momentum=0.0)
    >>> policy.update(policy.start(2, 1), torch.tensor([[0.12], [0.08]]), "attention").multipliers
    tensor([1.2000, 0.8000])
    """

    rule = "relative"


@dataclass(frozen=True)
class Decay(_Rule):
    r"""A layer slows down as its own divergence falls: ``m_l = clamp((e_l / e_l(0))^gamma)``, with 0/0 = 1.

    ``e_l(0)`` is the first measured divergence; the momentum suppresses rapid decay.

    Args:
        gamma: exponent.
        momentum: weight of the past in the average of the statistics; counts measurements, in [0, 1).
        clamp: smallest and largest multiplier.
        normalize: rescale after clamping so that the mean multiplier is 1.

    Source: our reading of arXiv 2407.04871.

    >>> policy = Decay(momentum=0.0)
    >>> state = policy.update(policy.start(2, 1), torch.tensor([[0.2], [0.1]]), "attention")
    >>> policy.update(state, torch.tensor([[0.15], [0.1]]), "attention").multipliers
    tensor([0.7500, 1.0000])
    """

    rule = "decay"


@dataclass(frozen=True)
class Constant:
    """Multipliers that no measurement changes, in force from the first update; divergences are still averaged.

    For ablations and for the two controls without which no gain can be credited to the rule: every layer at the mean
    multiplier that another run had, or every layer at its own time average.

    Args:
        multipliers: one number for all layers, or one a layer; finite and not negative.
        momentum: weight of the past in the average of the statistics, in [0, 1); it only smooths what is shown.

    >>> Constant([1.0, 0.5]).start(2, 1).multipliers
    tensor([1.0000, 0.5000])
    """

    multipliers: float | Sequence[float] = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; expected a number in [0, 1)")
        given = [self.multipliers] if isinstance(self.multipliers, (int, float)) else list(self.multipliers)
        bad = [m for m in given if not 0 <= m < float("inf")]
        if bad or not given:
            raise ValueError(f"multipliers are {self.multipliers}; expected finite numbers that are not negative")

    def start(self, layers: int, statistics: int) -> RateState:
        """The given multipliers, nothing measured."""
        if isinstance(self.multipliers, (int, float)):
            values = [float(self.multipliers)] * layers
        else:
            values = [float(m) for m in self.multipliers]
        if len(values) != layers:
            raise ValueError(
                f"Constant has {len(values)} multipliers, the pairing has {layers} layers; give one a layer"
            )
        return initial_rates(layers, statistics)._replace(multipliers=torch.tensor(values))

    def update(self, state: RateState, statistics: Tensor, ratio: Ratio, found_inf: Tensor | None = None) -> RateState:
        """Averages the statistics; the multipliers stay."""
        new, _, _ = ops.update_rates(
            state, statistics, divergence=ratio, policy="constant", momentum=self.momentum, found_inf=found_inf
        )
        return new

    def state_dict(self) -> dict[str, Any]:
        """The settings, as plain values."""
        plain = self.multipliers if isinstance(self.multipliers, (int, float)) else list(self.multipliers)
        return {"policy": "constant", "multipliers": plain, "momentum": self.momentum}
