"""Lightning as it is: its loops, precision, clipping, accumulation, checkpoints, monitors and loggers."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import on_ranks, parallel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import BASES, batches, loss_of, moving, nets, same, train, weights

import lwkd

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from lwkd.integrations.lightning import LayerwiseRates

STEPS, EPOCH = 6, 3

CLIP = 0.05


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning's advice on loaders and loggers says nothing here; lwkd's warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*rates per layer.*")
        yield


class Distillation(LightningModule):
    """The toy nets; with ``wrap`` the optimizer is lwkd's own."""

    def __init__(self, *, manual: int = 0, wrap: dict[str, Any] | None = None, schedule: bool = False) -> None:
        super().__init__()
        self.student, self.teacher, self.pairing = nets()
        self.automatic_optimization, self.passes = not manual, manual
        self.wrap, self.schedule = wrap, schedule

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        loss = loss_of(self.student, self.teacher, *batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / self.passes)
        if (index + 1) % self.passes == 0:
            self.clip_gradients(optimizer, CLIP, "norm")
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        loss_of(self.student, self.teacher, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = BASES["sgd"](self.student.parameters())
        if self.wrap is not None:
            optimizer = lwkd.LayerwiseOptimizer(optimizer, self.student, self.teacher, self.pairing, **self.wrap)
        return ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]) if self.schedule else optimizer


def fit(
    module: Distillation, *callbacks: Callback, epochs: int = 2, path: Any = None, seed: int = 1, **options: Any
) -> Trainer:
    """So many epochs, with a validation after each; from this checkpoint."""
    options = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1} | options
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    # A list of lists would be several loaders.
    training, validation = (
        DataLoader(list(batches(count, seed)), batch_size=None) for count in (EPOCH * module_passes(trainer, module), 1)
    )
    trainer.fit(module, training, validation, ckpt_path=path)
    return trainer


def module_passes(trainer: Trainer, module: Distillation) -> int:
    """Passes before an update."""
    return module.passes or trainer.accumulate_grad_batches


