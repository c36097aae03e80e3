"""Loops whose passes run inside of transforms of ``torch.func``: measured, and what a plain loop measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from toy import nets

import lwkd

Gradients = dict[str, Tensor]


def gap(given: Tensor, target: Tensor) -> Tensor:
    return (given - target).square().mean()


def plain(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    with torch.no_grad():
        target = teacher(x)
    named = dict(student.named_parameters())
    return dict(zip(named, torch.autograd.grad(gap(student(x), target), list(named.values())), strict=True))


def inside_of_grad(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    def loss(parameters: Gradients) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return gap(functional_call(student, parameters, (x,)), target)

    return grad(loss)(dict(student.named_parameters()))


def a_gradient_for_each_row(student: nn.Module, teacher: nn.Module, x: Tensor, teach_row: bool = True) -> Gradients:
    with torch.no_grad():
        targets = x.new_zeros(len(x)) if teach_row else teacher(x)

    def loss(parameters: Gradients, row: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(row[None]) if teach_row else target[None]
        return gap(functional_call(student, parameters, (row[None],)), target)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(student.named_parameters()), x, targets)
    return {name: gradients.mean(0) for name, gradients in found.items()}


def teacher_with_the_batch(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    return a_gradient_for_each_row(student, teacher, x, teach_row=False)


def vmap_inside_of_grad(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    def loss(parameters: Gradients) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        rows = vmap(lambda row: functional_call(student, parameters, (row[None],))[0], in_dims=3, out_dims=0)
        return gap(rows(x.movedim(0, 3)), target)

    return grad(loss)(dict(student.named_parameters()))


def measured(gradients_of: Callable[..., Gradients], signal: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    optimizer = lwkd.LayerwiseOptimizer(
        base, student.eval(), teacher.eval(), pairing, signal=signal, policy=lwkd.Relative(), every=1
    )
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        gradients = gradients_of(student, teacher, torch.rand(4, 1, 8, 8, generator=generator))
        for name, parameter in student.named_parameters():
            parameter.grad = gradients[name].detach()
        optimizer.step()
        found.append(dict(optimizer.divergences))
    return found, dict(optimizer.passes)


@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
@pytest.mark.parametrize(
    "gradients_of", [inside_of_grad, a_gradient_for_each_row, teacher_with_the_batch, vmap_inside_of_grad]
)
def test_what_a_plain_loop_measures(gradients_of: Callable[..., Gradients], signal: str) -> None:
    expected, _ = measured(plain, signal)
    found, passes = measured(gradients_of, signal)
    assert passes == {"measured": 3}
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


class Attends(nn.Module):
    """Two layers of self-attention whose probabilities are looked at."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2))
        self.into = nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in (self.first, self.second):
            x = x + layer(x, x, x, need_weights=True, average_attn_weights=False)[0]
        return x.mean((1, 2))


@pytest.mark.parametrize("transform", [grad, vmap])
def test_probabilities(transform: Any) -> None:
    found = []
    for kind in (None, transform):
        torch.manual_seed(0)
        student, teacher, x = Attends(4), Attends(8).eval(), torch.rand(3, 5, 3)
        pairing = lwkd.pair(student, teacher, x, layers={"first": "first", "second": "second"})
        signal = lwkd.signals.Attention(source="probabilities")
        base = torch.optim.SGD(student.parameters(), lr=0.1)
        optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, signal=signal, policy=lwkd.Relative())

        def both(x: Tensor, student: Attends = student, teacher: Attends = teacher) -> Tensor:
            with torch.no_grad():
                teacher(x)
            return student(x).sum()

        if kind is None:
            both(x)
        elif kind is grad:
            grad(both)(x)
        else:
            vmap(lambda row: both(row[None]))(x)
        optimizer.step()
        found.append(optimizer.divergences)
        assert optimizer.passes == {"measured": 1}
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert min(found[0].values()) > 0


class Words(nn.Module):
    """Mean of the words that are no padding, behind a layer that is told of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)

    def forward(self, ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        x = self.block(self.table(ids), src_key_padding_mask=key_padding_mask)
        return x.masked_fill(key_padding_mask[..., None], 0.0).mean((1, 2))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_padding_that_modules_are_told_of(transform: str) -> None:
    found = []
    for kind in ("plain", transform):
        torch.manual_seed(0)
        student, teacher = Words(4), Words(8).eval()
        words, padded = torch.randint(20, (3, 5)), torch.arange(5) >= torch.tensor([[5], [3], [2]])
        pairing = lwkd.pair(student, teacher, (words, padded), layers={"table": "table", "block": "block"})
        base = torch.optim.SGD(student.parameters(), lr=0.1)
        optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, policy=lwkd.Relative())

        def both(words: Tensor, padded: Tensor, student: Words = student, teacher: Words = teacher) -> Tensor:
            with torch.no_grad():
                teacher(words, padded)
            return student(words, padded).sum()

        if kind == "plain":
            both(words, padded)
        elif kind == "grad":
            grad(lambda scale, *given: scale * both(*given))(torch.ones(()), words, padded)
        else:
            vmap(lambda *given: both(*(one[None] for one in given)))(words, padded)
        optimizer.step()
        found.append(optimizer.divergences)
        assert optimizer.passes == {"measured": 1}
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert min(found[0].values()) > 0


def test_one_vmap_inside_of_another_is_an_error_that_says_what_to_do() -> None:
    student, teacher, pairing = nets()
    lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), student.eval(), teacher, pairing)
    with pytest.raises(NotImplementedError, match=r"inside of two vmaps.*Call it with a batch"):
        vmap(vmap(lambda row: student(row[None])))(torch.rand(2, 3, 1, 8, 8))
