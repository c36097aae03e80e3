"""What is profiled: the options of ``lwkd profile``, and the nets and the batch that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.inputs import Inputs
from lwkd.program.distill.nets import pair_nets
from lwkd.program.distill.settings import (
    Amp,
    Base,
    Device,
    Pairs,
    Settings,
    Student,
    Teacher,
    Threads,
    in_nets,
    in_run,
    in_signal,
    in_training,
)
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build, called, from_user, is_own
from lwkd.signals import SIGNALS, signal_named

TARGETS = {name: 0.03 if signal_named(name).replays else 0.005 for name in SIGNALS}
"""Share of a distillation step that a signal may add, where no budget is given: more, if it makes passes of its own."""


@dataclass(frozen=True)
class ProfileSettings:
    """The options of ``lwkd profile`` with their help; the fields are the options' names.

    >>> ProfileSettings("resnet18", "resnet10").budget_of("jacobian")
    0.03
    """

    teacher: Teacher
    student: Student
    batch: Annotated[int, in_nets(min=2, help="Rows of the batch.")] = 128
    image_size: Annotated[int, in_nets(min=4, help="Side of the pictures.")] = 32
    channels: Annotated[int, in_nets(min=1, max=3, help="Channels of the pictures: 1 or 3.")] = 3
    classes: Annotated[int, in_nets(min=2, help="Number of classes.")] = 10
    inputs: Annotated[
        str | None, in_nets(help="For nets that take no pictures: module:function, called with --batch, gives (x, y).")
    ] = None
    pair: Pairs = ()
    optimizer: Annotated[Base, in_training(help="Base optimizer.")] = "sgd"
    amp: Amp = None
    signal: Annotated[
        tuple[str, ...], in_signal(help="attention, jacobian or hessian; repeatable. Default: all three.")
    ] = tuple(TARGETS)
    every: Annotated[int | None, in_signal(min=1, help="Instead of each signal's own interval.")] = None
    samples: Annotated[int | None, in_signal(min=1, help="Instead of each signal's own number of rows.")] = None
    budget: Annotated[
        float | None, in_signal(help="Share of a step to recommend for; default: 0.005 attention, 0.03 the others.")
    ] = None
    seconds: Annotated[float, in_run(min=0, help="After which no round is begun (three are made in any case).")] = 120
    out: Annotated[str, in_run(help="Folder for profile.json and profile.png.")] = "runs/profile"
    trace: Annotated[bool, in_run("--trace", help="Leave a Chrome trace of a few steps with each signal, too.")] = False
    seed: Annotated[int, in_run(help="Of weights and pictures.")] = 0
    device: Device = "cpu"
    threads: Threads = None

    def budget_of(self, signal: str) -> float:
        """Share of a step that a signal may add."""
        return TARGETS[signal] if self.budget is None else self.budget

    @property
    def training(self) -> Settings:
        """As settings of a training run; the rate is so small that no step changes what the next ones cost."""
        return Settings(optimizer=self.optimizer, lr=1e-3, amp=self.amp, device=self.device)


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
    if settings.inputs is not None and is_own(name):
        return from_user(name, settings.classes, settings.channels)  # only --inputs knows what the net takes
    return build(name, classes=settings.classes, channels=settings.channels, size=settings.image_size)


def _batch(settings: ProfileSettings) -> tuple[Inputs, Tensor]:
    if settings.inputs is None:
        shape = (settings.batch, settings.channels, settings.image_size, settings.image_size)
        return Inputs.of(torch.rand(shape)), torch.randint(settings.classes, (settings.batch,))
    found: Any = called(settings.inputs, "--inputs", settings.batch)
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
