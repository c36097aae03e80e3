"""One step of the base optimizer in which every layer moves at its own rate: what both forms of the wrapper do."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lwkd.optimizer.ownership import Ownership
from lwkd.optimizer.param_groups import GroupMemory, lr_scaling, scaled_step, why_on_host
from lwkd.optimizer.trial import check_learning_rates, moves_by_displacement, with_those_inside
from lwkd.pairing import Pairing
from lwkd.rates import LayerRates


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


_in_use: weakref.WeakKeyDictionary[Optimizer, weakref.ref[LayerwiseStep]] = weakref.WeakKeyDictionary()
"""Optimizers, and what steps them layer by layer."""


def check_not_layerwise(optimizer: Optimizer) -> None:
    """Check that nobody scales the steps of this optimizer, or of one inside it.

    Raises:
        ValueError: somebody does; says what to do.
    """
    for one in with_those_inside(optimizer):
        step = _in_use[one]() if one in _in_use else None
        if "_layerwise" in vars(one) or (step is not None and step.rates.watching):
            where = "it" if one is optimizer else f"the {type(one).__name__} inside it"
            raise ValueError(
                f"the optimizer is a {type(optimizer).__name__}, and {where} has a learning rate per layer already: "
                "two teachers cannot set the rates of one optimizer. End the first (close() of a LayerwiseOptimizer, "
                "whose base is then free, or detach() of what attach returned), and let a second teacher act through "
                "the loss"
            )


class LayerwiseStep:
    """Asks the rates before a step, scales the learning rates in it, and tells the rates after it.

    Args:
        optimizer: the base.
        student: the student.
        teacher: the teacher.
        pairing: which layers, and whose parameters.
        options: those of :class:`lwkd.rates.LayerRates`.

    Raises:
        ValueError: the base holds no parameter of the student, or its steps cannot be scaled by layer; no hook is left
            behind.

    Warns:
        UserWarning: rates do nothing: of layers without a trainable parameter in the base, or as they are always 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        **options: Any,
    ) -> None:
        self.optimizer = optimizer
        check_not_layerwise(optimizer)
        check_learning_rates(optimizer)
        self.memory = GroupMemory()
        self.displaced = moves_by_displacement(optimizer)
        self.rates = LayerRates(student, teacher, pairing, **options)
        self.owners = Ownership(pairing)
        self.owners.resolve(student)
        if not any(self.owners.knows(parameter) for parameter in parameters_of(optimizer)):
            self.rates.close()
            raise ValueError(
                "none of the optimizer's parameters belongs to a paired layer of this student, or to the student at "
                "all: the optimizer was made for another model, or for a copy of it. Make it from student.parameters()."
            )
        self._warn_of_rates_without_effect()
        self._prepare()  # a first step that is captured finds the rates where it needs them
        _in_use[optimizer] = weakref.ref(self)

    def _trained_layers(self) -> list[int]:
        """Layers of which the base holds a parameter that is not frozen."""
        layers = {self.owners.layer_of(p) for p in parameters_of(self.optimizer) if p.requires_grad}
        return sorted(layer for layer in layers if layer is not None)

    def _warn_of_rates_without_effect(self) -> None:
        trained, pairing = self._trained_layers(), self.rates.pairing
        idle = [name for layer, name in enumerate(pairing.names) if layer not in trained]
        if idle:
            which = ", ".join(idle) if trained else "all of them: whatever is trained belongs to no pair"
            warnings.warn(
                f"{len(idle)} of {len(pairing)} paired layers have no trainable parameter in this optimizer ({which}), "
                "so that their rates do nothing; they do not count when layers are compared. Unfreeze them and give "
                "them to the optimizer, or leave them out with lwkd.pair(..., layers={...})",
                stacklevel=4,
            )
        if len(trained) == 1 and getattr(self.rates.policy, "compares_layers", False):
            warnings.warn(
                f"{pairing.names[trained[0]]} is the only layer that is compared, and {self.rates.policy!r} compares "
                "layers with each other: its rate is always 1. Pair more layers, or use lwkd.Decay(), which compares a "
                "layer with its own start",
                stacklevel=4,
            )

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Attach to these nets."""
        self.rates.watch(student, teacher)
        self.owners.resolve(student)
        _in_use[self.optimizer] = weakref.ref(self)

    def _prepare(self) -> None:
        """The rates are up to date and lie where this step reads them; the layer of every parameter is known."""
        check_learning_rates(self.optimizer)
        groups, device = self.optimizer.param_groups, self.rates.locate()
        on_host = why_on_host(groups, device)
        self.rates.before_step(device if on_host is None else None, on_host)
        self.owners.refresh(parameters_of(self.optimizer), self.rates.student)
        if self.rates.due:  # nobody asks which layers count in an update without a measurement
            self.rates.count_layers(self._trained_layers())

    def __call__(self, base_step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """One update, after which the rates of the next one are set.

        Args:
            base_step: ``step`` of the base.
            args: for it, as the user gave them: a closure, if there is one, is the first, or called ``closure``.
            kwargs: as ``args``.

        Returns:
            What the base returns.
        """
        self._prepare()
        self.rates.begin_step()
        if args == (None,):
            args = ()
        if kwargs.get("closure", 0) is None:  # a base without closures is stepped by those who always name one
            del kwargs["closure"]
        scaling = lr_scaling(self.rates.multipliers, self.owners.layer_of)
        loss = scaled_step(self.optimizer, base_step, scaling, self.memory, args, kwargs, displaced=self.displaced)
        # A GradScaler calls the step of a fused base even when gradients are infinite, and sets found_inf on the base,
        # which then does nothing, and neither do the rates. With other bases it does not call step at all.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and self.rates.store.mode != "device":
            if not bool(found_inf):
                self.rates.after_step()
        else:
            self.rates.after_step(found_inf)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The rates, and what the base keeps in its groups for each layer."""
        return {**self.rates.state_dict(), "groups": self.memory.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        self.rates.load_state_dict(state_dict)
        self.memory.load_state_dict(state_dict.get("groups", {}), self.optimizer.param_groups)
