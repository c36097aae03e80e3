"""The quick walk over a net finds what the generators of ``nn.Module`` find, in their order and under their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lwkd.nets import walk

models = pytest.importorskip("torchvision.models")


def shared() -> nn.Module:
    """A module under two names, a tied parameter, entries that are None, a buffer that is not saved."""
    block = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    net = nn.Sequential(block, nn.ReLU(), block, nn.Linear(3, 3))
    net[3].weight = block[0].weight
    net.register_module("nothing", None)
    net.register_parameter("none", None)
    net.register_buffer("mask", torch.ones(3), persistent=False)
    net.register_buffer("absent", None)
    block.register_buffer("same_mask", net.mask)
    return net


NETS = {
    "shared": shared,
    "resnet": models.resnet18,
    "mobilenet": models.mobilenet_v3_small,
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
    "empty": nn.Identity,
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_the_same_as_torch(make) -> None:
    net = make()
    pairs = [
        (walk.named_modules_of(net), list(net.named_modules())),
        (list(walk.parameters_of(net).items()), list(net.named_parameters())),
        (list(walk.buffers_of(net).items()), list(net.named_buffers())),
    ]
    for found, expected in pairs:
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (_, one), (_, other) in zip(found, expected, strict=True):
            assert one is other or isinstance(net, torch.jit.ScriptModule)  # which makes its tensors anew when asked
    everything = set(walk.parameters_of(net)) | set(walk.buffers_of(net))
    assert set(walk.tensors_of(net)) == everything
