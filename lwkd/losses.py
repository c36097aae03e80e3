"""Distillation losses: scalars that train the student (legend: B batch, K classes)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd.nets.feature_hooks import FeatureHooks
from lwkd.nets.passes import check_two_nets
from lwkd.pairing.pairs import Pairing, layouts_of
from lwkd.reference import DivergenceKind
from lwkd.signals import Attention, Hessian, Jacobian
from lwkd.signals.forward_mode import TrainedNorms
from lwkd.signals.matching import Form, check_logits


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    r"""Hinton distillation: the teacher's softened classes, beside the labels.

    .. math:: \alpha\,T^2\,\mathrm{KL}\big(\sigma(z_T/T)\,\|\,\sigma(z_S/T)\big)
        + (1-\alpha)\,\mathrm{CE}(z_S, y)

    Without ``targets`` only the first term is left, with weight 1. The teacher's logits are detached. A class that the
    teacher masks by −inf has probability 0 and adds nothing; one that only the student masks makes the divergence
    infinite, as it is.

    Args:
        student_logits: ``(B, K)``, any floating dtype (computed in float32 or better).
        teacher_logits: ``(B, K)``.
        targets: class indices ``(B,)``, or None.
        temperature: T, positive.
        alpha: weight of the teacher, in [0, 1].

    Returns:
        Scalar, mean over the batch, in nats.

    Raises:
        ValueError: shapes differ, or an option is out of its range.

    Source: Hinton, Vinyals & Dean 2015, section 2 (T² keeps the gradients' size).

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation(logits, logits, torch.tensor([0]), alpha=1.0)
    tensor(0.)
    """
    wide_S, wide_T = _checked(student_logits, teacher_logits, temperature, alpha)
    log_q, log_p = (F.log_softmax(z / temperature, dim=1) for z in (wide_S, wide_T))
    soft = temperature**2 * _divergence(log_q, log_p) / len(log_q)
    if targets is None:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(wide_S, targets)


def multilabel_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    r"""Distillation where a picture has any number of classes: each class is a question of its own, answered yes or no.

    .. math:: \sum_k \alpha\,T^2\,\mathrm{KL}\big(\mathrm{Bern}(\sigma(z^T_k/T))\,\|\,
        \mathrm{Bern}(\sigma(z^S_k/T))\big) + (1-\alpha)\,\mathrm{BCE}(z^S_k, y_k)

    The sum over the classes, not their mean: it is the divergence of whole sets of labels, and classes that a picture
    clearly does not have leave the size of its gradient as it is: learning rates of :func:`distillation` suit it.
    Without ``targets`` only the first term is left, with weight 1. The teacher's logits are detached, and may be
    infinite.

    Args:
        student_logits: ``(B, K)``, any floating dtype (computed in float32 or better), finite.
        teacher_logits: ``(B, K)``.
        targets: 1 where the picture has the class and 0 elsewhere ``(B, K)``, any dtype; or None.
        temperature: T, positive.
        alpha: weight of the teacher, in [0, 1].

    Returns:
        Scalar, mean over the batch, in nats.

    Raises:
        ValueError: shapes differ, or an option is out of its range.

    Source: the soft targets of Hinton, Vinyals & Dean 2015, section 2, for the binary cross-entropy that multi-label
    nets are trained with.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> multilabel_distillation(logits, logits, torch.tensor([[1, 0]]), alpha=1.0)
    tensor(0.)
    """
    wide_S, wide_T = _checked(student_logits, teacher_logits, temperature, alpha)
    if targets is not None and targets.shape != wide_S.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, logits {tuple(wide_S.shape)}; expected a 0 or a 1 for every "
            "class of every picture (class indices go with distillation)"
        )
    log_q, log_p = (
        torch.stack([F.logsigmoid(z / temperature), F.logsigmoid(-z / temperature)]) for z in (wide_S, wide_T)
    )
    soft = temperature**2 * _divergence(log_q, log_p) / len(wide_S)
    if targets is None:
        return soft
    hard = F.binary_cross_entropy_with_logits(wide_S, targets.to(wide_S.dtype), reduction="sum") / len(wide_S)
    return alpha * soft + (1 - alpha) * hard


def _checked(student_logits: Tensor, teacher_logits: Tensor, temperature: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Logits of both nets in float32 or better, the teacher's detached."""
    check_logits(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1]")
    wide_S, wide_T = (z if z.element_size() >= 4 else z.float() for z in (student_logits, teacher_logits.detach()))
    return wide_S, wide_T


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Sum of p · log(p / q); 0 · log(0 / q) is 0, where arithmetic finds NaN."""
    never = log_p.exp() == 0
    return F.kl_div(log_q.masked_fill(never, 0.0), log_p.masked_fill(never, 0.0), reduction="sum", log_target=True)


def attention_transfer(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    power: float = 2.0,
    kind: DivergenceKind = "l2",
    betas: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    r"""Attention transfer: mean over layers of the distance between normalised attention maps, on the fused op.

    .. math:: \frac1L \sum_l \frac1B \sum_b \| A_S/\|A_S\| - A_T/\|A_T\| \|^2

    Args:
        student_features: L features ``(B, C, *spatial)``.
        teacher_features: L features of the same batch; channels and sizes may differ. Detached.
        power: exponent of the maps, at least 1.
        kind: ``"l2"``, or ``"jsd"`` for the Jensen-Shannon divergence of the maps.
        betas: weights of student and teacher in the JSD.

    Returns:
        Scalar. :class:`lwkd.Capture` gives features that carry the student's graph.

    Source: Zagoruyko & Komodakis 2017, eq. 2 (there the sum over layers, scaled by beta/2).

    >>> import torch
    >>> features = [torch.rand(2, 8, 4, 4)]
    >>> attention_transfer(features, features)
    tensor(0.)
    """
    return Attention(power=power, kind=kind, betas=betas).loss(student_features, teacher_features)


def jacobian_matching(
    student_logits: Tensor,
    teacher_logits: Tensor,
    x: Tensor,
    targets: Tensor | None = None,
    *,
    form: Form = "class",
    seed: int = 0,
) -> Tensor:
    r"""Jacobian matching: squared distance of the input gradients of one logit, each normalised per row.

    .. math:: \frac1B \sum_b \Big\| \frac{g^S_b}{\|g^S_b\|} - \frac{g^T_b}{\|g^T_b\|} \Big\|^2,\qquad
        g_b = \frac{\partial}{\partial x_b} \sum_i w_i \cdot z_i

    ``w`` is the one-hot true class, or random signs over the classes (the projected form). Where no row reaches
    another's logits, the sum is row b alone; through batch norms in train mode rows do. Differentiable with respect to
    the student's parameters; the teacher's gradient is detached.

    Args:
        student_logits: ``(B, K)``, computed from ``x`` with gradients enabled.
        teacher_logits: ``(B, K)``, computed from ``x`` with gradients enabled; its parameters may be frozen.
        x: the input of both, with ``requires_grad``; float32 or float64.
        targets: class indices ``(B,)``; None takes the teacher's top class.
        form: ``"class"`` or ``"projected"``.
        seed: of the projection.

    Returns:
        Scalar between 0 and 4. A gradient that is exactly zero counts as a zero vector.

    Raises:
        ValueError: shapes differ, an unknown form, or logits without a graph to ``x``.

    Source: Srinivas & Fleuret 2018 (class form); Czarnecki et al. 2017, stochastic Sobolev training (projected form).

    >>> import torch
    >>> x, net = torch.rand(4, 3, requires_grad=True), torch.nn.Linear(3, 2)
    >>> jacobian_matching(net(x), net(x), x)
    tensor(0., grad_fn=<MeanBackward0>)
    """
    return Jacobian().loss(student_logits, teacher_logits, x, targets, form=form, seed=seed)


def hessian_matching(
    student_logits: Tensor, teacher_logits: Tensor, x: Tensor, targets: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    r"""Curvature matching: distance of second directional derivatives of the class's log-probability.

    .. math:: \frac{\sum_b (c^S_b - c^T_b)^2}{\sum_b (c^S_b)^2 + (c^T_b)^2},\qquad
        c_b = t_b \cdot \Big(\frac{\partial^2}{\partial x^2} \sum_i \log \sigma(z_i)_{y_i}\; t\Big)_b

    with random signs ``t``, the same for both nets. Where no row reaches another's logits, :math:`c_b` is the second
    derivative of row b's log-probability along :math:`t_b`; batch norms in train mode add what the rows are to each
    other. The log-probability is curved where the logits of a ReLU net are
    not. Differentiable with respect to the student's parameters (three times through the net); the teacher's
    derivative is detached. Through batch norms in train mode, instance norms and layer norms torch finds wrong third
    derivatives: a student with those makes its pass inside :func:`explicit_norms`.

    Args:
        student_logits: ``(B, K)``, computed from ``x`` with gradients enabled.
        teacher_logits: ``(B, K)``, computed from ``x`` with gradients enabled; its parameters may be frozen.
        x: the input of both, with ``requires_grad``.
        targets: class indices ``(B,)``; None takes the teacher's top class.
        seed: of the tangent.

    Returns:
        Scalar between 0 and 2; 0 where neither net is curved.

    Raises:
        ValueError: shapes differ, or logits without a graph to ``x``.
        RuntimeError: the student made its pass through norms whose third derivatives torch gets wrong.

    Source: arXiv 2407.04871 (second derivatives along the input); the normalisation is ours.

    >>> import torch
    >>> x, net = torch.rand(4, 3, requires_grad=True), torch.nn.Linear(3, 2)
    >>> float(hessian_matching(net(x), net(x), x))
    0.0
    """
    return Hessian().loss(student_logits, teacher_logits, x, targets, seed=seed)


def explicit_norms() -> AbstractContextManager[Any]:
    r"""Inside, normalisations are plain arithmetic that can be differentiated any number of times.

    .. math:: y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta

    of ``batch_norm`` in train mode, ``instance_norm`` and ``layer_norm`` of ``torch.nn.functional``, which all modules
    call; running statistics are updated as usual. For the student's pass before :func:`hessian_matching`; it takes
    longer and more memory than torch's own.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> x = torch.rand(4, 3, requires_grad=True)
    >>> with explicit_norms():
    ...     logits = net(x)
    >>> float(hessian_matching(logits, logits, x))
    0.0
    """
    return TrainedNorms()


class Capture:
    """Features of both nets with the student's graph, for losses on features such as attention transfer.

    After a pass of each net, ``student`` and ``teacher`` are lists of ``(B, C, *spatial)`` views, one a pair, and
    can be read once. A context manager; :meth:`close` removes the hooks.

    Args:
        student: the student.
        teacher: the teacher; its features are detached.
        pairing: which layers.

    Raises:
        ValueError: student and teacher are one module.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairing: Pairing) -> None:
        pairing.check(student, teacher)
        check_two_nets(student, teacher, "lwkd.Capture")
        layouts_S, layouts_T = layouts_of(pairing)
        self._student = FeatureHooks(student, pairing.student_layers, layouts_S, "student", detach=False)
        self._teacher = FeatureHooks(teacher, pairing.teacher_layers, layouts_T, "teacher")

    @property
    def student(self) -> list[Tensor]:
        """Features of the student's last pass, carrying its graph."""
        return self._features(self._student, self._teacher)

    @property
    def teacher(self) -> list[Tensor]:
        """Features of the teacher's last pass, detached."""
        return self._features(self._teacher, self._student)

    @staticmethod
    def _features(hooks: FeatureHooks, other: FeatureHooks) -> list[Tensor]:
        return hooks.compared(hooks.outputs(), hooks.padding, other.padding)

    def close(self) -> None:
        """Remove the hooks."""
        self._student.close()
        self._teacher.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
