"""Attention maps and attention divergence, each one call over all layers.

Legend: ``L`` layers, ``B`` batch, ``C`` channels, ``N`` map positions (product of the spatial sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lwkd import reference
from lwkd.nets.transforms import transformed
from lwkd.ops.checks import check_inputs
from lwkd.ops.gradients import DifferentiableOp, Gradients, accumulation, gradients_through
from lwkd.reference import DivergenceKind, Source


def _split_sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> list[list[int]]:
    """The schema's flat list of sizes, split into one list a layer."""
    split, begin = [], 0
    for feature in features:
        split.append(list(sizes[begin : begin + feature.dim() - 2]))
        begin += feature.dim() - 2
    return split


@torch.library.register_fake("lwkd::attention_maps")
def _attention_maps_fake(
    features: list[Tensor], tangents: list[Tensor], power: float, sizes: list[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    maps = [
        feature.new_empty((feature.shape[0], prod(size)), dtype=accumulation(feature))
        for feature, size in zip(features, _split_sizes(features, sizes), strict=True)
    ]
    rows = sum(feature.shape[0] for feature in features)
    dtype = torch.float32 if features[0].device.type == "cuda" else torch.float64
    totals = features[0].new_empty((rows, 2 if tangents else 1), dtype=dtype)
    return maps, [torch.empty_like(m) for m in maps] if tangents else [], totals


@torch.library.register_fake("lwkd::attention_maps_backward")
def _attention_maps_backward_fake(
    grad_maps: list[Tensor],
    grad_map_tangents: list[Tensor],
    features: list[Tensor],
    tangents: list[Tensor],
    power: float,
    sizes: list[int],
    maps: list[Tensor],
    totals: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(f) for f in features], [torch.empty_like(t) for t in tangents]


def _attention_maps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    features, tangents, ctx.power, ctx.sizes = inputs
    ctx.layers = len(features)
    ctx.map_shapes = [(m.shape, m.dtype, m.device) for m in output[0]]
    # From the maps the backward goes on without reading the features for them.
    ctx.save_for_backward(*features, *tangents, *output[0], *output[1], output[2])
    ctx.with_tangents = bool(tangents)
    ctx.set_materialize_grads(False)  # nothing depends on the totals


def _filled(grads: Sequence[Tensor | None] | None, ctx: Any) -> list[Tensor]:
    """Gradients of the maps, with zeros for maps that nothing depends on."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads or [None] * ctx.layers, ctx.map_shapes, strict=True)
    ]


def _attention_maps_backward(
    ctx: Any, _: Any, grad_maps: Gradients, grad_map_tangents: Gradients, grad_totals: Tensor | None
) -> tuple[Gradients, Gradients, None, None]:
    inputs = (1 + ctx.with_tangents) * ctx.layers
    saved, maps, totals = list(ctx.saved_tensors[:inputs]), list(ctx.saved_tensors[inputs:-1]), ctx.saved_tensors[-1]
    features, tangents = saved[: ctx.layers], saved[ctx.layers :]
    grads, tangent_grads = _filled(grad_maps, ctx), _filled(grad_map_tangents, ctx) if tangents else []
    if torch.is_grad_enabled():
        sizes = _split_sizes(features, ctx.sizes)
        if tangents:
            again, tangents_again = reference.attention_maps(features, tangents, power=ctx.power, sizes=sizes)
            outputs = [*again, *tangents_again]
        else:
            outputs = list(reference.attention_maps(features, power=ctx.power, sizes=sizes))
        found = gradients_through(outputs, [*features, *tangents], [*grads, *tangent_grads])
        return found[: ctx.layers], found[ctx.layers :], None, None
    options = ctx.power, ctx.sizes, maps, totals
    fused = torch.ops.lwkd.attention_maps_backward(grads, tangent_grads, features, tangents, *options)
    return *fused, None, None


_attention_maps = DifferentiableOp("attention_maps", _attention_maps_setup, _attention_maps_backward)


@torch.library.register_fake("lwkd::attention_divergence")
def _attention_divergence_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    source: str,
    power: float,
    kind: str,
    betas: list[float],
    save_factors: bool,
) -> tuple[Tensor, list[Tensor]]:
    factors = []
    for feature_S, feature_T in zip(student, teacher, strict=True):
        batch, _, *spatial = feature_S.shape
        shape = (batch, *spatial) if source == "probabilities" else (batch, prod(spatial))
        factors.append(feature_S.new_empty(shape, dtype=accumulation(feature_S, feature_T)))
    divergence = student[0].new_empty((len(student),), dtype=accumulation(*student, *teacher))
    return divergence, factors if save_factors else []


@torch.library.register_fake("lwkd::attention_divergence_backward")
def _attention_divergence_backward_fake(
    grad: Tensor, student: list[Tensor], factors: list[Tensor], source: str, power: float
) -> list[Tensor]:
    return [torch.empty_like(feature) for feature in student]


def _attention_divergence_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    student, teacher, ctx.source, ctx.power, ctx.kind, ctx.betas, ctx.has_factors = inputs
    ctx.layers = len(student)
    ctx.set_materialize_grads(False)  # nothing depends on the factors: autograd would make zeros for each of them
    # Tensors made under inference_mode cannot be saved; only a second derivative would need them.
    ctx.teacher_is_saved = not any(feature.is_inference() for feature in teacher)
    ctx.save_for_backward(*student, *output[1], *(teacher if ctx.teacher_is_saved else []))


def _attention_divergence_backward(
    ctx: Any, _: Any, grad: Tensor | None, grad_factors: Gradients
) -> tuple[Gradients, list[None], None, None, None, None, None]:
    saved, layers = list(ctx.saved_tensors), ctx.layers
    student, factors, teacher = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
    if not ctx.has_factors:
        raise RuntimeError("lwkd::attention_divergence was called with save_factors=False and has no backward.")
    if grad is None:  # a function behind it has none, which is a zero
        return [None] * layers, [None] * layers, None, None, None, None, None
    grads: Gradients
    if torch.is_grad_enabled():
        if not ctx.teacher_is_saved:
            raise RuntimeError(
                "lwkd.ops.attention_divergence: a second derivative needs the teacher's features again, and tensors "
                "made under torch.inference_mode() cannot be saved. Run the teacher under torch.no_grad()."
            )
        options = {"source": ctx.source, "power": ctx.power, "kind": ctx.kind, "betas": tuple(ctx.betas)}
        grads = gradients_through([reference.attention_divergence(student, teacher, **options)], student, [grad])
    else:
        grads = torch.ops.lwkd.attention_divergence_backward(grad, student, factors, ctx.source, ctx.power)
    return grads, [None] * ctx.layers, None, None, None, None, None


_attention_divergence = DifferentiableOp(
    "attention_divergence", _attention_divergence_setup, _attention_divergence_backward
)


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
    tangents; a second derivative (``create_graph=True``), and a transform of ``torch.func``, go through
    :func:`lwkd.reference.attention_maps`.

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
    if sizes is not None:
        _check_sizes(features, sizes)
    if transformed():
        return reference.attention_maps(features, None if tangents is None else moved, power=power, sizes=sizes)
    if sizes is None:
        flat = [length for feature in features for length in feature.shape[2:]]
    else:
        flat = [length for size in sizes for length in size]
    maps, map_tangents, _ = _attention_maps(features, moved, power, flat)
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
    (``create_graph=True``), and a transform of ``torch.func``, go through :func:`lwkd.reference.attention_divergence`.

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
    if transformed():
        return reference.attention_divergence(student, teacher, source=source, power=power, kind=kind, betas=betas)
    save_factors = False
    if torch.is_grad_enabled():
        for layer, feature in enumerate(teacher):
            if feature.requires_grad:
                raise ValueError(
                    f"lwkd.ops.attention_divergence: layer {layer}: the teacher's feature requires grad, and no "
                    "gradient flows to the teacher. Run the teacher under torch.no_grad(), or pass feature.detach()."
                )
        save_factors = any(feature.requires_grad for feature in student)
    found = _attention_divergence(student, teacher, source, power, kind, list(betas), save_factors)
    divergence: Tensor = found[0]
    return divergence
