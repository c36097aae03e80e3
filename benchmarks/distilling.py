"""The step that layer-wise rates are an addition to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lwkd


def distil(student: nn.Module, teacher: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of Hinton's distillation."""
    with torch.no_grad():
        target = teacher(x)
    loss = lwkd.losses.distillation(student(x), target, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
