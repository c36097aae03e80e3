"""The training loop of one net: with or without a teacher, with or without rates per layer.

Legend: ``x`` pictures (B, C, H, W), ``y`` labels (B,).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwkd
from lwkd.program import checkpoint
from lwkd.program.data.loader import Batches
from lwkd.program.distill import ranks
from lwkd.program.distill.history import History
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.signals import signal_of
from lwkd.program.errors import ProgramError
from lwkd.program.metrics import scores

RECORDS_PER_EPOCH = 10


class Stopped(Exception):  # noqa: N818 (a wish, not an error)
    """The user wants to stop; the state has been saved."""


class Cost(NamedTuple):
    """What measuring costs: a measurement at every so many updates, their share of the training time."""

    every: int
    overhead: float


@dataclass(frozen=True)
class Stage:
    """One net to train: ``name`` is teacher, alone, uniform or layerwise; ``model`` is the net's name.

    ``fingerprint`` is that of a teacher whose weights come from a file.
    """

    name: str
    model: str
    epochs: int
    teacher: nn.Module | None = None
    pairing: lwkd.Pairing | None = None
    fingerprint: str | None = None


def assess(
    net: nn.Module, batches: Batches, settings: Settings, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Scores on the test split; ``check`` runs before every batch."""
    return scores(net, batches.test(), batches.data, autocast=partial(autocast, settings), check=check)


def autocast(settings: Settings) -> torch.autocast:
    """Mixed precision, where it was asked for."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.amp == "bf16")


def policy_of(settings: Settings, stage: str) -> Any:
    """The policy of a stage; uniform rates are the constant 1, so that divergences are recorded there as well."""
    momentum = settings.policy_momentum
    if momentum is None:
        momentum = signal_of(settings).momentum
    if stage == "uniform":
        return lwkd.Constant(1.0, momentum)
    if settings.policy == "constant":
        given = settings.multiplier
        return lwkd.Constant(given[0] if len(given) == 1 else given, momentum)
    if settings.policy == "freeze":
        return lwkd.Freeze(settings.window, settings.tolerance, near=settings.near)
    options: dict[str, Any] = {
        name: value for name in ("gamma", "clamp") if (value := getattr(settings, name)) is not None
    }
    kind = {"relative": lwkd.Relative, "decay": lwkd.Decay, "local": lwkd.Local}[settings.policy]
    return kind(momentum=momentum, normalize=settings.normalize, **options)


def base_optimizer(parameters: Iterable[Any], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of parameters, or of groups of them, with one rate for all."""
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=settings.momentum, weight_decay=decay, nesterov=settings.momentum > 0
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(parameters, lr, betas=(settings.momentum, 0.999), weight_decay=decay)


def layerwise_optimizer(
    base: torch.optim.Optimizer,
    student: nn.Module,
    teacher: nn.Module,
    pairing: lwkd.Pairing,
    settings: Settings,
    stage: str,
) -> lwkd.LayerwiseOptimizer:
    """The base with a rate per layer, by the signal, policy and interval of the settings."""
    return lwkd.LayerwiseOptimizer(
        base,
        student,
        teacher,
        pairing,
        signal=signal_of(settings),
        policy=policy_of(settings, stage),
        every=settings.every,
        samples=settings.samples,
        budget=settings.budget,
    )


