"""Lightning: a Callback that gives the optimizer of a LightningModule a learning rate per student layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lwkd.optimizer import Attachment, LayerwiseOptimizer, attach
from lwkd.optimizer.metrics import UpdateRatios, scalars
from lwkd.pairing import Pairing

Net = str | Callable[[LightningModule], nn.Module]
"""The name of an attribute of the LightningModule (``"student"``, ``"nets.student"``), or a function of it."""


class LayerwiseRates(Callback):
    """Learning rates by layer from the start of training to its end; saved in the checkpoint, shown by the loggers.

    Works under automatic and manual optimisation, accumulation, clipping and mixed precision, as the optimizer that
    ``configure_optimizers`` returns is the one that is stepped. Wherever the trainer logs, so are ``rate/LAYER`` (of
    the next update), ``divergence/LAYER`` and ``update_ratio/LAYER`` (:class:`~lwkd.optimizer.metrics.UpdateRatios`).
    Every call of ``fit`` begins with new rates, as it begins with a new optimizer, unless it resumes from a checkpoint.

    Args:
        pairing: from :func:`lwkd.pair`, or a function of the LightningModule that gives one. None: the rates are those
            of a :class:`~lwkd.LayerwiseOptimizer` that ``configure_optimizers`` returned, and are only logged here; it
            saves them itself.
        student: the student.
        teacher: the teacher.
        optimizer: which of the trainer's optimizers.
        update_ratios: log them, at the price of a copy of the paired parameters in updates that are logged.
        options: ``signal``, ``policy``, ``every``, ``samples``, ``budget`` of :func:`lwkd.attach`.

    Raises:
        ValueError: at the start of training; as :func:`lwkd.attach`, or without a pairing and a LayerwiseOptimizer.

    Warns:
        UserWarning: training resumes from a checkpoint that was saved without these rates.

    >>> import torch, lwkd
    >>> from lightning.pytorch import Trainer
    >>> from torch.utils.data import DataLoader
    >>> class Distillation(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         net = lambda width: torch.nn.Sequential(
    ...             torch.nn.Conv2d(1, width, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3))
    ...         self.student, self.teacher = net(4), net(8)
    ...         self.teacher.eval()
    ...     def training_step(self, x):
    ...         with torch.no_grad(): target = self.teacher(x).mean()
    ...         return (self.student(x).mean() - target).square()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.student.parameters(), lr=0.1)
    >>> module, pictures = Distillation(), torch.rand(6, 1, 16, 16)
    >>> rates = LayerwiseRates(lwkd.pair(module.student, module.teacher, pictures[:1]))
    >>> Trainer(max_steps=3, accelerator="cpu", callbacks=[rates], logger=False, enable_checkpointing=False,
    ...         enable_progress_bar=False, enable_model_summary=False).fit(module, DataLoader(pictures, 2))
    >>> rates.shown.measurements
    3
    """

    def __init__(
        self,
        pairing: Pairing | Callable[[LightningModule], Pairing] | None = None,
        *,
        student: Net = "student",
        teacher: Net = "teacher",
        optimizer: int = 0,
        update_ratios: bool = True,
        **options: Any,
    ) -> None:
        self._pairing, self._options, self._index = pairing, options, optimizer
        self._nets = [attrgetter(net) if isinstance(net, str) else net for net in (student, teacher)]
        self._wants_ratios = update_ratios
        self._ratios: UpdateRatios | None = None
        self._saved: dict[str, Any] | None = None  # callbacks are given their state before there is an optimizer
        self._missing = False
        self.shown: Attachment | LayerwiseOptimizer | None = None
        """Shows rates, divergences and counts; None before the start of training."""

    @property
    def state_key(self) -> str:
        """One for each optimizer."""
        return self._generate_state_key(optimizer=self._index)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and continue with the rates of the checkpoint if there is one."""
        optimizer = trainer.optimizers[self._index]
        if self._pairing is not None:
            pairing = self._pairing if isinstance(self._pairing, Pairing) else self._pairing(pl_module)
            student, teacher = (find(pl_module) for find in self._nets)
            self.shown = attach(optimizer, student, teacher, pairing, **self._options)
            self._continue()
        elif isinstance(optimizer, LayerwiseOptimizer):
            self.shown = optimizer
        else:
            raise ValueError(
                f"LayerwiseRates was given no pairing, and optimizer {self._index} is a {type(optimizer).__name__} "
                "without rates: give it LayerwiseRates(lwkd.pair(...)), or return a LayerwiseOptimizer"
            )
        if self._wants_ratios:
            self._ratios = UpdateRatios(self.shown, lambda: trainer._logger_connector.should_update_logs)

    def _continue(self) -> None:
        saved, missing = self._saved, self._missing
        self._saved, self._missing = None, False
        if saved is not None and isinstance(self.shown, Attachment):
            self.shown.load_state_dict(saved)
        elif missing:
            warnings.warn(
                f"training resumes from a checkpoint without {self.state_key}: the rates per layer start anew, at 1",
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log."""
        if self.shown is not None and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(scalars(self.shown, self._ratios))

    def on_train_end(self, *_: Any) -> None:
        """Detach; what was found stays readable."""
        if self._ratios is not None:
            self._ratios.close()
        if isinstance(self.shown, Attachment):
            self.shown.detach()

    def on_exception(self, *_: Any) -> None:
        """Detach, as at the end."""
        self.on_train_end()

    # In the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The rates, where they are not the optimizer's own to save."""
        return self.shown.state_dict() if isinstance(self.shown, Attachment) else self._saved or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the rates until there is an optimizer."""
        self._saved = state_dict
        if isinstance(self.shown, Attachment) and self.shown.active:
            self._continue()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice where the rates of a run are missing."""
        self._missing = checkpoint["global_step"] > 0 and self.state_key not in checkpoint["callbacks"]
