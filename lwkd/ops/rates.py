"""The rate update, one call for all layers; it has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwkd.ops.checks import check_inputs
from lwkd.reference import Policy, RateState, Ratio


@torch.library.register_fake("lwkd::update_rates")
def _update_rates_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[: len(RateState._fields)])


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
    r"""One step from statistics to multipliers, in one call.

    .. math:: s \leftarrow \mu s + (1-\mu)\,s_{new}\ (\text{the first measurement starts the average}),\quad
        e = \mathrm{divergence}(s)

    .. math:: \mathrm{relative}: m_l = \mathrm{clamp}\big((e_l / \bar e)^\gamma\big),\quad
        \mathrm{decay}: m_l = \mathrm{clamp}\big((e_l / e_l(0))^\gamma\big),\ 0/0 = 1,\quad
        \mathrm{constant}: m_l \text{ unchanged}

    .. math:: \mathrm{local}: c_l = \max_{k \le l} e_k,\ c_0 = 0,\quad
        \lambda = \max\big(0,\ 1 - \mathrm{contrast}\,c_1 / c_L\big),\quad
        m_l = \mathrm{clamp}\Big((c_l / c_L)^{\gamma\lambda}
        \big(1 + (\mathrm{largest} - 1)\,\lambda\,(c_l - c_{l-1}) / c_L\big)\Big)

    ``normalize`` divides by the mean multiplier afterwards. A measurement whose statistics or divergence are NaN or
    infinite, or whose divergences are all zero, changes nothing but the count of skipped ones; with ``found_inf``
    nonzero nothing changes at all. Has no gradient.

    Args:
        state: as returned by the last call, or :func:`lwkd.reference.initial_rates`.
        statistics: ``(L, S)`` float32; S as the divergence needs it.
        divergence: how a divergence is formed from the averaged statistics: ``"attention"`` (S = 1, the statistic
            itself), ``"direction"``, ``"norm"`` or ``"relative"`` (S = 4, the sums of :func:`lwkd.ops.jacobian_sums`),
            ``"hessian"`` (S = 2, mean curvatures of student and teacher).
        policy: the rule.
        gamma: exponent of the rule; a negative one reverses it.
        momentum: weight of the past average, in [0, 1).
        clamp: smallest and largest multiplier.
        normalize: rescale to mean 1.
        contrast: of ``"local"``: where the first layer has at least the share ``1 / contrast`` of the largest
            divergence, ``λ`` is 0 and all multipliers are 1; at least 1.
        found_inf: scalar tensor, nonzero where the gradient step was infinite.

    Returns:
        The new state, its multipliers ``(L,)`` and the count of skipped measurements (int64 scalar).
        No input is modified; the arithmetic is float64, the state float32.

    Raises:
        ValueError: for shapes that do not belong together, or an option that is not one of the above.
        TypeError: for a state or statistics that are not float32 (counts: int64).
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA.

    Source: our reading of arXiv 2407.04871 (the exact rule is not published); ``"local"`` is our own.

    >>> import lwkd
    >>> state, multipliers, skipped = update_rates(lwkd.reference.initial_rates(2), torch.tensor([[0.3], [0.1]]))
    >>> multipliers, int(skipped)
    (tensor([1.5000, 0.5000]), 0)
    """
    check_inputs("update_rates", [*state, statistics])
    new = RateState(
        *torch.ops.lwkd.update_rates.default(
            *(tensor.detach() if tensor.requires_grad else tensor for tensor in (*state, statistics)),
            divergence,
            policy,
            gamma,
            momentum,
            list(clamp),
            normalize,
            contrast,
            found_inf,
        )
    )
    return new, new.multipliers, new.counts[1]
