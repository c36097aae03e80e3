"""The nets and the batch that steps are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.inputs import Inputs
from lwkd.program.distill.run import pair_nets
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build, from_user, imported
from lwkd.program.profile.settings import ProfileSettings


@dataclass(frozen=True)
class Nets:
    """Student and teacher on their device, how they are paired, and one batch for both."""

    student: nn.Module
    teacher: nn.Module
    pairing: lwkd.Pairing
    inputs: Inputs
    labels: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return self.labels.shape[0]

    def first(self, rows: int) -> Nets:
        """The same nets with the first rows of the batch."""
        rows = min(rows, self.rows)
        return Nets(self.student, self.teacher, self.pairing, self.inputs.rows(self.rows, rows), self.labels[:rows])


def made(settings: ProfileSettings) -> Nets:
    """Build nets and batch.

    Errors: :class:`~lwkd.program.errors.ProgramError` for names that mean nothing, nets that cannot be paired, and
        what ``--inputs`` should not return.
    """
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    student, teacher = (_net(name, settings).to(device) for name in (settings.student, settings.teacher))
    inputs, labels = _batch(settings)
    inputs, labels = inputs.map(lambda tensor: tensor.to(device)), labels.to(device)
    student.train()
    teacher.eval()
    example = inputs.rows(labels.shape[0], 2)
    given = example.args or dict(example.kwargs)  # a tuple even of one argument: a dict would become keywords
    return Nets(student, teacher, pair_nets(student, teacher, given, settings.pair), inputs, labels)


def _net(name: str, settings: ProfileSettings) -> nn.Module:
    if settings.inputs is not None and ":" in name:
        return from_user(name, settings.classes, settings.channels)  # what it takes, only --inputs knows
    return build(name, classes=settings.classes, channels=settings.channels, size=settings.image_size)


def _batch(settings: ProfileSettings) -> tuple[Inputs, Tensor]:
    if settings.inputs is None:
        shape = (settings.batch, settings.channels, settings.image_size, settings.image_size)
        return Inputs.of(torch.rand(shape)), torch.randint(settings.classes, (settings.batch,))
    found: Any = imported(settings.inputs, "--inputs")(settings.batch)
    remedy = f"return (x, y): what the nets are called with, and {settings.batch} class indices"
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor)):
        raise ProgramError(f"--inputs {settings.inputs} returned {type(found).__name__}, expected (x, y)", remedy)
    inputs, labels = Inputs.of(found[0]), found[1]
    rows = inputs.batch
    if labels.shape != (settings.batch,) or rows != settings.batch:
        raise ProgramError(
            f"--inputs {settings.inputs} returned x with {rows} rows and y with shape {tuple(labels.shape)}, expected "
            f"{settings.batch} of each",
            remedy,
        )
    return inputs, labels
