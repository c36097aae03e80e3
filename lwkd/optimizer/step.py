"""One step of the base optimizer in which every layer moves at its own rate: what both forms of the wrapper do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lwkd.optimizer.fused_step import FusedStep
from lwkd.optimizer.ownership import Ownership
from lwkd.optimizer.param_groups import lr_scaling, scaled_step, why_on_host
from lwkd.pairing import Pairing
from lwkd.rates import LayerRates


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class LayerwiseStep:
    """Asks the rates before a step, scales the learning rates in it, and tells the rates after it.

    Args:
        optimizer: the base.
        student: the student.
        teacher: the teacher.
        pairing: which layers, and whose parameters.
        fused_step: step with kernels of our own instead of splitting groups.
        options: those of :class:`lwkd.rates.LayerRates`.

    Raises:
        ValueError: the base holds no parameter of a paired layer, or ``fused_step`` does not know the base; no hook is
            left behind.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        fused_step: bool,
        **options: Any,
    ) -> None:
        self.optimizer = optimizer
        self.fused = FusedStep(optimizer) if fused_step else None
        self.rates = LayerRates(student, teacher, pairing, **options)
        self.owners = Ownership(pairing)
        self.owners.resolve(student)
        if all(self.owners.layer_of(parameter) is None for parameter in parameters_of(optimizer)):
            self.rates.close()
            raise ValueError(
                "none of the optimizer's parameters belongs to a paired layer of this student: the optimizer was made "
                "for another model, or for a copy of it. Make it from student.parameters()."
            )
        self._prepare()  # a first step that is captured finds the rates where it needs them

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Attach to these nets."""
        self.rates.watch(student, teacher)
        self.owners.resolve(student)

    def _prepare(self) -> None:
        """The rates are up to date and lie where this step reads them; the layer of every parameter is known."""
        groups, device = self.optimizer.param_groups, self.rates.locate()
        on_host = why_on_host(groups, device, self.fused is not None)
        # Our own step reads multipliers on the device whatever its learning rates are.
        self.rates.before_step(device if on_host is None or self.fused is not None else None, on_host)
        self.owners.refresh(parameters_of(self.optimizer), self.rates.student)

    def __call__(self, base_step: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        """One update, after which the rates of the next one are set.

        Args:
            base_step: ``step`` of the base.
            closure: as the user gave it.

        Returns:
            What the base returns.
        """
        self._prepare()
        self.rates.begin_step()
        multipliers = self.rates.multipliers
        if self.fused is not None:
            assert isinstance(multipliers, Tensor)
            loss = self.fused.step(self.owners.layer_of, multipliers, closure)
        else:
            loss = scaled_step(self.optimizer, base_step, lr_scaling(multipliers, self.owners.layer_of), closure)
        # A GradScaler calls the step of a fused base even when gradients are infinite, and sets found_inf on the base,
        # which then does nothing, and neither do the rates. With other bases it does not call step at all.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and self.rates.store.mode != "device":
            if not bool(found_inf):
                self.rates.after_step()
        else:
            self.rates.after_step(found_inf)
        return loss
