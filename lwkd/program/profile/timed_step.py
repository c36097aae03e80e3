"""A training step of one kind, timed phase by phase."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lwkd
from lwkd.nets.hooks import Hook
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.train import autocast, base_optimizer
from lwkd.program.errors import ProgramError
from lwkd.program.profile.inputs import Nets
from lwkd.rates.device import Clock
from lwkd.signals import Signal

PHASES = ("teacher forward", "student forward", "loss", "backward", "optimizer", "measuring")

TRANSFER = 100.0
"""Weight of attention transfer in the loss; it changes no time."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Args:
        phases: by name; time in lwkd's own code counts under ``measuring`` only.
        update: of the base optimizer's own step, which is part of the phase ``optimizer``.
        measured: whether the signal was measured in this step.
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


class OwnTime:
    """Adds up what wrapped calls take, by a clock whose marks may be read later.

    Args:
        clock: takes the times.

    >>> from lwkd.rates.device import HostClock
    >>> own = OwnTime(HostClock())
    >>> own.around(sum)([1, 2]), own.take() > 0, own.take()
    (3, True, 0)
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[tuple[Any, Any]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.append((begin, self.clock.mark()))

        return timed

    def take_spans(self) -> list[tuple[Any, Any]]:
        """Begin and end of every call since they were last taken."""
        spans, self._spans = self._spans, []
        return spans

    def take(self) -> float:
        """Seconds in all calls since they were last taken; the device must have passed their marks."""
        return sum(self.clock.between(begin, end) for begin, end in self.take_spans())

    def watch_hooks(self, *nets: nn.Module, everywhere: bool = True) -> None:
        """Count the time in the hooks of lwkd that are on these nets now, for as long as the nets live.

        Args:
            nets: student and teacher.
            everywhere: False leaves out the hooks of layers, which only put a feature aside. They launch nothing on a
                GPU, where timing each of them would cost a pair of events.
        """
        for net in nets:
            for module in net.modules() if everywhere else [net]:
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    for key, hook in hooks.items():
                        if isinstance(hook, Hook):
                            hooks[key] = self.around(hook)


def _check_logits(whose: str, found: Any) -> None:
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        shown = f"a tensor {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ProgramError(
            f"the {whose} returned {shown}; distillation needs logits (batch, classes)",
            "give a module:function whose net returns the logits only",
        )


class TimedStep:
    """Steps with an optimizer of its own on copies of the nets, so that no other step's hooks are on them.

    Args:
        nets: copied.
        settings: of the training.
        clock: takes the times.
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
        self.settings, self.clock, self.signal = settings, clock, signal
        self._own, self._base = OwnTime(clock), OwnTime(clock)
        base = base_optimizer(self.student.parameters(), settings)
        base.step = self._base.around(base.step)  # type: ignore[method-assign]
        self.optimizer: torch.optim.Optimizer = base
        self.layerwise: lwkd.LayerwiseOptimizer | None = None
        if signal is not None:
            # Rates that differ, as where they help: the default policy leaves those of random weights at 1.
            policy = lwkd.Relative()
            self.optimizer = self.layerwise = lwkd.LayerwiseOptimizer(
                base,
                self.student,
                self.teacher,
                nets.pairing,
                signal=signal,
                policy=policy,
                every=every,
                samples=samples,
            )
            self._own.watch_hooks(self.student, self.teacher, everywhere=clock.device.type == "cpu")
        # After the hooks whose time counts: features for the loss are a cost of the loss.
        self._capture = lwkd.Capture(self.student, self.teacher, nets.pairing) if transfer else None

    def run(self, nets: Nets) -> StepTime:
        """One step on this batch; waits for its end."""
        return self.launch(nets)()

    def launch(self, nets: Nets) -> Callable[[], StepTime]:
        """Launch one step on this batch; the function that is returned waits for its end."""
        optimizer, inputs, mark = self.optimizer, nets.inputs, self.clock.mark
        measured = self._measured()
        # Forget calls of the step before: hooks that its measuring passes called, its base step if nobody read it.
        self._own.take_spans()
        self._base.take_spans()
        marks, own = [mark()], []
        with autocast(self.settings):
            with torch.no_grad():
                target = self.teacher(*inputs.args, **inputs.kwargs)
            marks.append(mark())
            own.append(self._own.take_spans())
            logits = self.student(*inputs.args, **inputs.kwargs)
            marks.append(mark())
            own.append(self._own.take_spans())
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
        return lambda: self._time(marks, stepped, own, self._measured() > measured)

    @property
    def measures(self) -> bool:
        """Whether every other step is measured; otherwise none is (but the first one of all)."""
        return self.layerwise is not None and self.layerwise.every == 2

    def _measured(self) -> int:
        return 0 if self.layerwise is None else self.layerwise.passes["measured"]

    def _time(self, marks: list[Any], stepped: Any, own: list[list[tuple[Any, Any]]], measured: bool) -> StepTime:
        between = self.clock.between
        self.clock.wait(marks[-1])
        phases = {name: between(*ends) for name, ends in zip(PHASES, itertools.pairwise(marks), strict=False)}
        update = self._base.take()
        in_forward = [sum(between(begin, end) for begin, end in spans) for spans in own]
        in_step = 0.0 if self.layerwise is None else between(marks[-2], stepped) - update
        for phase, seconds in zip(
            ("teacher forward", "student forward", "optimizer"), (*in_forward, in_step), strict=True
        ):
            phases[phase] -= seconds
        phases["measuring"] = sum(in_forward) + in_step
        return StepTime(phases, update, measured)
