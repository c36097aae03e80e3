"""One run of a comparison: a student from its start to its score. Nothing here knows of other runs.

Legend: ``L`` segments, ``U`` updates.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn

import lwkd
from lwkd.program.compare.arms import AutoRGN, Fixed, Rates, control, layer_decay, segments
from lwkd.program.compare.losses import Loss
from lwkd.program.compare.pictures import Split, shift_of, shown_to_student, split_off
from lwkd.program.compare.recipe import CONTROLS, OF_TEACHERS, Arm, Method, Recipe
from lwkd.program.compare.start import start
from lwkd.program.data.datasets import Data
from lwkd.program.data.loader import Batches
from lwkd.program.distill.nets import net_for, pair_nets
from lwkd.program.distill.settings import NOT_THE_RUN, Settings
from lwkd.program.distill.signals import signal_of
from lwkd.program.distill.train import base_optimizer, by_labels, layerwise_optimizer, policy_of, scheduler_of
from lwkd.program.errors import ProgramError
from lwkd.program.metrics import scores
from lwkd.program.seeds import repeatable, seed_everything

DEVELOPMENT = 10_000
"""Seeds from here on choose base rates, seeds below give the figures."""

TEACHER, STUDENT = 0, 1
"""Random streams of weights and dropout."""

Weights = dict[str, Tensor]


def digest(*values: object) -> str:
    """Twelve letters for plain values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def _plain(settings: Settings) -> dict[str, Any]:
    """What decides the result: not where files lie, nor what the trial itself sets."""
    plain = settings.as_plain()
    return {name: plain[name] for name in plain if name not in (*NOT_THE_RUN, "lr", "seed")}


