r"""Derivatives of the logits along the input as training losses (legend: B batch, K classes, x any shape).

The student's derivative keeps its graph, so that a loss on it trains the student; the teacher's is detached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd import ops

Form = Literal["class", "projected"]

WRONG_IN_THIRD = ("BatchNorm", "LayerNorm")
"""Parts of the names of nodes whose third derivatives torch gets wrong; see :mod:`lwkd.signals.forward_mode`."""

NO_GRAPH = (
    "the {}'s logits carry no graph to the input: call x.requires_grad_() before the passes, and run the teacher with "
    "gradients enabled (its parameters may be frozen)"
)


def input_gradient_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    x: Tensor,
    targets: Tensor | None = None,
    *,
    form: Form = "class",
    seed: int = 0,
) -> Tensor:
    """See :func:`lwkd.losses.jacobian_matching`."""
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; expected 'class' or 'projected'")
    _check_graphs(student_logits, teacher_logits, x)
    if form == "class":
        classes = teacher_logits.detach().argmax(1) if targets is None else targets
        weights = F.one_hot(classes, student_logits.shape[1]).to(student_logits.dtype)
    else:
        weights = ops.rademacher([student_logits.detach()], seed)[0]
        # Classes that a net masks by −inf are none.
        masked = (student_logits.detach() == float("-inf")) | (teacher_logits.detach() == float("-inf"))
        weights = weights.masked_fill(masked, 0.0)
    gradient_T = _input_gradient("teacher", teacher_logits, x, weights.to(teacher_logits.dtype), retain_graph=True)
    gradient_S = _input_gradient("student", student_logits, x, weights, create_graph=True)
    return (_unit(gradient_S) - _unit(gradient_T.detach())).square().sum(1).mean()


def input_curvature_distance(
    student_logits: Tensor, teacher_logits: Tensor, x: Tensor, targets: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    """See :func:`lwkd.losses.hessian_matching`."""
    _check_graphs(student_logits, teacher_logits, x)
    _check_norms(student_logits)
    classes = teacher_logits.detach().argmax(1) if targets is None else targets
    tangent = ops.rademacher([x.detach()], seed)[0]
    c_T = _curvature_along("teacher", teacher_logits, x, classes, tangent).detach()
    c_S = _curvature_along("student", student_logits, x, classes, tangent)
    whole = c_S.square().sum() + c_T.square().sum()
    return (c_S - c_T).square().sum() / torch.where(whole == 0, torch.ones_like(whole), whole)


def _check_norms(logits: Tensor) -> None:
    """Raise RuntimeError where torch finds wrong third derivatives of the logits."""
    for node in nodes_behind(logits):
        if any(part in node.name() for part in WRONG_IN_THIRD) and getattr(node, "_saved_training", True):
            raise RuntimeError(
                f"the student's pass went through a norm ({node.name()}) of which torch finds wrong third derivatives, "
                "and the gradient of this loss is one. Make the pass inside lwkd.losses.explicit_norms(), or use batch "
                "norms in eval mode, group norms, or jacobian_matching"
            )


def nodes_behind(value: Tensor) -> Iterator[Any]:
    """The nodes of torch.autograd that a derivative of this value reaches, each once."""
    seen, ahead = set[Any](), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        # Behind an op without a derivative (those of quantized layers) there are zeros only.
        if node is None or node in seen or "NotImplemented" in node.name():
            continue
        seen.add(node)
        yield node
        ahead.extend(parent for parent, _ in node.next_functions)


def _curvature_along(whose: str, logits: Tensor, x: Tensor, classes: Tensor, tangent: Tensor) -> Tensor:
    """Second directional derivative of the class's log-probability along the tangent, one number a row."""
    chosen = F.log_softmax(logits, dim=1).gather(1, classes.unsqueeze(1)).sum()
    gradient = _input_gradient(whose, chosen, x, create_graph=True)
    product = torch.autograd.grad((gradient * tangent).sum(), x, create_graph=True, materialize_grads=True)[0]
    return (product * tangent).flatten(1).sum(1)


def _input_gradient(whose: str, value: Tensor, x: Tensor, weights: Tensor | None = None, **graph: bool) -> Tensor:
    gradient = torch.autograd.grad(value, x, weights, allow_unused=True, **graph)[0]
    if gradient is None:
        raise ValueError(NO_GRAPH.format(whose))
    return gradient


def _unit(gradient: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros stays zero, with gradient 0."""
    rows = gradient.flatten(1)
    square = rows.square().sum(1, keepdim=True)
    return rows / torch.where(square == 0, torch.ones_like(square), square).sqrt()


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ValueError unless both have the same shape ``(B, K)``."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"student logits have shape {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}; "
            "expected the same (batch, classes): give both nets the same batch and the same number of classes"
        )


def _check_graphs(student_logits: Tensor, teacher_logits: Tensor, x: Tensor) -> None:
    check_logits(student_logits, teacher_logits)
    for whose, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not (x.requires_grad and logits.requires_grad):
            raise ValueError(NO_GRAPH.format(whose))
