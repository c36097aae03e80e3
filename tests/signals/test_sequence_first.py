"""Nets whose tokens are (N, B, C) inside: signals and rates are those of the same net with the batch in front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.signals import Attention, Hessian, Jacobian, Signal

ROWS, TOKENS = 4, 6


class Net(nn.Module):
    """Frames ``(B, N, 5)`` and their padding ``(B, N)`` → logits ``(B, 3)``."""

    def __init__(self, depth: int, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.read, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", norm_first=True, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x = self.read(x)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=src_key_padding_mask)
        kept = ~src_key_padding_mask[..., None]
        return self.head(((x if self.batch_first else x.transpose(0, 1)) * kept).sum(1) / kept.sum(1))


def nets(*, batch_first: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    student, teacher = (Net(depth, width, batch_first=batch_first).double() for depth, width in ((2, 4), (4, 8)))
    for parameter in (*student.parameters(), *teacher.parameters()):
        nn.init.normal_(parameter, std=0.4)  # the usual weights make all maps nearly uniform
    return student, teacher.eval()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 3, 5, 6])
    x = torch.randn(ROWS, TOKENS, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(TOKENS) >= lengths[:, None]


SIGNALS = {
    "jvp": Jacobian(),
    "difference": Jacobian(estimator="difference"),
    "vjp": Jacobian(estimator="vjp"),
    "output": Jacobian(estimator="output"),
    "of parameters": Jacobian(wrt="parameters"),
    "gauss-newton": Hessian(),
    "hessian": Hessian(curvature="hessian"),
    "second derivatives": Hessian(wrt="input"),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_with_passes_of_their_own(name: str):
    found = []
    for batch_first in (True, False):
        student, teacher = nets(batch_first=batch_first)
        pairing = lwkd.pair(student, teacher, batch())
        assert [p.student_layout.batch_first for p in pairing] == [batch_first] * 2
        found.append(SIGNALS[name].measure(student, teacher, pairing, batch(), seed=5))
    assert float(found[0].abs().sum()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
def test_features_and_losses(kind: str):
    found: list[tuple[Tensor, ...]] = []
    for batch_first in (True, False):
        student, teacher = nets(batch_first=batch_first)
        with lwkd.Capture(student, teacher, lwkd.pair(student, teacher, batch())) as features:
            with torch.no_grad():
                teacher(*batch())
            student(*batch())
            of_student = features.student
            loss = Attention(kind=kind).loss(of_student, features.teacher)
            loss.backward()
            found.append((loss.detach(), *of_student, student.read.weight.grad))
    assert float(found[0][0]) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signal", [Attention(), Jacobian(samples=3), Hessian(samples=3)], ids=lambda s: s.name)
def test_rates_of_a_training(signal: Signal):
    found = []
    for batch_first in (True, False):
        student, teacher = nets(batch_first=batch_first)
        pairing = lwkd.pair(student, teacher, batch())
        base = torch.optim.SGD(student.parameters(), 0.05)
        optimizer = lwkd.LayerwiseOptimizer(
            base, student, teacher, pairing, signal=signal, policy=lwkd.Relative(), every=1, samples=3
        )
        for step in range(4):
            x, padding = batch(step)
            with torch.no_grad():
                target = teacher(x, padding)
            (student(x, padding) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.passes["measured"] == 4
        found.append((torch.tensor([*optimizer.rates.values()]), *student.parameters()))
    assert float((found[0][0] - 1).abs().max()) > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