@dataclass(frozen=True)
class TeacherTrial:
    """The training of one of a recipe's teachers."""

    recipe: Recipe
    number: int

    @cached_property
    def key(self) -> str:
        """Names the file of its weights."""
        settings = self.recipe.teacher_settings
        what = digest([getattr(settings, name) for name in OF_TEACHERS], self.recipe.validation)
        return f"{settings.teacher.replace(':', '.')}-{self.number}-{what}"

    def run(self) -> dict[str, Any]:
        """Train it; its weights, and its accuracy on the validation and on the test pictures."""
        settings = replace(self.recipe.teacher_settings, seed=self.number)
        splits: dict[Split, Data] = {
            name: split_off(settings, self.recipe.validation, name) for name in get_args(Split)
        }
        data = splits["test"]
        with repeatable(settings.threads or 1):
            _check_nets(self.recipe, data)
            seed_everything(self.number, TEACHER)
            net = net_for(settings.teacher, data, settings.device)
            optimizer = base_optimizer(net.parameters(), settings)
            batches = Batches(data, settings.batch_size, seed=self.number, device=settings.device)
            schedule = scheduler_of(optimizer, settings, settings.teacher_epochs * len(batches))
            for epoch in range(settings.teacher_epochs):
                for x, y in batches.train(epoch):
                    loss = by_labels(net(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            found = {name: score(net, of, settings) for name, of in splits.items()}
        return {"weights": {name: value.cpu() for name, value in net.state_dict().items()}, "scores": found}


def _check_nets(recipe: Recipe, data: Data) -> None:
    """What only the nets can say of a recipe: before a teacher is trained, with random weights in its place."""
    settings = recipe.settings
    student, teacher = (net_for(name, data, settings.device) for name in (settings.student, settings.teacher))
    example = data.example().to(settings.device)
    begun, pairing = _begun(recipe, student, teacher, example, seed=0)
    for arm in recipe.arms.values():
        _check_frozen(arm, segments(begun, pairing))


def _begun(
    recipe: Recipe, fresh: nn.Module, teacher: nn.Module, example: Any, seed: int
) -> tuple[nn.Module, lwkd.Pairing]:
    """What a fresh net is as the student before training, and its pairing with the teacher."""
    given = recipe.settings.pair
    student = start(recipe.start, fresh, teacher, pair_nets(fresh, teacher, example, given, head=recipe.head), seed)
    return student, pair_nets(student, teacher, example, given, head=recipe.head)


def _check_frozen(arm: Arm, found: Sequence[Sequence[nn.Parameter]]) -> None:
    if arm.layers >= len(found) or not any(found[arm.layers :]):
        raise ProgramError(
            f"arm {arm.name!r}: layers is {arm.layers} of {len(found) - 1} segments, and nothing is left to train",
            "freeze fewer",
            code=2,
        )


@dataclass(frozen=True, eq=False)
class Trial:
    """One student: an arm at a base rate, with a seed.

    ``source`` is the layer-wise trial that a control repeats, and ``rates`` (U, L) the multipliers that it had.
    """

    recipe: Recipe
    method: Method
    arm: Arm
    lr: float
    seed: int
    source: Trial | None = None
    rates: Tensor | None = None

    @property
    def development(self) -> bool:
        """Whether the run only helps to choose base rates."""
        return self.seed >= DEVELOPMENT

    @property
    def teacher(self) -> TeacherTrial:
        """Whom the student learns from; seeds take turns."""
        return TeacherTrial(self.recipe, self.seed % self.recipe.teachers)

    @cached_property
    def key(self) -> str:
        """Names the file of the result; equal for two runs that would compute the same, whatever recipe they are in."""
        r = self.recipe
        shared = [asdict(r.start), r.labels, r.label_noise, r.shift, dict(r.weights), r.validation, r.head]
        arm: list[object] = [self.arm.rates, self.arm.decay, self.arm.layers, _plain(self.arm.settings)]
        if self.arm.rates == "layerwise":  # with the defaults of signal and policy, which a version may change
            signal = re.sub(r" at 0x\w+", "", repr(signal_of(self.arm.settings)))  # a loss is a function somewhere
            arm += [signal, policy_of(self.arm.settings, "layerwise").state_dict()]
        of = self.source.key if self.source is not None else None
        name = re.sub(r"[^a-z0-9.+]+", "-", f"{self.method} {self.arm.name}".lower()).strip("-")
        what = digest(self.teacher.key, self.method, shared, arm, self.lr, self.seed, of)
        return f"{name}-{self.lr:g}-{self.seed}-{what}"

    def run(self, weights: Weights) -> dict[str, Any]:
        """Train the student of a teacher with these weights.

        Returns:
            ``score`` in [0, 1] after the last epoch (development: on the validation pictures), ``seconds`` of training
            (on a CPU its own time), ``finite`` (False where the loss was not, and training ended); for layer-wise arms
            ``rates`` and ``divergences`` (U, L) float32, those in force in each update.
        """
        settings = replace(self.arm.settings, lr=self.lr, seed=self.seed)
        with repeatable(settings.threads or 1):
            return _Run(self, settings, weights).result()


class _Seeing(nn.Module):
    """A net that looks at pictures in its own way."""

    def __init__(self, net: nn.Module, see: Callable[[Tensor], Tensor]):
        super().__init__()
        self.net, self.see = net, see

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(self.see(x))
        return found


def score(net: nn.Module, data: Data, settings: Settings, see: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """The headline score on the test pictures, in [0, 1], each as ``see`` makes it look."""
    batches = Batches(data, settings.batch_size, seed=0, device=settings.device)
    return next(iter(scores(_Seeing(net, see), batches.test(), data).values()))


class _Run:
    """A trial under way."""

    def __init__(self, trial: Trial, settings: Settings, weights: Weights):
        recipe, seed = trial.recipe, trial.seed
        self.trial, self.settings = trial, settings
        whole = split_off(settings, recipe.validation, "validation" if trial.development else "test")
        self.data = shown_to_student(whole, recipe, seed)
        self.batches = Batches(self.data, settings.batch_size, seed=seed, device=settings.device)
        self.teacher = net_for(settings.teacher, self.data, settings.device)
        self.teacher.load_state_dict(weights)
        self.teacher.eval().requires_grad_(False)
        seed_everything(seed, STUDENT)
        fresh = net_for(settings.student, self.data, settings.device)
        example = self.data.example().to(settings.device)
        self.student, self.pairing = _begun(recipe, fresh, self.teacher, example, seed)
        self.see = shift_of(recipe, self.data)
        layerwise = trial.arm.rates == "layerwise"
        self.loss = Loss(trial.method, recipe, self.student, self.teacher, self.pairing, self.see, watched=layerwise)
        self.optimizer, self.rates = self._optimizer()
        updates = settings.epochs * len(self.batches)
        self.schedule = scheduler_of(self.optimizer, settings, updates)
        self.record: dict[str, list[list[float]]] = {"rates": [], "divergences": []}

    def _optimizer(self) -> tuple[torch.optim.Optimizer, Rates | None]:
        """The optimizer, and what multiplies its groups' rates; None where lwkd does."""
        trial, settings, found = self.trial, self.settings, segments(self.student, self.pairing)
        arm, last = trial.arm, len(self.pairing)
        if arm.rates == "frozen-prefix":
            _check_frozen(arm, found)
            for parameter in [p for segment in found[: arm.layers] for p in segment]:
                parameter.requires_grad_(False)
        if arm.rates == "auto-rgn":
            found = [[parameter] for segment in found for parameter in segment]
        groups = [{"params": segment} for segment in found]
        optimizer = base_optimizer(groups, settings)
        if arm.rates in CONTROLS:
            assert trial.rates is not None
            return optimizer, control(arm, trial.rates, trial.seed)
        if arm.rates == "auto-rgn":
            return optimizer, AutoRGN([segment[0] for segment in found], len(self.batches))
        if arm.rates == "layer-decay":
            return optimizer, layer_decay(last, arm.decay)
        if arm.rates != "layerwise":
            return optimizer, Fixed([1.0] * (last + 1))
        return layerwise_optimizer(optimizer, self.student, self.teacher, self.pairing, settings, "layerwise"), None

    def result(self) -> dict[str, Any]:
        """Train and score."""
        # A CPU is shared with the other trials: the time that it has given to this one says more.
        clock = time.process_time if torch.device(self.settings.device).type == "cpu" else time.perf_counter
        began = clock()
        finite = self._train()
        seconds = clock() - began
        self.loss.close()
        if isinstance(self.optimizer, lwkd.LayerwiseOptimizer):
            self.optimizer.close()
        found = {"score": score(self.student, self.data, self.settings, self.see), "seconds": seconds, "finite": finite}
        return found | {name: torch.tensor(rows) for name, rows in self.record.items() if rows}

    def _train(self) -> bool:
        """Whether every loss was finite; training ends at one that is not."""
        self.student.train()
        update = 0
        for epoch in range(self.settings.epochs):
            for x, y in self.batches.train(epoch):
                loss = self.loss(x, y)
                if not math.isfinite(loss.item()):
                    return False
                self.optimizer.zero_grad()
                loss.backward()
                self._step(update)
                self.schedule.step()
                update += 1
        return True

    def _step(self, update: int) -> None:
        if isinstance(self.optimizer, lwkd.LayerwiseOptimizer):
            self.record["rates"].append(list(self.optimizer.rates.values()))
            self.record["divergences"].append(list(self.optimizer.divergences.values()))
            self.optimizer.step()
            return
        assert self.rates is not None
        groups = self.optimizer.param_groups
        plain = [group["lr"] for group in groups]
        for group, lr, multiplier in zip(groups, plain, self.rates.before(update), strict=True):
            group["lr"] = lr * multiplier
        self.optimizer.step()
        for group, lr in zip(groups, plain, strict=True):  # schedulers go on from the rate that they set
            group["lr"] = lr
