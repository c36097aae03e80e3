"""Which pair a parameter follows, and that wrappers change nothing about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwkd.pairing import pair


def small(width: int = 4) -> nn.Sequential:
    """Two stages whose crucial layers are "1" and "4"."""
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5))


class Owners(nn.Module):
    """Tied weights, a reused module, a weight of a module that is never called, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.three.weight = self.one.weight
        self.again = nn.BatchNorm2d(3)
        self.borrowed, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.one(x * self.scale))
        x = self.two(x)
        return self.again(self.three(x)) + self.borrowed.bias.sum()


def test_every_parameter_has_one_owner():
    net = Owners()
    pairing = pair(net, net, torch.rand(2, 3, 4, 4), layers={"one": "one", "two": "two"})
    owners = pairing.owners()
    assert {name for name, index in owners.items() if index == 0} == {
        "scale",
        "one.weight",
        "one.bias",
        "three.weight",  # tied: the first segment it runs in
        "borrowed.bias",  # used without its module: goes with the root, which begins first
    }
    assert {name for name, index in owners.items() if index == 1} == {
        "again.weight",  # first runs behind the first pair
        "again.bias",
        "two.weight",
        "two.bias",
    }
    assert set(pairing.tail) == {"three.bias", "borrowed.weight", "idle.weight", "idle.bias"}
    assert sorted([*owners, *pairing.tail]) == sorted(n for n, _ in net.named_parameters(remove_duplicate=False))
    counts = [p.elements for p in pairing] + [pairing.tail_elements]
    assert counts == [1 + 9 + 3 + 3, 3 + 3 + 9 + 3, 3 + 9 + 9 + 3]
    assert sum(counts) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
)
def test_wrapped_models_pair_as_the_bare_ones(wrap: Any):
    student, teacher = small(), small(6)
    example = torch.rand(2, 3, 16, 16)
    expected = pair(student, teacher, example)
    assert expected.names == ("1", "4")
    assert pair(wrap(student), wrap(teacher), example) == expected
    given = pair(wrap(student), teacher, example, layers={"module.1": "1"} if wrap is nn.DataParallel else {"1": "1"})
    given.check(student, wrap(teacher))
    assert given.names == ("1",)


def test_compiled_parts():
    student = small()
    expected = pair(student, student, torch.rand(2, 3, 16, 16))
    student[3] = torch.compile(student[3], backend="eager")
    assert pair(student, student, torch.rand(2, 3, 16, 16)) == expected


def test_under_ddp(tmp_path):
    student = small()
    example = torch.rand(2, 3, 16, 16)
    expected = pair(student, student, example)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert pair(nn.parallel.DistributedDataParallel(student), student, example) == expected
    finally:
        dist.destroy_process_group()


def test_the_teacher_is_cut_into_segments_the_same_way():
    student, teacher = small(4), small(8)
    pairing = pair(student, teacher, torch.rand(1, 3, 16, 16))
    assert [p.teacher_parameters for p in pairing] == [("0.weight", "0.bias"), ("3.weight", "3.bias")]
    assert [p.parameters for p in pairing] == [p.teacher_parameters for p in pairing]


def test_teacher_segments_follow_the_teachers_execution_order():
    net = small()
    crossed = pair(net, net, torch.rand(1, 3, 16, 16), layers={"1": "4", "4": "1"})
    assert [p.teacher_parameters for p in crossed] == [("3.weight", "3.bias"), ("0.weight", "0.bias")]
    shared = pair(net, net, torch.rand(1, 3, 16, 16), layers={"1": "1", "4": "1"})
    assert [p.teacher_parameters for p in shared] == [("0.weight", "0.bias"), ("0.weight", "0.bias")]
