"""Small nets whose curvature is known exactly, by ``torch.func``: the whole matrix, no estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lwkd

estimators = pytest.mark.parametrize("estimator", [lwkd.hessian_trace, lwkd.ggn_trace])

TARGETS = torch.tensor([0, 2, 1, 1, 0, 2])


class Attention(nn.Module):
    """Tokens of the image's rows, one encoder layer, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1))).mean(1))


class Tied(nn.Module):
    """The same weight first as an encoder, then, transposed, as a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 3), nn.Linear(16, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(x.flatten(1)))
        return self.decoder(torch.tanh(hidden @ self.decoder.weight))


def _conv(norm: bool) -> nn.Sequential:
    between = [nn.BatchNorm2d(2)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), *between, nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
    )


class ExplicitNorm(nn.Module):
    """A norm in plain arithmetic: ``torch.func.hessian`` of batch_norm and layer_norm is wrong off the diagonal
    (2.11, by 0.03 here, and not symmetric; a difference of gradients and plain double backward agree)."""

    def forward(self, x: Tensor) -> Tensor:
        dims, shape = ((0, 2, 3), (-1, 1, 1)) if x.dim() == 4 else ((-1,), (-1,))
        off = x - x.mean(dims, keepdim=True)
        scaled = off / (off.square().mean(dims, keepdim=True) + self.eps).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: _conv(norm=False),
    "batchnorm": lambda: _conv(norm=True).train(),
    "attention": Attention,
    "tied": Tied,
}


class Case(NamedTuple):
    """A net, its input, and the labels' cross-entropy as a function of the net."""

    net: nn.Module
    x: Tensor

    def logits(self, net: Any) -> Tensor:
        return net(self.x)

    def loss(self, net: Any) -> Tensor:
        return F.cross_entropy(net(self.x), TARGETS)

    def estimate(self, estimator: Any, **options: Any) -> lwkd.TraceEstimate:
        """By ``hessian_trace`` of the loss or ``ggn_trace`` of the logits."""
        return estimator(self.net, self.loss if estimator is lwkd.hessian_trace else self.logits, **options)

    def exact(self, estimator: Any) -> Tensor:
        """The traces that this estimator estimates, one a parameter."""
        matrix = hessian if estimator is lwkd.hessian_trace else ggn
        return traces(matrix(self.net, self.x), sizes(self.net))


def case(name: str) -> Case:
    """The net of this name with seeded weights and input, in float64."""
    torch.manual_seed(sorted(NETS).index(name))
    return Case(NETS[name]().double(), torch.randn(6, 1, 4, 4, dtype=torch.float64))


def sizes(net: nn.Module) -> list[int]:
    """Numbers of entries of the parameters."""
    return [p.numel() for p in net.parameters()]


def per_parameter(matrix: Tensor, net: nn.Module) -> Tensor:
    """Mean diagonal of the blocks of the stages ``low`` and ``high``."""
    diagonals = zip((name for name, _ in net.named_parameters()), matrix.diagonal().split(sizes(net)), strict=True)
    blocks: dict[str, list[Tensor]] = {"low": [], "high": []}
    for name, diagonal in diagonals:
        blocks.get(name.split(".")[0], []).append(diagonal)
    return torch.stack([torch.cat(block).mean() for block in blocks.values()])


def parameters(net: nn.Module) -> list[Tensor]:
    """Detached, tied ones once, in the order of a trace estimate."""
    return [p.detach() for p in net.parameters()]


def _of_flat(net: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Logits as a function of all parameters in one vector, and that vector."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.__class__ = ExplicitNorm
    names = [name for name, _ in net.named_parameters()]

    def logits(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes(net))
        state = {n: v.view_as(p) for n, v, p in zip(names, pieces, net.parameters(), strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(net, state, (x,))

    return logits, torch.cat([p.flatten() for p in parameters(net)])


def hessian(net: nn.Module, x: Tensor, criterion: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Hessian ``(n, n)`` of ``criterion(logits)``, by default the cross-entropy against :data:`TARGETS`."""
    logits, flat = _of_flat(net, x)
    measured = criterion or (lambda z: F.cross_entropy(z, TARGETS))
    return torch.func.hessian(lambda flat: measured(logits(flat)))(flat)


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """Jacobian of the logits ``(B, K, n)``."""
    logits, flat = _of_flat(net, x)
    return torch.func.jacrev(logits)(flat)


def ggn(net: nn.Module, x: Tensor) -> Tensor:
    """Gauss–Newton matrix ``(n, n)`` of the mean softmax cross-entropy."""
    logits, flat = _of_flat(net, x)
    p, j = torch.softmax(logits(flat), -1), jacobian(net, x)
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("bkn,bkj,bjm->nm", j, curvature, j) / len(p)


def traces(matrix: Tensor, lengths: list[int]) -> Tensor:
    """Trace of each diagonal block."""
    return torch.stack([block.sum() for block in matrix.diagonal().split(lengths)])
