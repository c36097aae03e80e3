"""The failure signatures that are named with the paper: unstable differences, a bad teacher, deep and wide nets."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from python_runs import python
from torch import Tensor, nn
from toy import FORMS, batches, loss_of, train, watched

import lwkd
from lwkd.program.data.datasets import load
from lwkd.program.models.registry import build
from lwkd.signals import Hessian, Jacobian

OWN_PASSES: dict[str, Any] = {
    "jacobian": Jacobian(),
    "hessian": Hessian(curvature="hessian"),
    "ggn": Hessian(),
    "second": Hessian("input"),
}


# Differences that explode or vanish


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OWN_PASSES)
def test_an_exploding_difference_leaves_the_rates_and_is_counted(form: str, name: str) -> None:
    student, teacher, optimizer, shown = watched(form, signal=OWN_PASSES[name], every=1)
    train(optimizer, student, teacher, 3)
    rates, divergences = shown.rates, shown.divergences
    weight = student.get_submodule("high.0").weight
    kept = weight.detach().clone()
    optimizer.zero_grad()
    loss_of(student, teacher, *next(batches(1))).backward()
    with torch.no_grad():
        weight.fill_(float("inf"))  # what the weights are when the update is over
    for parameter in student.parameters():
        parameter.grad = None
    optimizer.step()
    assert shown.skipped == 1
    assert (shown.rates, shown.divergences) == (rates, divergences)
    with torch.no_grad():
        weight.copy_(kept)
        for buffer in student.buffers():
            buffer.nan_to_num_()
    train(optimizer, student, teacher, 2)
    assert shown.skipped == 1
    assert shown.divergences != divergences, "training and measuring go on"


@pytest.mark.parametrize("name", OWN_PASSES)
def test_a_difference_that_vanishes_in_both_nets_is_counted(name: str) -> None:
    student, teacher, optimizer, shown = watched(signal=OWN_PASSES[name], every=1)
    for net in (student, teacher):
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)  # dead maps in both nets, and they stay dead
    with torch.no_grad():
        teacher(x := torch.rand(4, 1, 8, 8))
    student(x)
    optimizer.step()
    assert shown.skipped == 1
    assert set(shown.rates.values()) == {1.0}
    assert shown.divergences == {"low": 0.0, "high": 0.0}


def test_a_difference_that_vanishes_in_one_net_is_the_largest_one() -> None:
    student, teacher, optimizer, shown = watched(signal="jacobian", every=1)
    for parameter in student.parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    with torch.no_grad():
        teacher(x := torch.rand(4, 1, 8, 8))
    student(x)
    optimizer.step()
    assert shown.skipped == 0
    assert shown.divergences == {"low": 4.0, "high": 4.0}


# A teacher made worse on purpose

SEEDS, EPOCHS, BATCH = range(4), 10, 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load("digits", Path("data"), size=None, limit=None, augment="none", say=lambda _: None)
    parts = [(split.images.float() / 255 - 0.3, split.labels) for split in (data.train, data.test)]  # type: ignore[union-attr]
    return (*parts[0], *parts[1])


def fitted(net: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, teacher: Any = None, **options: Any) -> Any:
    """Train on labels under a cosine schedule; with a teacher, at rates that follow it. Returns the optimizer."""
    optimizer: Any = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    if teacher is not None:
        optimizer = lwkd.LayerwiseOptimizer(optimizer, net, teacher, lwkd.pair(net, teacher, x[:2]), **options)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(y) // BATCH))
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH)[:-1]:
            if teacher is not None:
                with torch.no_grad():
                    teacher(x[rows])
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return optimizer


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, classes=10, channels=1, size=8)


@pytest.fixture(scope="module")
def teachers() -> dict[str, nn.Module]:
    """A good teacher, one that was stopped after a few updates, and one that learned permuted labels."""
    x, y, _, _ = digits()
    nets = {name: made("cnn_8", 100) for name in ("good", "half_trained", "permuted")}
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    fitted(nets["good"], x, y, 12, 0)
    fitted(nets["half_trained"], x[:256], y[:256], 1, 0)
    fitted(nets["permuted"], x, shuffled, 12, 0)
    return nets


@pytest.fixture(scope="module")
def plain() -> list[float]:
    x, y, test_x, test_y = digits()
    found = []
    for seed in SEEDS:
        student = made("cnn_4", seed)
        fitted(student, x, y, EPOCHS, seed)
        found.append(accuracy(student, test_x, test_y))
    return found


@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
@pytest.mark.parametrize("quality", ["half_trained", "permuted"])
def test_a_bad_teacher_does_not_drag_the_student_below_plain_training(
    quality: str, signal: str, teachers: dict[str, nn.Module], plain: list[float]
) -> None:
    x, y, test_x, test_y = digits()
    found = []
    for seed in SEEDS:
        student = made("cnn_4", seed)
        optimizer = fitted(student, x, y, EPOCHS, seed, teachers[quality], signal=signal)
        assert optimizer.skipped == 0
        found.append(accuracy(student, test_x, test_y))
    spread = statistics.stdev(plain)
    assert statistics.fmean(found) >= statistics.fmean(plain) - spread, (found, plain)


@pytest.mark.parametrize(
    ("signal", "quality", "factor"),
    [
        (lwkd.signals.Attention(), "permuted", 1.2),
        (Hessian(), "half_trained", 1.05),
    ],
    ids=["attention", "hessian"],
)
def test_the_divergences_show_a_bad_teacher(
    signal: Any, quality: str, factor: float, teachers: dict[str, nn.Module]
) -> None:
    x, y, _, _ = digits()
    mean: dict[str, float] = {}
    for teacher in ("good", quality):
        found = []
        for seed in SEEDS:
            optimizer = fitted(made("cnn_4", seed), x, y, EPOCHS, seed, teachers[teacher], signal=signal)
            # Early layers look for edges whatever the labels say: what was learned shows in the last one.
            found.append(optimizer.divergences["layer3"])
        mean[teacher] = statistics.fmean(found)
    assert mean[quality] > factor * mean["good"], mean


# Deep and wide nets

MEMORY = """
import sys, torch
from torch import nn
import lwkd
torch.set_num_threads(1)
kind, signal = sys.argv[1:]

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def net(depth, width):
    stages = []
    for stage, inputs in ((0, 1), (1, width)):
        layers = [nn.Conv2d(inputs, width << stage, 3, 2, 1), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width << stage, width << stage, 3, 1, 1), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))

