"""The training losses that layer-wise rates are put on (``methods`` of a recipe)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import lwkd
from lwkd.program.compare.recipe import Method, Recipe
from lwkd.program.distill.train import by_labels, by_teacher

DEFAULT_WEIGHTS = {"kd+attention": 10.0, "kd+jacobian": 1.0, "kd+hessian": 0.1}


class Loss:
    """Scalar loss of a batch: runs the teacher where the loss, or a measurement of the rates, needs its pass.

    Args:
        method: see :data:`~lwkd.program.compare.recipe.Method`.
        recipe: temperature, alpha, weights; whether labels are used.
        student: as it is trained.
        teacher: in eval mode, frozen.
        pairing: of the two, for attention transfer.
        shift: what the student sees instead of the teacher's pictures.
        watched: whether layer-wise rates want the teacher's pass, whatever the loss.
    """

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        student: nn.Module,
        teacher: nn.Module,
        pairing: lwkd.Pairing,
        shift: Callable[[Tensor], Tensor],
        *,
        watched: bool,
    ):
        self.method, self.recipe, self.shift = method, recipe, shift
        self.student, self.teacher, self.watched = student, teacher, watched
        self.weight = recipe.weights.get(method, DEFAULT_WEIGHTS.get(method, 0.0))
        self.capture = lwkd.Capture(student, teacher, pairing) if method == "kd+attention" else None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of pictures (B, C, H, W) and labels (B,)."""
        derivatives = self.method in ("kd+jacobian", "kd+hessian")
        seen_T = x.clone().requires_grad_() if derivatives else x
        target = None
        if self.method != "supervised" or self.watched:
            with torch.set_grad_enabled(derivatives):
                target = self.teacher(seen_T)
        # Its gradient is a third derivative, which torch gets wrong through norms.
        with lwkd.losses.explicit_norms() if self.method == "kd+hessian" else nullcontext():
            logits = self.student(self.shift(seen_T))
        if self.method == "supervised":
            return by_labels(logits, y)
        assert target is not None
        loss = by_teacher(logits, target, y, self.recipe.settings, labels=self.recipe.labels)
        if self.method == "kd":
            return loss
        classes = y if self.recipe.labels and y.dim() == 1 else None  # else of the teacher's top class
        if self.capture is not None:
            transfer = lwkd.losses.attention_transfer(self.capture.student, self.capture.teacher)
        elif self.method == "kd+jacobian":
            transfer = lwkd.losses.jacobian_matching(logits, target, seen_T, classes)
        else:
            transfer = lwkd.losses.hessian_matching(logits, target, seen_T, classes)
        return loss + self.weight * transfer

    def close(self) -> None:
        """Take the hooks off."""
        if self.capture is not None:
            self.capture.close()