def by_hand(passes: int, clip: float | None, precision: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and rates of a plain loop."""
    student, teacher, pairing = nets()
    optimizer = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing, policy=moving())
    for _ in range(STEPS // EPOCH):
        for number, (x, y) in enumerate(batches(EPOCH * passes)):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = loss_of(student, teacher, x, y)
            (loss / passes).backward()
            if (number + 1) % passes == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(student.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return weights(student), optimizer.rates


@pytest.mark.parametrize("form", ["callback", "wrapper"])
@pytest.mark.parametrize(
    ("manual", "passes", "clip", "precision"),
    [(False, 1, None, "32-true"), (False, 2, CLIP, "bf16-mixed"), (True, 2, CLIP, "32-true")],
    ids=["automatic", "automatic, accumulated, clipped, bf16", "manual, accumulated, clipped"],
)
def test_updates_are_those_of_a_plain_loop(
    form: str, manual: bool, passes: int, clip: float | None, precision: str
) -> None:
    expected, rates = by_hand(passes, clip, precision)
    policy = {"policy": moving()}
    module = Distillation(manual=passes if manual else 0, wrap=policy if form == "wrapper" else None)
    callback = LayerwiseRates() if form == "wrapper" else LayerwiseRates(lambda module: module.pairing, **policy)
    options = {} if manual else {"accumulate_grad_batches": passes, "gradient_clip_val": clip}
    fit(module, callback, precision=precision, **options)
    assert callback.shown.measurements == STEPS
    assert callback.shown.rates == rates
    assert len(set(rates.values())) == 2
    assert same(weights(module.student), expected)


@pytest.mark.parametrize("form", ["callback", "wrapper"])
@pytest.mark.parametrize("signal", ["attention", "hessian"])
def test_its_checkpoint_continues_bitwise(form: str, signal: str, tmp_path: Path) -> None:
    options = {"signal": signal, "every": 2, "policy": moving(signal)}

    def run(epochs: int, *more: Callback, path: Any = None) -> tuple[dict[str, Tensor], dict[str, float], Any]:
        module = Distillation(wrap=options if form == "wrapper" else None)
        rates = LayerwiseRates(module.pairing, **options) if form == "callback" else LayerwiseRates()
        trainer = fit(module, rates, *more, epochs=epochs, path=path, enable_checkpointing=bool(more))
        return weights(module.student), rates.shown.rates, trainer

    whole = run(2)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="half")
    first = run(1, saved)
    first[2].save_checkpoint(tmp_path / "afterwards.ckpt")
    for name in ("half.ckpt", "afterwards.ckpt"):
        resumed = run(2, path=tmp_path / name)
        assert resumed[1] == whole[1]
        assert same(resumed[0], whole[0])
    assert not same(first[0], whole[0])


@pytest.mark.parametrize("form", ["callback", "wrapper"])
def test_rates_that_are_missing_at_a_resume_are_said(form: str, tmp_path: Path) -> None:
    fit(Distillation(), epochs=1).save_checkpoint(tmp_path / "bare.ckpt")
    module = Distillation(wrap={} if form == "wrapper" else None)
    callback = LayerwiseRates(module.pairing if form == "callback" else None)
    with pytest.warns(UserWarning, match="rates per layer") as said:
        fit(module, callback, path=tmp_path / "bare.ckpt")
    assert len([w for w in said if "rates per layer" in str(w.message)]) == 1


def _rank(rank: int, folder: str) -> dict[str, list[Any]]:
    """Rates and weights of a plain loop under DDP and of Lightning's, on batches of this rank's own."""
    told = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in told.items()})
    student, whole, teacher, optimizer, _ = parallel("wrapper", policy=moving())
    for _ in range(STEPS // EPOCH):
        train(optimizer, whole, teacher, EPOCH, seed=rank)
    found = {"by hand": [optimizer.rates, weights(student)]}
    for form in ("callback", "wrapper"):
        policy = {"policy": moving()}
        module = Distillation(wrap=policy if form == "wrapper" else None)
        module.teacher.requires_grad_(False)
        callback = LayerwiseRates() if form == "wrapper" else LayerwiseRates(lambda module: module.pairing, **policy)
        strategy = DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo")
        options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "default_root_dir": folder}
        fit(module, callback, seed=rank, **options)
        found[form] = [callback.shown.rates, weights(module.student)]
    return found


def test_two_ranks_do_what_a_plain_loop_does(tmp_path: Path) -> None:
    one, other = on_ranks(_rank, tmp_path, str(tmp_path))
    rates, expected = one["by hand"]
    assert len(set(rates.values())) == 2
    for found in (*one.values(), *other.values()):
        assert found[0] == rates
        # Batch norms are each rank's own.
        assert same(*({n: t for n, t in of.items() if "running" not in n} for of in (found[1], expected)))


class Snapshots(Callback):
    """The student's parameters at the start and after every update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append({n: p.detach().double() for n, p in pl_module.student.named_parameters()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("wrap", [None, {}])
@pytest.mark.parametrize("manual", [0, 1])
def test_rates_divergences_and_update_ratios_reach_the_loggers(wrap: Any, manual: int, tmp_path: Path) -> None:
    module, snapshots = Distillation(wrap=wrap, manual=manual), Snapshots()
    callback = LayerwiseRates(module.pairing if wrap is None else None)
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit(module, snapshots, callback, logger=loggers, log_every_n_steps=2)
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row.get("rate/low")]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    for row in rows:
        old, new = snapshots.seen[int(row["step"])], snapshots.seen[int(row["step"]) + 1]
        for layer in ("low", "high"):
            names = [name for name in old if name.startswith(layer)]
            moved = math.sqrt(sum(float((new[n] - old[n]).square().sum()) for n in names))
            was = math.sqrt(sum(float(old[n].square().sum()) for n in names))
            assert float(row[f"update_ratio/{layer}"]) == pytest.approx(moved / was, rel=1e-4)
    shown = callback.shown
    assert {n: float(rows[-1][f"rate/{n}"]) for n in shown.rates} == pytest.approx(shown.rates, rel=1e-6)
    assert {n: float(rows[-1][f"divergence/{n}"]) for n in shown.rates} == pytest.approx(shown.divergences, rel=1e-6)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("update_ratio/high")] == [1, 3, 5]


@pytest.mark.parametrize("form", ["bare", "callback", "wrapper"])
@pytest.mark.parametrize("schedule", [True, False])
def test_the_monitor_of_learning_rates_logs_each_once(form: str, schedule: bool, tmp_path: Path) -> None:
    """It takes an optimizer with an attribute ``optimizer`` for DeepSpeed's, and logs what is inside."""
    module = Distillation(wrap={} if form == "wrapper" else None, schedule=schedule)
    monitor = LearningRateMonitor("step")
    callbacks = [LayerwiseRates(module.pairing)] if form == "callback" else []
    fit(module, monitor, *callbacks, logger=CSVLogger(tmp_path))
    assert list(monitor.lrs) == ["lr-LayerwiseOptimizer" if form == "wrapper" else "lr-SGD"]
    (rates,) = monitor.lrs.values()
    assert rates == pytest.approx([0.05] * EPOCH + [0.005 if schedule else 0.05] * EPOCH)


def test_nothing_is_left_behind_and_the_next_fit_begins_anew() -> None:
    module = Distillation()
    callback = LayerwiseRates(module.pairing)
    trainer = fit(module, callback)
    assert "step" not in vars(trainer.optimizers[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert callback.shown.measurements == STEPS
    fit(module, callback, epochs=1)
    assert callback.shown.measurements == EPOCH

    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(module, callback, Stop())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_callback_without_a_pairing_needs_an_optimizer_with_rates() -> None:
    with pytest.raises(ValueError, match=r"was given no pairing.*SGD.*return a LayerwiseOptimizer"):
        fit(Distillation(), LayerwiseRates())
