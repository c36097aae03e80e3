"""Fake kernels and autograd of the attention ops."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lwkd import reference
from lwkd.registration.gradients import accumulation, gradients_through


def _positions(feature: Tensor) -> int:
    return prod(feature.shape[2:])


def _split_sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> list[list[int]]:
    """The flat sizes of the schema, one list a layer."""
    split, begin = [], 0
    for feature in features:
        split.append(list(sizes[begin : begin + feature.dim() - 2]))
        begin += feature.dim() - 2
    return split


@torch.library.register_fake("lwkd::attention_maps")
def _attention_maps_fake(
    features: list[Tensor], tangents: list[Tensor], power: float, sizes: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    maps = [
        feature.new_empty((feature.shape[0], prod(size)), dtype=accumulation(feature))
        for feature, size in zip(features, _split_sizes(features, sizes), strict=True)
    ]
    return maps, [torch.empty_like(m) for m in maps] if tangents else []


@torch.library.register_fake("lwkd::attention_maps_backward")
def _attention_maps_backward_fake(
    grad_maps: list[Tensor],
    grad_map_tangents: list[Tensor],
    features: list[Tensor],
    tangents: list[Tensor],
    power: float,
    sizes: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(f) for f in features], [torch.empty_like(t) for t in tangents]


def _attention_maps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    features, tangents, ctx.power, ctx.sizes = inputs
    ctx.layers = len(features)
    ctx.map_shapes = [(m.shape, m.dtype, m.device) for m in output[0]]
    ctx.save_for_backward(*features, *tangents)


def _filled(grads: Sequence[Tensor | None] | None, ctx: Any) -> list[Tensor]:
    """Gradients of the maps, with zeros where a map was not used."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads or [None] * ctx.layers, ctx.map_shapes, strict=True)
    ]


def _attention_maps_backward(
    ctx: Any, grad_maps: list[Tensor | None], grad_map_tangents: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], None, None]:
    features, tangents = list(ctx.saved_tensors[: ctx.layers]), list(ctx.saved_tensors[ctx.layers :])
    grads, tangent_grads = _filled(grad_maps, ctx), _filled(grad_map_tangents, ctx) if tangents else []
    if torch.is_grad_enabled():
        sizes = _split_sizes(features, ctx.sizes)
        if tangents:
            maps, map_tangents = reference.attention_maps(features, tangents, power=ctx.power, sizes=sizes)
            outputs = [*maps, *map_tangents]
        else:
            outputs = list(reference.attention_maps(features, power=ctx.power, sizes=sizes))
        found = gradients_through(outputs, [*features, *tangents], [*grads, *tangent_grads])
        return found[: ctx.layers], found[ctx.layers :], None, None
    feature_grads, moved_grads = torch.ops.lwkd.attention_maps_backward(
        grads, tangent_grads, features, tangents, ctx.power, ctx.sizes
    )
    return feature_grads, moved_grads, None, None


torch.library.register_autograd("lwkd::attention_maps", _attention_maps_backward, setup_context=_attention_maps_setup)


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
        shape = feature_S.shape[:1] + (feature_S.shape[2:] if source == "probabilities" else (_positions(feature_S),))
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
    # Only a second derivative reads the teacher again, and tensors made under inference_mode cannot be saved.
    ctx.teacher_is_saved = not any(feature.is_inference() for feature in teacher)
    ctx.save_for_backward(*student, *output[1], *(teacher if ctx.teacher_is_saved else []))


def _attention_divergence_backward(
    ctx: Any, grad: Tensor, grad_factors: list[Tensor | None]
) -> tuple[list[Tensor | None], list[None], None, None, None, None, None]:
    saved, layers = list(ctx.saved_tensors), ctx.layers
    student, factors, teacher = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
    if not ctx.has_factors:
        raise RuntimeError("lwkd::attention_divergence was called with save_factors=False and has no backward.")
    grads: list[Tensor | None]
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


torch.library.register_autograd(
    "lwkd::attention_divergence", _attention_divergence_backward, setup_context=_attention_divergence_setup
)
