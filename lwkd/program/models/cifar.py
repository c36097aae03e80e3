"""Small convolutional nets for small pictures: the families that distillation papers compare on.

Every net is a ``stem``, named stages ``layer1 … layer3`` (the points where channels and size change), and a ``head``.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class PostActivationBlock(nn.Module):
    """Two 3×3 convolutions, each followed by batch norm; ReLU after the sum (He et al. 2016, CIFAR form)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each 3×3 convolution (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        self.shortcut = None if inputs == outputs and stride == 1 else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        active = F.relu(self.norm1(x))
        inner = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def _stages(block: type[nn.Module], widths: list[int], repeats: int) -> list[tuple[str, nn.Module]]:
    stages: list[tuple[str, nn.Module]] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), 1):
        blocks = [
            block(inputs if i == 0 else outputs, outputs, 2 if i == 0 and number > 1 else 1) for i in range(repeats)
        ]
        stages.append((f"layer{number}", nn.Sequential(*blocks)))
    return stages


def _head(width: int, classes: int) -> list[tuple[str, nn.Module]]:
    return [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(width, classes))]


def residual_net(depth: int, widening: int, classes: int, channels: int) -> nn.Module:
    """The CIFAR residual net of depth 6n + 2: three stages of n blocks with 16, 32, 64 (times ``widening``) channels.

    The ``x4`` nets of the papers also have a stem of 32 channels.

    >>> sum(p.numel() for p in residual_net(20, 1, 10, 3).parameters())
    272474
    """
    widths = [16 if widening == 1 else 32, *(width * widening for width in (16, 32, 64))]
    stem = nn.Sequential(_conv(channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
    stages = _stages(PostActivationBlock, widths, (depth - 2) // 6)
    return nn.Sequential(OrderedDict([("stem", stem), *stages, *_head(widths[-1], classes)]))


def wide_net(depth: int, width: int, classes: int, channels: int) -> nn.Module:
    """The wide residual net of depth 6n + 4: three stages of n pre-activation blocks, 16, 32, 64 times ``width``.

    >>> sum(p.numel() for p in wide_net(16, 2, 100, 3).parameters())
    703284
    """
    widths = [16, *(w * width for w in (16, 32, 64))]
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    stages = _stages(PreActivationBlock, widths, (depth - 4) // 6)
    parts = [("stem", _conv(channels, 16)), *stages, ("norm", last), *_head(widths[-1], classes)]
    return nn.Sequential(OrderedDict(parts))


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(min(4, channels), channels)


def plain_net(width: int, classes: int, channels: int, first_stride: int = 2, norm: str = "batch") -> nn.Module:
    """Three stages of two convolutions without shortcuts, ``width`` channels doubling while the size halves.

    Each convolution is followed by a norm (``batch``, ``group`` of up to four groups, or ``none``) and a ReLU.

    The quickest net here: with ``first_stride`` 2 no convolution runs at the pictures' full size.

    >>> import torch
    >>> net = plain_net(4, 10, 1)
    >>> net.layer3(net.layer2(net.layer1(torch.zeros(1, 1, 28, 28)))).shape
    torch.Size([1, 16, 4, 4])
    """
    widths = [channels, width, 2 * width, 4 * width]
    stages: list[tuple[str, nn.Module]] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), 1):
        layers: list[nn.Module] = []
        for before, stride in ((inputs, first_stride if number == 1 else 2), (outputs, 1)):
            layers += [_conv(before, outputs, 3, stride), _norm(norm, outputs), nn.ReLU()]
        stages.append((f"layer{number}", nn.Sequential(*layers)))
    return nn.Sequential(OrderedDict([*stages, *_head(widths[-1], classes)]))
