r"""The specification of the rate update: statistics → momentum → divergence → policy → multipliers.

Legend: ``L`` layers, ``S`` statistics a layer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lwkd.reference.hutchinson import curvature_distance
from lwkd.reference.jacobian import jacobian_distance

Policy = Literal["relative", "decay", "local", "constant"]
Ratio = Literal["attention", "direction", "norm", "relative", "hessian"]

STATISTICS: dict[Ratio, int] = {"attention": 1, "direction": 4, "norm": 4, "relative": 4, "hessian": 2}
"""S: how many statistics a layer has, by the way its divergence is formed."""


class RateState(NamedTuple):
    """What the rate update carries from one measurement to the next.

    ``average`` (L, S) momentum average of the statistics; ``baseline`` (L,) first divergence, for ``decay``;
    ``divergences`` (L,) divergence of the average; ``multipliers`` (L,) those in force;
    ``counts`` (2,) int64: measurements taken, measurements skipped.
    """

    average: Tensor
    baseline: Tensor
    divergences: Tensor
    multipliers: Tensor
    counts: Tensor


def initial_rates(layers: int, statistics: int = 1, device: torch.device | str = "cpu") -> RateState:
    """State before the first measurement: all multipliers 1.

    Shapes: see :class:`RateState` with L = ``layers`` and S = ``statistics``; float32 and int64.

    >>> initial_rates(2).multipliers
    tensor([1., 1.])
    """
    zeros = torch.zeros(layers, dtype=torch.float32, device=device)
    return RateState(
        average=zeros.new_zeros(layers, statistics),
        baseline=zeros,
        divergences=zeros.clone(),
        multipliers=torch.ones_like(zeros),
        counts=torch.zeros(2, dtype=torch.int64, device=device),
    )


def divergence_of(statistics: Tensor, ratio: Ratio = "attention") -> Tensor:
    """Divergence ``(L,)`` from averaged statistics ``(L, S)``.

    ``"attention"`` (S = 1): the statistic itself. ``"direction"``, ``"norm"``, ``"relative"`` (S = 4):
    :func:`lwkd.reference.jacobian_distance` of that kind. ``"hessian"`` (S = 2):
    :func:`lwkd.reference.curvature_distance`.

    >>> divergence_of(torch.tensor([[0.25], [0.5]]))
    tensor([0.2500, 0.5000])
    >>> divergence_of(torch.tensor([[1.0, 1.0, 0.0, 2.0]]), "direction")
    tensor([2.])
    """
    if ratio == "attention":
        return statistics[:, 0]
    if ratio == "hessian":
        return curvature_distance(statistics)
    if ratio in STATISTICS:
        return jacobian_distance(statistics, ratio)
    raise ValueError(f"divergence {ratio!r} is not known; expected one of {', '.join(map(repr, STATISTICS))}")


def update_rates(
    state: RateState,
    statistics: Tensor,
    *,
    divergence: Ratio = "attention",
    policy: Policy = "relative",
    gamma: float = 1.0,
    momentum: float = 0.9,
    clamp: tuple[float, float] = (0.5, 1.5),
    normalize: bool = False,
    contrast: float = 4.0,
    found_inf: Tensor | None = None,
) -> tuple[RateState, Tensor, Tensor]:
    r"""In plain PyTorch what :func:`lwkd.ops.update_rates` does: one step from statistics to multipliers.

    .. math:: s \leftarrow \mu s + (1-\mu)\,s_{new}\ (\text{the first measurement starts the average}),\quad
        e = \mathrm{divergence}(s)

    .. math:: \mathrm{relative}: m_l = \mathrm{clamp}\big((e_l / \bar e)^\gamma\big),\quad
        \mathrm{decay}: m_l = \mathrm{clamp}\big((e_l / e_l(0))^\gamma\big),\ 0/0 = 1,\quad
        \mathrm{constant}: m_l \text{ unchanged}

    .. math:: \mathrm{local}: c_l = \max_{k \le l} e_k,\ c_0 = 0,\quad
        \lambda = \max\big(0,\ 1 - \mathrm{contrast}\,c_1 / c_L\big),\quad
        m_l = \mathrm{clamp}\Big((c_l / c_L)^{\gamma\lambda}
        \big(1 + (\mathrm{largest} - 1)\,\lambda\,(c_l - c_{l-1}) / c_L\big)\Big)
    """
    measured = state.counts[0]
    average = torch.where(measured == 0, statistics, momentum * state.average + (1 - momentum) * statistics)
    e = divergence_of(average, divergence)
    baseline = torch.where(measured == 0, e, state.baseline)
    if policy == "relative":
        raw = (e / e.mean()) ** gamma
    elif policy == "decay":
        raw = torch.where((e == 0) & (baseline == 0), torch.ones_like(e), e / baseline) ** gamma
    elif policy == "local":
        share = e.cummax(0).values / e.max()
        strength = (1 - contrast * share[0]).clamp_min(0)
        rise = share.diff(prepend=share.new_zeros(1))
        raw = share ** (gamma * strength) * (1 + (clamp[1] - 1) * strength * rise)
    elif policy == "constant":
        raw = state.multipliers
    else:
        raise ValueError(f"policy {policy!r} is not known; expected 'relative', 'decay', 'local' or 'constant'")
    multipliers = raw if policy == "constant" else raw.clamp(*clamp)
    if normalize and policy != "constant":
        multipliers = multipliers / multipliers.mean()
    usable = torch.isfinite(statistics).all() & torch.isfinite(e).all() & (e != 0).any()
    masked = torch.zeros_like(usable) if found_inf is None else (found_inf != 0).any()
    keep = ~usable | masked
    counts = state.counts + torch.stack([usable, ~usable]).to(torch.int64) * (~masked).to(torch.int64)
    new = RateState(
        torch.where(keep, state.average, average),
        torch.where(keep, state.baseline, baseline),
        torch.where(keep, state.divergences, e),
        torch.where(keep, state.multipliers, multipliers),
        counts,
    )
    return new, new.multipliers, new.counts[1]