size = {"deep": (100, 8), "wide": (1, 128)}[kind]
student, teacher, x = net(*size), net(*size).eval(), torch.rand(128, 1, 32, 32)
optimizer = torch.optim.SGD(student.parameters(), 0.01)
if signal != "none":
    chosen = lwkd.signals.Hessian(curvature="hessian") if signal == "hessian" else signal
    pairing = lwkd.pair(student, teacher, x[:1], layers={"0": "0", "1": "1"})
    optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, signal=chosen, every=1)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak starts again from what is used now: importing took more than training does
before = kilobytes("VmRSS")
for _ in range(3):
    with torch.no_grad():
        target = teacher(x)
    loss = lwkd.losses.distillation(student(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(kilobytes("VmHWM") - before)
"""


def memory_of(kind: str, signal: str) -> float:
    """KiB (Linux) by which three training steps raise the peak of a process of their own."""
    done = python("-c", MEMORY, kind, signal)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_a_measurement_adds_little_memory_to_a_step_of_a_deep_or_wide_net(kind: str) -> None:
    step = memory_of(kind, "none")
    assert step > 50_000, "too little to tell anything"
    for signal in ("jacobian", "hessian"):
        # The whole step with its measurement, of which the issue allows 1 + 1.5 times the plain step.
        assert memory_of(kind, signal) <= 2.5 * step
