"""A training step of one kind, timed phase by phase."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lwkd
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.train import autocast, base_optimizer
from lwkd.program.errors import ProgramError
from lwkd.program.profile.inputs import Nets
from lwkd.program.profile.own_time import OwnTime
from lwkd.rates.device import Clock
from lwkd.signals import Signal

PHASES = ("teacher forward", "student forward", "loss", "backward", "optimizer", "measuring")

TRANSFER = 100.0
"""Weight of attention transfer in the loss; it changes no time."""


@dataclass(frozen=True)
class Lap:
    """Seconds of one step.

    Args:
        phases: by name; those of lwkd's own code are in none but ``measuring``.
        update: of the base optimizer's own step, which is part of the phase ``optimizer``.
        measured: whether this step was measured.
    """

    phases: dict[str, float]
    update: float
    measured: bool

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.phases.values())

    def added(self, bare_update: float) -> float:
        """Seconds that layer-wise rates add: all of lwkd's code, and what the base's step takes longer in groups.

        Args:
            bare_update: seconds of the base's own step without them.
        """
        return self.phases["measuring"] + self.update - bare_update


def _check_logits(whose: str, found: Any) -> None:
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        shown = f"a tensor {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ProgramError(
            f"the {whose} returned {shown}; distillation needs logits (batch, classes)",
            "give a module:function whose net returns the logits only",
        )


class Contender:
    """Steps with an optimizer of its own, on copies of the nets, whose hooks meet nobody else.

    Args:
        nets: copied.
        settings: of the training.
        clock: by which steps are timed.
        transfer: whether the loss has attention transfer in it.
        signal: what rates are driven by; None is the bare optimizer.
        every: the interval.
        samples: rows that are measured.
    """

    def __init__(
        self,
        nets: Nets,
        settings: Settings,
        clock: Clock,
        *,
        transfer: bool = False,
        signal: Signal | None = None,
        every: int | None = None,
        samples: int | None = None,
    ) -> None:
        self.student, self.teacher = copy.deepcopy(nets.student), copy.deepcopy(nets.teacher)
        self.settings, self.clock = settings, clock
        self.signal_name = None if signal is None else signal.name
        self._own, self._base = OwnTime(clock), OwnTime(clock)
        base = base_optimizer(self.student, settings)
        base.step = self._base.around(base.step)  # type: ignore[method-assign]
        self.optimizer: torch.optim.Optimizer = base
        if signal is not None:
            self.optimizer = lwkd.LayerwiseOptimizer(
                base, self.student, self.teacher, nets.pairing, signal=signal, every=every, samples=samples
            )
            self._own.watch_hooks(self.student, self.teacher, everywhere=clock.device.type == "cpu")
        # After the hooks whose time counts: features for the loss are a cost of the loss.
        self._capture = lwkd.Capture(self.student, self.teacher, nets.pairing) if transfer else None

    def step(self, nets: Nets) -> Lap:
        """One step on this batch, to its end."""
        return self.handed_over(nets)()

    def handed_over(self, nets: Nets) -> Callable[[], Lap]:
        """One step on this batch, as far as the host is concerned; what is returned waits for its end."""
        optimizer, inputs, mark = self.optimizer, nets.inputs, self.clock.mark
        measured = self._measured()
        # Those of the step before: its measuring passes call hooks too, and a step that was only counted keeps its own.
        self._own.pending()
        self._base.pending()
        marks, own = [mark()], []
        with autocast(self.settings):
            with torch.no_grad():
                target = self.teacher(*inputs.args, **inputs.kwargs)
            marks.append(mark())
            own.append(self._own.pending())
            logits = self.student(*inputs.args, **inputs.kwargs)
            marks.append(mark())
            own.append(self._own.pending())
            for whose, found in (("student", logits), ("teacher", target)):
                _check_logits(whose, found)
            loss = lwkd.losses.distillation(logits, target, nets.labels)
            if self._capture is not None:
                transfer = lwkd.losses.attention_transfer(self._capture.student, self._capture.teacher)
                loss = loss + TRANSFER * transfer
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        optimizer.step()
        stepped = mark()
        optimizer.zero_grad()
        marks.append(mark())
        return lambda: self._lap(marks, stepped, own, self._measured() > measured)

    @property
    def measures(self) -> bool:
        """Whether some of its steps are measured (the first one of all apart)."""
        return isinstance(self.optimizer, lwkd.LayerwiseOptimizer) and self.optimizer.every == 2

    def _measured(self) -> int:
        return self.optimizer.passes["measured"] if isinstance(self.optimizer, lwkd.LayerwiseOptimizer) else 0

    def _lap(self, marks: list[Any], stepped: Any, own: list[list[tuple[Any, Any]]], measured: bool) -> Lap:
        between = self.clock.between
        self.clock.wait(marks[-1])
        phases = {name: between(*ends) for name, ends in zip(PHASES, itertools.pairwise(marks), strict=False)}
        update = self._base.take()
        in_forward = [sum(between(begin, end) for begin, end in spans) for spans in own]
        bare = not isinstance(self.optimizer, lwkd.LayerwiseOptimizer)
        in_step = 0.0 if bare else between(marks[-2], stepped) - update
        for phase, seconds in zip(
            ("teacher forward", "student forward", "optimizer"), (*in_forward, in_step), strict=True
        ):
            phases[phase] -= seconds
        phases["measuring"] = sum(in_forward) + in_step
        return Lap(phases, update, measured)
