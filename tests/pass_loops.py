"""Loops of passes in any order, and what a measurement of them should find."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from toy import watched

import lwkd


def pictures(*seeds: int, rows: int = 4) -> list[Tensor]:
    """Pictures so different that passes of strangers have other divergences."""
    return [
        torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, seed, 8)
        for seed in seeds
    ]


class Loop:
    """Passes of a student and a teacher that learn nothing, so that every pass can be repeated."""

    def __init__(self, form: str = "wrapper", **options: Any) -> None:
        self.student, self.teacher, self.optimizer, self.shown = watched(form, **options)
        self.student.eval()
        self.optimizer.param_groups[0]["lr"] = 0.0

    def truth(self, *inputs: Tensor) -> Tensor:
        """Mean divergence of these inputs, of copies in float64."""
        student, teacher = copy.deepcopy(self.student).double(), copy.deepcopy(self.teacher).double()
        found = []
        with lwkd.Capture(student, teacher, self.shown.pairing) as capture, torch.no_grad():
            for x in inputs:
                student(x.double()), teacher(x.double())
                found.append(lwkd.reference.attention_divergence(capture.student, capture.teacher))
        return torch.stack(found).mean(0)

    def passes(self, order: str, inputs: dict[str, Tensor], teachers: dict[str, Tensor] | None = None) -> None:
        """Passes such as ``"Sa Tb va"``: student, teacher, and a validation of both (the student's in eval mode)."""
        for which, x in order.split():
            if which == "S":
                self.student(inputs[x]).sum().backward()
            elif which == "T":
                with torch.no_grad():
                    self.teacher((teachers or inputs)[x])

    def step(self) -> Tensor:
        self.optimizer.step()
        return torch.tensor(list(self.shown.divergences.values()), dtype=torch.float64)


def close(found: Tensor, right: Tensor) -> bool:
    return torch.allclose(found, right, rtol=1e-4)
