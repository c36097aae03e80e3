"""The training steps and the data that layer-wise rates and their signals are measured beside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lwkd
from lwkd.program.data.datasets import load
from lwkd.program.data.loader import Batches
from lwkd.program.models.registry import build


def fashion_mnist(batch: int, seed: int = 0, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, read from ``data/`` when the first is asked for; ``size`` is the side of the pictures."""
    data = load("fashion-mnist", Path("data"), size=size, limit=None, augment="none", say=print)
    source = Batches(data, batch, seed=seed)
    for epoch in itertools.count():
        yield from source.train(epoch)


def with_trained_teacher(
    names: tuple[str, str], batch: int, seed: int, updates: int, layers: dict[str, str] | None = None
) -> tuple[nn.Module, nn.Module, lwkd.Pairing, Iterator[tuple[Tensor, Tensor]]]:
    """A fresh student of a teacher after so many updates on Fashion-MNIST; how they are paired, and more batches."""
    torch.manual_seed(seed)
    source = fashion_mnist(batch, seed)
    teacher, student = (build(name, classes=10, channels=1, size=28) for name in names)
    classify(teacher, torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9), source, updates)
    teacher.eval()
    return student, teacher, lwkd.pair(student, teacher, torch.rand(2, 1, 28, 28), layers=layers), source


def classify(net: nn.Module, optimizer: Optimizer, batches: Iterator[tuple[Tensor, Tensor]], updates: int) -> None:
    """Train by cross-entropy for so many updates."""
    for x, y in itertools.islice(batches, updates):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def distil(
    student: nn.Module, teacher: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, half: bool = False
) -> None:
    """One step of Hinton's distillation; ``half``: under bfloat16 autocast."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        with torch.no_grad():
            target = teacher(x)
        loss = lwkd.losses.distillation(student(x), target, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
