"""One optimizer has its rates from one teacher: whoever comes second is told so, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy import net, nets, train

import lwkd


class Around(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead's and Accelerate's are."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.param_groups, self.inner = optimizer.param_groups, optimizer

    def step(self, closure: Any = None) -> Any:
        return self.inner.step() if closure is None else self.inner.step(closure)


class Both:
    """A student, two teachers, and both ways to give them to an optimizer."""

    def __init__(self) -> None:
        self.student, self.teacher, self.pairing = nets()
        self.other = net(5).eval()
        layers = {"low": "low", "high": "high"}
        self.other_pairing = lwkd.pair(self.student, self.other, torch.rand(1, 1, 8, 8), layers=layers)
        self.base = torch.optim.SGD(self.student.parameters(), lr=0.1)

    def wrap(self, optimizer: Any) -> Any:
        return lwkd.LayerwiseOptimizer(optimizer, self.student, self.teacher, self.pairing)

    def attach(self, optimizer: Any) -> Any:
        return lwkd.attach(optimizer, self.student, self.teacher, self.pairing)

    def wrap_again(self, optimizer: Any) -> Any:
        return lwkd.LayerwiseOptimizer(optimizer, self.student, self.other, self.other_pairing)

    def attach_again(self, optimizer: Any) -> Any:
        return lwkd.attach(optimizer, self.student, self.other, self.other_pairing)

    def attached(self, optimizer: Any) -> Any:
        self.attach(optimizer)
        return optimizer

    def kept(self, wrapper: Any) -> Any:
        self.wrapper = wrapper
        return wrapper


TWICE: dict[str, Callable[[Both], tuple[Callable[..., Any], Any]]] = {
    "wrapper around a wrapper": lambda b: (b.wrap_again, b.wrap(b.base)),
    "wrapper around an attached optimizer": lambda b: (b.wrap_again, b.attached(b.base)),
    "attached to a wrapper": lambda b: (b.attach_again, b.wrap(b.base)),
    "attached twice": lambda b: (b.attach_again, b.attached(b.base)),
    "attached to the base of a wrapper": lambda b: (b.attach_again, b.kept(b.wrap(b.base)).base),
    "two wrappers around one base": lambda b: (b.wrap_again, b.kept(b.wrap(b.base)).base),
    "wrapper around what is around a wrapper": lambda b: (b.wrap_again, Around(b.wrap(b.base))),
    "attached to what is around a wrapper": lambda b: (b.attach_again, Around(b.wrap(b.base))),
    "wrapper around what is around an attached one": lambda b: (b.wrap_again, Around(b.attached(b.base))),
    "attached twice, with a scheduler": lambda b: (b.attach_again, _scheduled(b.attached(b.base))),
}


def _scheduled(optimizer: Any) -> Any:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # patches step
    return optimizer


def _hooks(*models: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


@pytest.mark.parametrize("twice", TWICE)
def test_a_second_teacher_is_refused(twice: str) -> None:
    both = Both()
    second, optimizer = TWICE[twice](both)
    student_hooks, step = _hooks(both.student), optimizer.step
    with pytest.raises((TypeError, ValueError), match=r"LayerwiseOptimizer|already"):
        second(optimizer)
    assert (_hooks(both.student), _hooks(both.other)) == (student_hooks, 0)
    assert optimizer.step == step
    train(optimizer, both.student, both.teacher, 2)


def test_the_first_may_end() -> None:
    both = Both()
    both.attach(both.base).detach()
    both.wrap(both.base).close()
    handle = both.attach_again(both.base)
    handle.detach()
    assert _hooks(both.student, both.teacher, both.other) == 0
    train(both.wrap(both.base), both.student, both.teacher, 1)


def test_a_closed_wrapper_still_scales_and_is_no_base() -> None:
    both = Both()
    wrapper = both.wrap(both.base)
    wrapper.close()
    with pytest.raises(ValueError, match="already"):
        both.wrap_again(wrapper)


def test_a_copy_that_watches_is_known() -> None:
    both = Both()
    student, wrapper = copy.deepcopy((both.student, both.wrap(both.base)))
    wrapper.watch(student, both.teacher)
    with pytest.raises(ValueError, match="already"):
        lwkd.attach(wrapper.base, student, both.other, both.other_pairing)


def test_optimizers_of_two_halves_may_follow_two_teachers() -> None:
    both = Both()
    with pytest.warns(UserWarning, match="1 of 2 paired layers"):
        halves = [
            lwkd.LayerwiseOptimizer(torch.optim.SGD(part.parameters(), lr=0.1), both.student, *of, policy=lwkd.Decay())
            for part, *of in (
                (both.student.low, both.teacher, both.pairing),
                (both.student.high, both.other, both.other_pairing),
            )
        ]
    for half, teacher in zip(halves, (both.teacher, both.other), strict=True):
        train(half, both.student, teacher, 2)
        assert half.measurements == 2
