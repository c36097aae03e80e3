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


def fashion_mnist(batch: int, seed: int = 0, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, read from ``data/`` when the first is asked for; ``size`` is the side of the pictures."""
    data = load("fashion-mnist", Path("data"), size=size, limit=None, augment="none", say=print)
    source = Batches(data, batch, seed=seed)
    for epoch in itertools.count():
        yield from source.train(epoch)


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
