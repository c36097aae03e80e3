"""transformers: a callback for the Trainer, and a Trainer with a teacher."""

from __future__ import annotations

import base64
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.trainer_callback import ExportableState

from lwkd.losses import distillation
from lwkd.nets.names import unwrap
from lwkd.optimizer import Attachment, LayerwiseOptimizer, attach
from lwkd.optimizer.metrics import KEY, UpdateRatios, scalars
from lwkd.optimizer.nested import where_steps_come
from lwkd.pairing import Pairing


class LayerwiseRatesCallback(TrainerCallback, ExportableState):
    """Learning rates by layer from the start of training to its end; saved in the checkpoint, shown in the logs.

    Whatever the Trainer logs gets ``rate/LAYER`` (of the next update), ``divergence/LAYER`` and ``update_ratio/LAYER``
    (:class:`~lwkd.optimizer.metrics.UpdateRatios`) beside it. Callbacks are told of a log one after the other:
    :meth:`add_to` puts this one before those of ``report_to``.

    Args:
        pairing: from :func:`lwkd.pair`; None: the rates are those of a :class:`~lwkd.LayerwiseOptimizer` given as
            ``Trainer(optimizers=(optimizer, None))``, which the Trainer saves itself, and are only logged here.
        teacher: the teacher, as the loss calls it.
        options: ``signal``, ``policy``, ``every``, ``samples``, ``budget`` of :func:`lwkd.attach`.

    Raises:
        ValueError: at the start of training; as :func:`lwkd.attach`, or without a pairing and a LayerwiseOptimizer.

    Warns:
        UserWarning: training resumes from a checkpoint that was saved without these rates.

    >>> import tempfile, torch, lwkd
    >>> from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainingArguments
    >>> sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    >>> student, teacher = (
    ...     BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=layers)) for layers in (2, 4)
    ... )
    >>> pairing = lwkd.pair(student, teacher.eval(), {"input_ids": torch.ones(1, 6, dtype=torch.long)})
    >>> sentences = [{"input_ids": torch.randint(30, (6,)), "labels": number % 2} for number in range(8)]
    >>> options = TrainingArguments(
    ...     tempfile.mkdtemp(), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    ... )
    >>> trainer = DistillationTrainer(student, options, train_dataset=sentences, teacher=teacher)
    >>> trainer.remove_callback(PrinterCallback)
    >>> rates = LayerwiseRatesCallback(pairing, teacher).add_to(trainer)
    >>> _ = trainer.train()
    >>> rates.shown.measurements
    3
    """

    rebuilt = False
    """Set by a Trainer that makes callbacks anew from a checkpoint, which has neither nets nor pairing."""

    def __init__(self, pairing: Pairing | None = None, teacher: nn.Module | None = None, **options: Any) -> None:
        self._pairing, self._teacher, self._options = pairing, teacher, options
        self._ratios: UpdateRatios | None = None
        self.shown: Attachment | LayerwiseOptimizer | None = None
        """Shows rates, divergences and counts; None before the start of training."""

    def add_to(self, trainer: Trainer) -> LayerwiseRatesCallback:
        """Put this callback before all others of a trainer, so that they log what it adds; returns itself."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and continue with the rates of the checkpoint if there is one."""
        if self.rebuilt:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes a LayerwiseRatesCallback anew, without its "
                "pairing, teacher and place: leave it off, rates are restored from the checkpoint without it"
            )
        optimizer = kwargs["optimizer"]
        if self._pairing is not None and self._teacher is not None:
            self.shown = attach(optimizer, kwargs["model"], self._teacher, self._pairing, **self._options)
            # A new run has an entry too, without rates.
            saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("rates")
            if saved is not None:
                self.shown.rate_state.load_state_dict({KEY: base64.b64decode(saved)})
            elif state.global_step > 0:
                warnings.warn(
                    f"training resumes at step {state.global_step} from a checkpoint without "
                    f"{type(self).__name__}: the rates per layer start anew, at 1",
                    stacklevel=2,
                )
        else:
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
            if not isinstance(inner, LayerwiseOptimizer):
                raise ValueError(
                    f"LayerwiseRatesCallback was given no pairing and teacher, and the optimizer is a "
                    f"{type(where_steps_come(optimizer)).__name__} without rates: give it "
                    "LayerwiseRatesCallback(lwkd.pair(...), teacher), or give the Trainer a LayerwiseOptimizer"
                )
            self.shown = inner
        first, steps = args.logging_first_step, args.logging_strategy == "steps"
        self._ratios = UpdateRatios(  # an update that is measured copies the parameters
            self.shown,
            lambda: (
                not steps or (state.global_step + 1) % state.logging_steps == 0 or (first and not state.global_step)
            ),
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the log, and to the trainer's history, which was written before callbacks are told."""
        if self.shown is not None and logs is not None and "loss" in logs:
            added = scalars(self.shown, self._ratios)
            logs.update(added)
            state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach; what was found stays readable."""
        if self._ratios is not None:
            self._ratios.close()
        if isinstance(self.shown, Attachment):
            self.shown.detach()

    def state(self) -> dict[str, Any]:
        """For the checkpoint's ``trainer_state.json``; a wrapper's rates are in ``optimizer.pt``."""
        if not isinstance(self.shown, Attachment):
            return {"args": {}, "attributes": {"rebuilt": True}}
        rates = base64.b64encode(self.shown.rate_state.state_dict()[KEY]).decode()
        return {"args": {}, "attributes": {"rebuilt": True, "rates": rates}}


class DistillationTrainer(Trainer):
    r"""A Trainer whose loss asks a frozen teacher too: the student's own loss beside Hinton's.

    .. math:: (1-\alpha)\,\mathcal L + \alpha\,T^2\,\mathrm{KL}(\mathrm{softmax}(z^T/T)\,\|\,\mathrm{softmax}(z^S/T))

    For logits of tokens, the second term is the mean over those that are neither padding nor labelled −100; where the
    loss shifts labels (causal language models), over those whose next token is not labelled −100. The teacher is called
    with the student's inputs but the labels, of which an encoder-decoder makes its decoder's input, in eval mode
    without gradients, under the autocast in which Accelerate runs the student; it is not saved. Batches that are
    accumulated count alike, whatever their number of tokens.

    Args:
        args: those of ``transformers.Trainer``.
        teacher: the teacher; its parameters stop asking for gradients.
        temperature: T.
        alpha: α.
        kwargs: as ``args``.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # Nets that take it as an argument need not divide by it, and then their loss would grow with accumulation.
        self.model_accepts_loss_kwargs = False
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"expected a temperature above 0 and alpha in [0, 1], found {temperature} and {alpha}")
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature, self.alpha = temperature, alpha
        # The Trainer's own flag misses models that are not named after their loss (GPT2LMHeadModel).
        assert self.model is not None
        causal = any(type(module).__name__ in CAUSAL.values() for module in self.model.modules())
        self._shifts_labels = self._loss_shifts_labels or (causal and not _is_encoder_decoder(self.model))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss above."""
        labels, asked = inputs.get("labels"), dict(inputs)
        if not _is_encoder_decoder(unwrap(self.teacher)):
            asked.pop("labels", None)
        mask = inputs.get("attention_mask")
        loss, outputs = super().compute_loss(model, inputs, True)
        with torch.no_grad(), self.accelerator.autocast():  # as Accelerate runs the student
            theirs = self.teacher(**asked)["logits"]
        logits = outputs["logits"]
        wanted = _positions(logits, labels, mask, shifted=self._shifts_labels)
        total = (1 - self.alpha) * loss
        if wanted.any():
            total = total + self.alpha * distillation(logits[wanted], theirs[wanted], temperature=self.temperature)
        return (total, outputs) if return_outputs else total


def _is_encoder_decoder(net: nn.Module) -> bool:
    return getattr(getattr(net, "config", None), "is_encoder_decoder", False) is True


def _positions(logits: Tensor, labels: Any, mask: Any, *, shifted: bool = False) -> Tensor:
    """Which positions count: those with a label, or else those that are no padding, or else all."""
    shape = logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        labelled = labels != -100
        # The logits of a token are about the next one, and those of the last about none.
        return nn.functional.pad(labelled[..., 1:], (0, 1)) if shifted else labelled
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask > 0
    return torch.ones(shape, dtype=torch.bool, device=logits.device)
