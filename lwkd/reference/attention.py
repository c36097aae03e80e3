r"""The specification of attention maps and their divergence, in plain PyTorch.

Legend: ``L`` layers, ``B`` batch, ``C`` channels, ``N`` map positions (product of the spatial sizes).
Lists over layers are plural; student before teacher, always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY_MAP = 1e-24
"""A map whose sum is below this counts as the uniform map (its gradient is 0)."""

LARGEST_JSD = math.log(2.0)
"""Upper bound of the JSD with equal weights, in nats: disjoint maps."""

DivergenceKind = Literal["jsd", "l2"]
Source = Literal["features", "probabilities"]


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _resize(maps_BN: Tensor, spatial: Sequence[int], size: Sequence[int]) -> Tensor:
    """Area average of maps ``(B, *spatial)`` to ``(B, *size)`` (adaptive average pooling)."""
    if tuple(spatial) == tuple(size) or not spatial:
        return maps_BN
    pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(spatial)]
    return pool(maps_BN.reshape(maps_BN.shape[0], 1, *spatial), tuple(size)).flatten(1)


def _totals(maps_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each map ``(B, 1)``, 1 where it is empty and NaN where it is too large, and which maps are empty."""
    total_B1 = maps_BN.sum(1, keepdim=True)
    total_B1 = torch.where(total_B1.isinf(), math.nan, total_B1)  # a quotient by infinity would be 0
    empty_B1 = total_B1 < EMPTY_MAP
    return torch.where(empty_B1, torch.ones_like(total_B1), total_B1), empty_B1


def _normalise(maps_BN: Tensor) -> Tensor:
    """Maps to sum 1 per sample; an empty map becomes the uniform one, with no gradient."""
    total_B1, empty_B1 = _totals(maps_BN)
    return torch.where(empty_B1, maps_BN.new_tensor(1.0 / maps_BN.shape[1]), maps_BN / total_B1)


def _powers(feature: Tensor, power: float) -> Tensor:
    """``|F|^power``, with derivative 0 at exact zeros (the subgradient that ReLU features need)."""
    if power == 2:
        return feature * feature
    zero = feature == 0
    magnitude = torch.where(zero, torch.ones_like(feature), feature).abs() ** power
    return torch.where(zero, torch.zeros_like(magnitude), magnitude)


def _sum_map(feature: Tensor, power: float) -> Tensor:
    if not 1 <= power < float("inf"):
        raise ValueError(f"power is {power}; expected a finite number of at least 1")
    return _powers(widen(feature), power).sum(1).flatten(1)


def attention_maps(
    features: Sequence[Tensor],
    tangents: Sequence[Tensor] | None = None,
    *,
    power: float = 2.0,
    sizes: Sequence[Sequence[int]] | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    r"""In plain PyTorch what :func:`lwkd.ops.attention_maps` does: maps that sum to 1, and their tangents.

    .. math:: A_n = \sum_c |F_{cn}|^p,\quad r = \mathrm{area}(A),\quad q = r / \sum_n r_n,\qquad
        \dot A_n = \sum_c p\,|F_{cn}|^{p-1}\,\mathrm{sgn}(F_{cn})\,\dot F_{cn},\quad
        \dot q = (\dot r - q \sum_n \dot r_n) / \sum_n r_n
    """
    sizes = [feature.shape[2:] for feature in features] if sizes is None else sizes
    maps, map_tangents = [], []
    for layer, feature in enumerate(features):
        spatial, size = feature.shape[2:], sizes[layer]
        resized_BN = _resize(_sum_map(feature, power), spatial, size)
        maps.append(_normalise(resized_BN))
        if tangents is not None:
            wide = widen(feature)
            if power == 2:  # smooth at zero, which the general form would hide from a second derivative
                slope = 2 * wide
            else:
                slope = torch.sgn(wide) if power == 1 else power * torch.sgn(wide) * _powers(wide, power - 1)
            moved_BN = _resize((slope * widen(tangents[layer])).sum(1).flatten(1), spatial, size)
            total_B1, empty_B1 = _totals(resized_BN)
            tangent_BN = (moved_BN - maps[-1] * moved_BN.sum(1, keepdim=True)) / total_B1
            map_tangents.append(torch.where(empty_B1, torch.zeros_like(tangent_BN), tangent_BN))
    return maps if tangents is None else (maps, map_tangents)


def _excess(x: Tensor, ratio: Tensor) -> Tensor:
    """``g(x) = (1 + x) log(1 + x) − x`` for x ≥ −1; ``ratio`` is 1 + x, formed without cancellation.

    Near −1 a sum of 1 and x has lost the digits that the logarithm, which is the derivative, needs. At a ratio of 0 the
    derivative is given as −1.
    """
    near = x.abs() < 0.25
    small, large = torch.where(near, x, 0.0), torch.where(near | (ratio == 0), 1.0, ratio)
    return torch.where(near, (1 + small) * torch.log1p(small), large * torch.log(large)) - x


def _jensen_shannon(student_BN: Tensor, teacher_BN: Tensor, betas: tuple[float, float]) -> Tensor:
    """JSD of distributions along the last dimension, in nats, in the form that keeps small distances exact."""
    b1, b2 = betas
    mixture = b1 * student_BN + b2 * teacher_BN
    safe = torch.where(mixture == 0, 1.0, mixture)
    x = (student_BN - teacher_BN) / safe
    excess = b1 * _excess(b2 * x, student_BN / safe) + b2 * _excess(-b1 * x, teacher_BN / safe)
    return (mixture * excess).sum(-1)


def _unit_distance(student_BN: Tensor, teacher_BN: Tensor) -> Tensor:
    return (F.normalize(student_BN, dim=-1, eps=0.0) - F.normalize(teacher_BN, dim=-1, eps=0.0)).square().sum(-1)


def common_size(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    """The smaller of the two maps' sizes, dimension by dimension.

    >>> common_size(torch.zeros(1, 8, 4, 6), torch.zeros(1, 16, 8, 3))
    (4, 3)
    """
    return tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))


def attention_divergence(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    source: Source = "features",
    power: float = 2.0,
    kind: DivergenceKind = "jsd",
    betas: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    r"""In plain PyTorch what :func:`lwkd.ops.attention_divergence` does: the batch mean of the distance of maps q, p.

    .. math:: \mathrm{jsd} = H(b_1 q + b_2 p) - b_1 H(q) - b_2 H(p),\qquad
        \mathrm{l2} = \| q/\|q\| - p/\|p\| \|^2
    """
    if kind not in ("jsd", "l2") or source not in ("features", "probabilities"):
        raise ValueError(
            f"kind {kind!r} of {source!r} is not known; expected 'jsd' or 'l2', of 'features' or 'probabilities'"
        )
    divergences = []
    for feature_S, feature_T in zip(student, teacher, strict=True):
        if source == "probabilities":
            map_S, map_T = (_normalise_rows(widen(f).mean(1)) for f in (feature_S, feature_T))
        else:
            size = common_size(feature_S, feature_T)
            map_S, map_T = (_normalise(_resize(_sum_map(f, power), f.shape[2:], size)) for f in (feature_S, feature_T))
        distance = _jensen_shannon(map_S, map_T, betas) if kind == "jsd" else _unit_distance(map_S, map_T)
        divergences.append(distance.mean())
    return torch.stack(divergences)


def _normalise_rows(probabilities_BNN: Tensor) -> Tensor:
    return _normalise(probabilities_BNN.flatten(0, 1)).view_as(probabilities_BNN)