def by_labels(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of classes (B,), or of each class of multi-hot labels (B, K), summed over them; mean over B."""
    if y.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits.float(), y.float(), reduction="sum") / len(y)
    return F.cross_entropy(logits.float(), y)


def by_teacher(logits: Tensor, target: Tensor, y: Tensor, settings: Settings, *, labels: bool = True) -> Tensor:
    """Distillation of one class a picture or of many, as the labels say; without ``labels`` they have no part in it."""
    distance = lwkd.losses.multilabel_distillation if y.dim() == 2 else lwkd.losses.distillation
    return distance(logits, target, y if labels else None, temperature=settings.temperature, alpha=settings.alpha)


def scheduler_of(optimizer: torch.optim.Optimizer, settings: Settings, updates: int) -> Any:
    """A learning rate that is set anew before every update."""
    kinds = torch.optim.lr_scheduler
    if settings.schedule == "cosine":
        return kinds.CosineAnnealingLR(optimizer, T_max=max(updates, 1))
    if settings.schedule == "step":
        return kinds.MultiStepLR(optimizer, [int(updates * share) for share in settings.milestones], gamma=0.1)
    return kinds.ConstantLR(optimizer, factor=1.0)


class Training:
    """Trains one net; can be stopped at any batch and continued bitwise.

    Args:
        stage: what is trained.
        net: the net, on its device.
        batches: the data.
        settings: of the run.
        save: writes a checkpoint of the state it is given.
        stop_wanted: whether the user asked to stop.
        tell: called after every batch with (epoch, batches done).
        epoch_done: called after every epoch, when its checkpoint is on the disk.
    """

    def __init__(
        self,
        stage: Stage,
        net: nn.Module,
        batches: Batches,
        settings: Settings,
        *,
        save: Callable[[dict[str, Any]], None],
        stop_wanted: Callable[[], bool],
        tell: Callable[[int, int], None],
        epoch_done: Callable[[], None],
    ):
        self.stage, self.net, self.batches, self.settings = stage, net, batches, settings
        self._save, self._tell, self._epoch_done = save, tell, epoch_done
        self._stop_wanted = lambda: ranks.any_wants(stop_wanted())
        self.called = ranks.parallel(net)
        self.optimizer = base_optimizer(net.parameters(), settings)
        self.layerwise: lwkd.LayerwiseOptimizer | None = None
        self.capture: lwkd.Capture | None = None
        self.history = History(steps_per_epoch=len(batches))
        if stage.teacher is not None and stage.pairing is not None:
            self.optimizer = self.layerwise = layerwise_optimizer(
                self.optimizer, self.called, stage.teacher, stage.pairing, settings, stage.name
            )
            self.history.layers = list(stage.pairing.names)
            if settings.attention_transfer:
                self.capture = lwkd.Capture(net, stage.teacher, stage.pairing)
        self.scheduler = scheduler_of(self.optimizer, settings, stage.epochs * len(batches))
        self.epoch, self.batch, self.seconds = 0, 0, 0.0
        self._cost: Cost | None = None  # as restored
        self._clear_sums()

    @property
    def cost(self) -> Cost | None:
        """What measuring costs; None where nothing is measured."""
        if self.layerwise is None:
            return None
        overhead = self.layerwise.overhead()
        # A resumed run that has made no update yet knows only what it knew then.
        return Cost(self.layerwise.every, overhead) if overhead or self._cost is None else self._cost

    def _clear_sums(self) -> None:
        # Kept on the device in float64: nothing is read back while an epoch runs.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.settings.device)
        self.right = torch.zeros((), dtype=torch.int64, device=self.settings.device)
        self.seen = 0

    def run(self) -> History:
        """Train to the end, with a checkpoint after every epoch.

        Raises:
            Stopped: the user asked to stop; the state has been saved.
            ProgramError: the loss is no longer finite, or a checkpoint could not be written.
        """
        self.net.train()
        while self.epoch < self.stage.epochs:
            self._epoch()
            self._save(self.state(done=self.epoch == self.stage.epochs))
            self._epoch_done()
        return self.history

    def _epoch(self) -> None:
        began = time.perf_counter()
        for x, y in self.batches.train(self.epoch, start=self.batch):
            if self._stop_wanted():
                self._stop(began)
            self._update(x, y)
            self._tell(self.epoch, self.batch)
        loss, right, seen = self._totals()
        self._check_finite(loss)

        def check() -> None:
            if self._stop_wanted():
                self._stop(began)

        # Shares of the test set differ by a batch, so that several ranks cannot ask each other between batches.
        asked = check if ranks.count() == 1 else lambda: None
        found = assess(self.net, self.batches, self.settings, asked)
        if ranks.count() > 1:
            check()
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss / seen,
            **({} if self.batches.data.multilabel else {"train_accuracy": right / seen}),
            **{f"test_{name}": score for name, score in found.items()},
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds + time.perf_counter() - began,
        }
        self.history.epochs.append(row)
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self._clear_sums()

    def _totals(self) -> tuple[float, int, int]:
        """Sum of losses, right answers and pictures so far in this epoch, of all ranks."""
        mine = torch.stack([self.loss_sum.cpu(), self.right.cpu().double(), torch.tensor(float(self.seen)).double()])
        loss, right, seen = ranks.summed(mine).tolist()
        return loss, int(right), int(seen)

    def _stop(self, began: float) -> None:
        self.net.train()
        self.seconds += time.perf_counter() - began
        self._save(self.state(done=False))
        raise Stopped

    def _update(self, x: Tensor, y: Tensor) -> None:
        with autocast(self.settings):
            loss, logits = self._loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.loss_sum += loss.detach().double() * len(y)
        if not self.batches.data.multilabel:
            self.right += (logits.detach().argmax(1) == y).sum()
        self.seen += len(y)
        self.batch += 1
        step = self.epoch * len(self.batches) + self.batch
        if self.layerwise is not None and step % max(1, len(self.batches) // RECORDS_PER_EPOCH) == 0:
            self.history.record(step, self.layerwise.divergences, self.layerwise.rates, self.layerwise.standard_errors)

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.stage.teacher is None:
            logits = self.called(x)
            return by_labels(logits, y), logits
        with torch.no_grad():
            target = self.stage.teacher(x)
        logits = self.called(x)
        loss = by_teacher(logits, target, y, self.settings)
        if self.capture is not None:
            transfer = lwkd.losses.attention_transfer(self.capture.student, self.capture.teacher)
            loss = loss + self.settings.attention_transfer * transfer
        return loss, logits

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = "; the checkpoint of the epoch before is kept" if self.epoch else ""
            raise ProgramError(
                f"{self.stage.name}: the loss was no longer a finite number in epoch {self.epoch + 1}",
                f"lower --lr{kept}",
            )

    def close(self) -> None:
        """Take the hooks off both nets."""
        for watching in (self.layerwise, self.capture):
            if watching is not None:
                watching.close()

    def state(self, *, done: bool) -> dict[str, Any]:
        """All that continuing bitwise needs; plain values and tensors. Every rank has to ask for it."""
        ranks.same_buffers(self.net)
        loss, right, seen = self._totals()
        random, *others = ranks.gathered(checkpoint.random_states(self.settings.device))
        return {
            "stage": self.stage.name,
            "name": self.stage.model,
            "settings": self.settings.as_plain(),
            "fingerprint": self.stage.fingerprint,
            "threads": torch.get_num_threads(),
            "done": done,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "sums": {
                "loss": torch.tensor(loss, dtype=torch.float64),
                "right": torch.tensor(right),
                "seen": seen,
            },
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history.as_plain(),
            "cost": None if self.cost is None else tuple(self.cost),
            "random": random,
            "others": others,  # random states of the other ranks
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = History(**state["history"])
        self._cost = Cost(*state["cost"]) if state.get("cost") else None
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self._clear_sums()
        if ranks.own() == 0:  # what all ranks have summed so far
            self.loss_sum = state["sums"]["loss"].to(self.settings.device)
            self.right = state["sums"]["right"].to(self.settings.device)
            self.seen = state["sums"]["seen"]
        random = [state["random"], *state.get("others", [])]
        if ranks.own() < len(random):  # a rank that is new keeps the stream it was seeded with
            checkpoint.restore_random_states(random[ranks.own()], self.settings.device)
