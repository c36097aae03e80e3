"""Policies: from the divergence of each layer to its learning-rate multiplier.

A policy is a small value with a ``state_dict``; what changes from measurement to measurement lives in a
:class:`lwkd.reference.RateState`, so that one policy object can serve several optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    ``update``: indices of the layers that have a say, where some are frozen. One whose layers at rate 0 are to be left
    out of the backward pass says so by an attribute ``freezes``.
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


def _check_range(momentum: float, clamp: tuple[float, float]) -> None:
    low, high = clamp
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"clamp is {clamp}; expected (low, high) with 0 <= low <= high, both finite")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1)")


def _of_counted(
    updated: Callable[[RateState, Tensor], RateState], state: RateState, statistics: Tensor, counted: Tensor | None
) -> RateState:
    """An update in which the layers that do not count have no say, are averaged, and keep their multipliers."""
    if counted is None:
        return updated(state, statistics)
    some = RateState._make([*(tensor[counted] for tensor in state[:-1]), state.counts])
    some, whole = updated(some, statistics[counted]), updated(state, statistics)
    whole = whole._replace(multipliers=state.multipliers)
    rows = zip(whole[:-1], some[:-1], strict=True)
    return RateState._make([*(all_.index_copy(0, counted, mine) for all_, mine in rows), some.counts])


@dataclass(frozen=True)
class _Rule:
    gamma: float = 1.0
    momentum: float = 0.9
    clamp: tuple[float, float] = (0.5, 1.5)
    normalize: bool = False
    rule: ClassVar[RuleName]

    def __post_init__(self) -> None:
        _check_range(self.momentum, self.clamp)
        if self.gamma != self.gamma or abs(self.gamma) == float("inf"):
            raise ValueError(f"gamma is {self.gamma}; expected a finite number")
        object.__setattr__(self, "clamp", (float(self.clamp[0]), float(self.clamp[1])))

    def start(self, layers: int, statistics: int) -> RateState:
        """All multipliers 1, nothing measured."""
        return initial_rates(layers, statistics)

    @property
    def compares_layers(self) -> bool:
        """Whether a layer's multiplier depends on those beside it."""
        return self.normalize or self.rule != "decay"

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
                found_inf=found_inf,
                **vars(self),  # the fields are options of the op
            )
            return new

        return _of_counted(updated, state, statistics, counted)

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
class Local(_Rule):
    r"""Layers before the first wrong one stand almost still, and the layer where the divergence rises moves fastest.

    .. math:: c_l = \max_{k \le l} e_k,\qquad \lambda = \max\Big(0,\ 1 - \mathrm{contrast}\,\frac{c_1}{c_L}\Big),\qquad
        m_l = \mathrm{clamp}\left(\Big(\frac{c_l}{c_L}\Big)^{\gamma\lambda}
        \Big(1 + (\mathrm{high} - 1)\,\lambda\,\frac{c_l - c_{l-1}}{c_L}\Big)\right)

    with ``c_0 = 0`` and ``clamp = (low, high)``. A layer behind a wrong one gets its input from it, so that a large
    divergence there says nothing of the layer itself: what counts is the largest divergence up to a layer, and where
    that grows. Where the first layer is as far from the teacher as any, as in a student from scratch, ``λ`` is 0 and
    all layers have rate 1; where the layers nearest the input agree with the teacher already, as in a damaged or edited
    copy of it, ``λ`` is near 1.
    Layers behind the last rise have rate 1. With a single pair the multiplier is always 1.

    Args:
        gamma: exponent of the layers before the rise; not negative.
        momentum: weight of the past in the average of the statistics; counts measurements, in [0, 1).
        clamp: smallest and largest multiplier; a layer in which all of the divergence arises gets the largest.
        normalize: rescale after clamping so that the mean multiplier is 1.
        contrast: where the first layer has at least the share ``1 / contrast`` of the largest divergence, all rates
            are 1; at least 1.

    Source: our own. That divergence accumulates from layer to layer is the reason for it; docs/results.md has figures.

    >>> policy = Local(momentum=0.0)
    >>> policy.update(policy.start(3, 1), torch.tensor([[0.0], [0.5], [0.25]]), "attention").multipliers
    tensor([ 0.1000, 10.0000,  1.0000])
    >>> policy.update(policy.start(3, 1), torch.tensor([[0.5], [0.25], [0.25]]), "attention").multipliers
    tensor([1., 1., 1.])
    """

    clamp: tuple[float, float] = (0.1, 10.0)
    contrast: float = 4.0
    rule = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("gamma", 0), ("contrast", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number of at least {least}")
        if self.clamp[1] < 1:
            raise ValueError(f"clamp is {self.clamp}; expected a largest multiplier of at least 1")


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
        _check_range(self.momentum, (0.0, 0.0))
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
        state = initial_rates(layers, statistics)
        return state._replace(multipliers=state.multipliers.new_tensor(values))

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


@dataclass(frozen=True)
class Freeze:
    r"""Layers that have come to rest stand still, from the input on, and are left out of the backward pass.

    Every ``window`` measurements, the first layer that still trains is frozen if its divergence has changed by no more
    than the share ``tolerance`` over the window: at most one layer a window, none before ``warmup`` measurements, and
    never one of the last ``keep``. One that rises is not at rest: it was moved away from the teacher, and may return.
    Layers that are next to the teacher already (at most the share ``near`` of the largest divergence), such as those of
    a copy before its first changed layer, are frozen at once.
    A frozen layer has rate 0, and the optimizer switches ``requires_grad`` of its parameters off, so that autograd ends
    where the frozen layers end; all others have rate 1. A layer that trains again has a gradient from the next pass on,
    and moves one update after its rate has become 1. Where the divergence of a frozen layer exceeds ``1 + rise``
    times what it was when it was frozen, that layer and all behind it train again, at least for the next whole window.

    Divergences are averages with a momentum of ``(window − 1) / (window + 1)``, some ``window`` measurements long. The
    parameters of a frozen layer and of those before it stand still, so that its divergence moves only if something
    else does: the data (a shift, other augmentations), the teacher (fine-tuned, replaced), batch statistics. That is
    when layers thaw. A layer that was frozen too early stays behind without a sign: a longer window and a smaller
    tolerance save less time and lose less. With ``every=4`` at the optimizer a quarter of the window is as long, and
    measuring costs a quarter. Layers that hold no trainable parameter of the optimizer count as at rest. The state
    stays on the host, even where other policies keep it on the device.

    Args:
        window: measurements from one decision to the next, at least 1.
        tolerance: largest relative change of the divergence in a window of a layer that is at rest, in [0, 1).
        rise: relative rise of a frozen layer's divergence that makes it train again; positive.
        near: share of the largest divergence up to which a layer counts as next to the teacher, in [0, 1); such a layer
            thaws when it exceeds ``1 + rise`` times that share.
        warmup: measurements before the first decision.
        keep: layers at the end that always train, at least 1. Parameters behind the last pair train anyway.

    Source: our own; the nearest relative is Egeria (arXiv 2201.06227), which compares with a reference model.

    >>> policy = Freeze(window=1)
    >>> state = policy.start(2, 1)
    >>> for found in ([0.5, 0.2], [0.4, 0.1], [0.4, 0.05]):
    ...     state = policy.update(state, torch.tensor(found)[:, None], "attention")
    >>> state.multipliers
    tensor([0., 1.])
    """

    window: int = 100
    tolerance: float = 0.02
    rise: float = 0.5
    near: float = 0.1
    warmup: int = 0
    keep: int = 1
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("warmup", 0), ("keep", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        for name in ("tolerance", "near"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in [0, 1)")
        if not 0 < self.rise < float("inf"):
            raise ValueError(f"rise is {self.rise}; expected a positive, finite number")

    @property
    def momentum(self) -> float:
        """Weight of the past in the average of the statistics."""
        return (self.window - 1) / (self.window + 1)

    def start(self, layers: int, statistics: int) -> RateState:
        """All multipliers 1, nothing to compare with yet."""
        state = initial_rates(layers, statistics)
        return state._replace(baseline=torch.full_like(state.baseline, float("inf")))

    def update(
        self,
        state: RateState,
        statistics: Tensor,
        ratio: Ratio,
        found_inf: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> RateState:
        """Averages the statistics; at the end of a window one more layer may be frozen, and any time some may thaw.

        The state's ``baseline`` is what a layer is compared with: its divergence at the end of the last window, or when
        it was frozen; infinite where it has not trained for a whole window.

        Args:
            state: of the last update.
            statistics: ``(layers, statistics)``.
            ratio: how they become divergences.
            found_inf: as in :class:`Policy`.
            counted: indices (int64) of the layers that train, or would if they were not frozen here; None is all.
        """
        new = Constant(momentum=self.momentum).update(state, statistics, ratio, found_inf)
        e, before, layers = new.divergences, state.baseline, len(new.divergences)
        idle = torch.zeros_like(e, dtype=torch.bool)
        if counted is not None:
            idle = torch.ones_like(idle).index_fill(0, counted, False)
        frozen = (state.multipliers == 0) & ~idle
        near = self.near * e.max()
        risen = frozen & (e > (1 + self.rise) * before.maximum(near))
        prefix = (idle | (frozen & ~risen)).cumprod(0).bool()
        # Nothing here is read on the host, so that it runs on a device too.
        count = new.counts[0]
        ends = (count % self.window == 0) & (count > self.warmup) & ~risen.any()
        index = torch.arange(layers, device=e.device)
        next_ = (index == prefix.sum()) & (index < layers - self.keep)
        settles = ends & next_ & before.isfinite() & ((e - before).abs() <= self.tolerance * before)
        closes = (prefix | (e <= near)).cumprod(0).bool() & (index < layers - self.keep) & (count > self.warmup) & ~idle
        still = (prefix & frozen) | settles | closes
        thaws = frozen & ~still
        compared = torch.where((count % self.window == 0) & ~still, e, before)
        compared = torch.where(
            settles | (closes & ~frozen), e, torch.where(thaws, torch.full_like(e, float("inf")), compared)
        )
        measured = count > state.counts[0]
        return new._replace(
            baseline=torch.where(measured, compared, before),
            multipliers=torch.where(measured, (~still).to(e.dtype), state.multipliers),
        )

    def state_dict(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return {"policy": "freeze", **asdict(self)}
