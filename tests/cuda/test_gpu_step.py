"""A step with a rate for each layer, however it is launched, against the base with explicit groups."""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE
from toy import batches, loss_of, nets
from training import BASES, assert_alike, is_noise

import lwkd

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

MULTIPLIERS = {"low": 1.5, "high": 0.5, "head": 1.0}
ROUNDING = 1e-5
"""A few steps in float32 whose products are formed in another order."""

OPTIONS = {
    "sgd": ({}, {"momentum": 0.9, "weight_decay": 0.01}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}),
    "adamw": ({}, {"weight_decay": 0.1}, {"amsgrad": True}, {"betas": (0.8, 0.9), "eps": 1e-6}, {"maximize": True}),
}
CHOICES = [
    pytest.param(base, options, id=f"{base}-{'-'.join(options) or 'plain'}")
    for base in BASES
    for options in OPTIONS[base.split()[0]]
]


def train(optimizer, student, teacher):
    for x, y in batches(4, rows=8):
        optimizer.zero_grad()
        loss_of(student, teacher, x.to(DEVICE), y.to(DEVICE)).backward()
        optimizer.step()


def states(optimizer, net):
    """What the base remembers of each parameter, in the order of the net."""
    return [optimizer.state[parameter] for name, parameter in net.named_parameters() if not is_noise(name)]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("base", "options"), CHOICES)
def test_rates_equal_explicit_groups(base, options, resident):
    if resident and "fused" not in base:
        pytest.skip("rates stay on the device with fused bases only")
    lr = 0.02
    expected, teacher, _ = (part.to(DEVICE) if isinstance(part, torch.nn.Module) else part for part in nets())
    groups = [{"params": list(getattr(expected, name).parameters()), "lr": lr * m} for name, m in MULTIPLIERS.items()]
    explicit = BASES[base](groups, **options)
    train(explicit, expected, teacher)

    student, teacher, pairing = nets()
    student, teacher = student.to(DEVICE), teacher.to(DEVICE)
    given = torch.tensor(lr, device=DEVICE) if resident else lr
    policy = lwkd.Constant([MULTIPLIERS["low"], MULTIPLIERS["high"]])
    optimizer = lwkd.LayerwiseOptimizer(
        BASES[base](student.parameters(), lr=given, **options), student, teacher, pairing, policy=policy
    )
    train(optimizer, student, teacher)
    assert_alike(student, expected, ROUNDING)
    for found, other in zip(states(optimizer, student), states(explicit, expected), strict=True):
        assert found.keys() == other.keys()
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value.float().cpu(), other[key].float().cpu(), rtol=1e-4, atol=1e-6)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr)
    assert len(optimizer.param_groups) == 1
