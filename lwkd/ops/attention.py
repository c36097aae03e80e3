"""Attention maps and attention divergence, each one call over all layers; backward in :mod:`lwkd.registration`.

Legend: ``L`` layers, ``B`` batch, ``C`` channels, ``N`` map positions (product of the spatial sizes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.ops.checks import check_inputs
from lwkd.reference import DivergenceKind, Source


def attention_maps(
    features: Sequence[Tensor],
    tangents: Sequence[Tensor] | None = None,
    *,
    power: float = 2.0,
    sizes: Sequence[Sequence[int]] | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    r"""Normalised attention maps of all layers, and their tangents where feature tangents are given.

    .. math:: A_n = \sum_c |F_{cn}|^p,\quad r = \mathrm{area}(A),\quad q = r / \sum_n r_n,\qquad
        \dot A_n = \sum_c p\,|F_{cn}|^{p-1}\,\mathrm{sgn}(F_{cn})\,\dot F_{cn},\quad
        \dot q = (\dot r - q \sum_n \dot r_n) / \sum_n r_n

    Each feature (and tangent) is read once. Differentiable once by a fused backward, with respect to features and
    tangents; a second derivative (``create_graph=True``) goes through :func:`lwkd.reference.attention_maps`.

    Args:
        features: L tensors ``(B, C, *spatial)`` with at most three spatial dimensions; float32, float16, bfloat16
            or float64. Contiguous and channels-last tensors are read where they are, other layouts from a copy.
        tangents: L tensors of the same shapes, or None.
        power: exponent ``p`` (at least 1).
        sizes: L spatial sizes to which the maps are area-averaged before they are normalised; None keeps their own.

    Returns:
        L maps ``(B, N)`` that sum to 1 over N (accumulated in and returned as float32; float64 for float64 input);
        with tangents a pair (maps, map tangents). A map whose sum is below 1e-24 is the uniform map, with tangent 0.

    Raises:
        ValueError: for no layers, an empty tensor, shapes or sizes that do not belong together, or a power below 1.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Zagoruyko & Komodakis 2017, eq. 1 (sum of powers over channels); normalised to sum 1.

    >>> attention_maps([torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])])
    [tensor([[0.1667, 0.8333]])]
    """
    features, moved = list(features), [] if tangents is None else list(tangents)
    check_inputs("attention_maps", [*features, *moved])
    if tangents is not None and len(moved) != len(features):
        raise ValueError(
            f"lwkd.ops.attention_maps: expected as many tangents as features, found {len(features)} features and "
            f"{len(moved)} tangents. Pass one of each for every layer."
        )
    if sizes is None:
        flat = [length for feature in features for length in feature.shape[2:]]
    else:
        _check_sizes(features, sizes)
        flat = [length for size in sizes for length in size]
    maps, map_tangents = torch.ops.lwkd.attention_maps(features, moved, power, flat)
    return maps if tangents is None else (maps, map_tangents)


def _check_sizes(features: list[Tensor], sizes: Sequence[Sequence[int]]) -> None:
    if len(sizes) != len(features):
        raise ValueError(
            f"lwkd.ops.attention_maps: expected one size a layer, found {len(sizes)} sizes for {len(features)} layers."
        )
    for layer, (feature, size) in enumerate(zip(features, sizes, strict=True)):
        if len(size) != feature.dim() - 2:
            raise ValueError(
                f"lwkd.ops.attention_maps: layer {layer}: expected a size of {feature.dim() - 2} lengths, one for each "
                f"spatial dimension of the feature {tuple(feature.shape)}, found {tuple(size)}."
            )


def attention_divergence(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    source: Source = "features",
    power: float = 2.0,
    kind: DivergenceKind = "jsd",
    betas: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    r"""Distance between the attention of student and teacher, one number a layer, mean over the batch.

    With the maps q, p of :func:`attention_maps`, both at the smaller of the two sizes:

    .. math:: \mathrm{jsd} = H(b_1 q + b_2 p) - b_1 H(q) - b_2 H(p),\qquad
        \mathrm{l2} = \| q/\|q\| - p/\|p\| \|^2

    Each feature is read once. Differentiable once with respect to the student's features, by a fused backward that
    reads the feature once and writes the gradient once, in its dtype and memory format; a second derivative
    (``create_graph=True``) goes through :func:`lwkd.reference.attention_divergence`.

    Args:
        student: L features ``(B, C, *spatial)`` with at most three spatial dimensions, or probabilities
            ``(B, heads, N, N)``; float32, float16, bfloat16 or float64. Contiguous and channels-last tensors are read
            where they are, other layouts from a copy.
        teacher: L features of the same batch and number of spatial dimensions, without gradient; channels, sizes and
            dtype may differ.
        source: ``"features"`` (maps), or ``"probabilities"`` (heads averaged, distance per query row, mean over rows).
        power: exponent of the maps, at least 1.
        kind: ``"jsd"`` in nats, between 0 and H(betas) = ln 2 for equal weights; ``"l2"`` between 0 and 2.
        betas: weights of student and teacher; positive, sum 1 (``"jsd"`` only).

    Returns:
        ``(L,)`` float32, accumulated in float32 or better (float64 for float64 input). NaN where a feature holds NaN
        or infinity. The same bits on every run and for any number of threads.

    Raises:
        ValueError: for no layers, an empty tensor, shapes that do not belong together, an option that is not one of
            the above, or a teacher that requires grad.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA.
        RuntimeError: for an input that carries a forward-mode tangent, and for a second derivative with a teacher
            that ran under ``torch.inference_mode()``.

    Source: arXiv 2407.04871 (JSD of attention); Zagoruyko & Komodakis 2017, eq. 2 (l2).

    >>> one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> attention_divergence([one, one], [one, other])
    tensor([0.0000, 0.6931])
    """
    student, teacher = list(student), list(teacher)
    check_inputs("attention_divergence", [*student, *teacher])
    if len(student) != len(teacher):
        raise ValueError(
            f"lwkd.ops.attention_divergence: expected as many teacher features as student features, found "
            f"{len(student)} of the student and {len(teacher)} of the teacher. Pass one of each for every layer."
        )
    save_factors = False
    if torch.is_grad_enabled():
        for layer, feature in enumerate(teacher):
            if feature.requires_grad:
                raise ValueError(
                    f"lwkd.ops.attention_divergence: layer {layer}: the teacher's feature requires grad, and no "
                    "gradient flows to the teacher. Run the teacher under torch.no_grad(), or pass feature.detach()."
                )
        save_factors = any(feature.requires_grad for feature in student)
    divergence, _ = torch.ops.lwkd.attention_divergence(
        student, teacher, source, power, kind, list(betas), save_factors
    )
    return divergence
