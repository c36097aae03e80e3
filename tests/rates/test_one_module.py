"""A teacher that is the student itself with its adapters switched off, as LoRA has it, or a part of the student."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from toy import batches, moving, net, same, weights

import lwkd


class Adapted(nn.Module):
    """A net whose first stage has an adapter beside it, which can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = net(4).eval()
        self.base.low.add_module("adapter", Adapter(4))
        self.base.requires_grad_(False)
        self.base.low.adapter.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        self.base.low.adapter.on = False
        try:
            yield
        finally:
            self.base.low.adapter.on = True


class Adapter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.on, self.low_rank = True, nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.low_rank(x) if self.on else x


def optimizer_of(student: nn.Module, teacher: nn.Module, **options: object) -> lwkd.LayerwiseOptimizer:
    pairing = lwkd.pair(
        student,
        teacher,
        torch.rand(1, 1, 8, 8),
        layers={f"base.{layer}": layer if isinstance(teacher, nn.Sequential) else f"base.{layer}" for layer in LAYERS},
    )
    base = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05)
    return lwkd.LayerwiseOptimizer(base, student, teacher, pairing, policy=moving(), **options)


LAYERS = ("low", "high")


@pytest.mark.filterwarnings("ignore:.*paired layers have no trainable parameter", "ignore:.*is the only layer")
@pytest.mark.parametrize("same_tensor", [True, False])
@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("who", ["the student", "a part of it"])
def test_passes_without_gradients_are_the_teachers(who: str, teacher_first: bool, same_tensor: bool) -> None:
    def run(teacher_is: str) -> tuple[dict[str, float], dict[str, Tensor], int]:
        student = Adapted()
        teacher: nn.Module = {"the student": student, "a part of it": student.base}.get(teacher_is) or Adapted()
        off = (student if teacher_is else teacher).without_adapter
        optimizer = optimizer_of(student, teacher)
        for x, y in batches(3):
            outputs = {}
            for mine in (False, True) if teacher_first else (True, False):
                given = x if same_tensor else x.clone()
                if mine:
                    outputs["student"] = student(given)
                else:
                    with torch.no_grad(), off():
                        outputs["teacher"] = teacher(given)
            optimizer.zero_grad()
            lwkd.losses.distillation(outputs["student"], outputs["teacher"], y).backward()
            optimizer.step()
        return optimizer.divergences, weights(student), optimizer.passes["measured"]

    found, expected = run(who), run("")
    assert list(found[0].values()) == list(expected[0].values())
    assert same(found[1], expected[1])
    assert found[2] == expected[2] == 3
    assert min(found[0].values()) > 0


@pytest.mark.parametrize("signal", ["jacobian", "hessian"])
def test_passes_of_the_librarys_own_cannot_switch_adapters(signal: str) -> None:
    student = Adapted()
    with pytest.raises(ValueError, match=f"are one module, a Adapted, and the {signal} signal.*Use signal='attention'"):
        optimizer_of(student, nn.DataParallel(student), signal=signal)


def test_capture_cannot_tell_passes_of_one_module_apart() -> None:
    student = Adapted()
    pairing = lwkd.pair(student, copy.deepcopy(student), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"one module.*lwkd.Capture cannot know"):
        lwkd.Capture(student, student, pairing)
