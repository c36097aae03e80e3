"""One step of the base optimizer in which every layer moves at its own rate: what both forms of the wrapper do."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lwkd.nets.passes import untraced
from lwkd.nets.sharding import local
from lwkd.optimizer.backward_cut import BackwardCut, why_not_cut
from lwkd.optimizer.group_memory import GroupMemory
from lwkd.optimizer.lr_scaling import lr_scaling, why_on_host
from lwkd.optimizer.nested import where_steps_come, with_those_inside
from lwkd.optimizer.ownership import Ownership
from lwkd.optimizer.param_groups import Call, scaled_groups, step_hooks_disabled
from lwkd.optimizer.trial import check_learning_rates, moves_by_displacement
from lwkd.pairing import Pairing
from lwkd.rates import LayerRates


def parameters_in(optimizer: Optimizer) -> list[Tensor]:
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
        optimizer: the base; a step is put around that of :func:`where_steps_come`.
        student: the student.
        teacher: the teacher.
        pairing: which layers, and whose parameters.
        options: those of :class:`lwkd.rates.LayerRates`.

    Raises:
        NotImplementedError: the signal makes passes of its own, and parameters are sharded, not by ``fully_shard``.
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
        # All ranks have to count the same layers, and the one that steps may hold the parameters of its rank only.
        self.holder, self.optimizer = optimizer, where_steps_come(optimizer)
        check_not_layerwise(optimizer)
        check_learning_rates(optimizer)
        self.memory = GroupMemory()
        self.displaced = moves_by_displacement(self.optimizer)
        self.rates = LayerRates(student, teacher, pairing, **options)
        self.owners = Ownership(pairing)
        self.owners.resolve(student)
        self.cut = BackwardCut()
        if not self._holds_student():
            self.rates.close()
            raise ValueError(
                "none of the optimizer's parameters belongs to a paired layer of this student, or to the student at "
                "all: the optimizer was made for another model, or for a copy of it. Make it from student.parameters()."
            )
        self._warn_of_rates_without_effect()
        self._without_rates = False
        self._held = self._held_layers()
        self._prepare()  # a first step that is captured finds the rates where it needs them
        _in_use[self.optimizer] = weakref.ref(self)

    def _holds_student(self) -> bool:
        """Whether the base holds a parameter of the student."""
        return any(map(self.owners.is_students, parameters_in(self.holder)))

    def _held_layers(self) -> set[int]:
        """Layers of which the base holds a parameter."""
        places = (self.owners.places(i, group["params"]) for i, group in enumerate(self.holder.param_groups))
        return {layer for layers in places for layer in layers if layer is not None}

    def _check_strangers(self) -> None:
        """Parameters that are none of the student's have come into the groups: rates may act on less than before.

        Raises:
            RuntimeError: they act on nothing any more; nothing has been changed.

        Warns:
            UserWarning: they act on some layers no more.
        """
        why = (
            "was replaced in the groups after lwkd was given the optimizer, by master copies or by one flat tensor "
            "(ZeRO of DeepSpeed does that)"
        )
        how = (
            "Give lwkd the optimizer whose groups hold the student's own parameters, or train with "
            "DistributedDataParallel, ZeroRedundancyOptimizer or fully_shard"
        )
        if not self._holds_student():
            raise RuntimeError(
                f"no parameter in the groups of this {type(self.optimizer).__name__} is the student's any more: each "
                f"{why}. Rates per layer act on nothing. {how}; close() or detach() goes on without rates"
            )
        before, self._held = self._held, self._held_layers()
        if lost := before - self._held:
            names = ", ".join(self.rates.pairing.names[layer] for layer in sorted(lost))
            warnings.warn(f"what the optimizer held of {names} {why}: their rates do nothing. {how}", stacklevel=6)

    @property
    def freezes(self) -> bool:
        """Whether layers at rate 0 are left out of the backward pass."""
        return getattr(self.rates.policy, "freezes", False)

    def _trained_layers(self) -> list[int]:
        """Layers of which the base holds a parameter that nobody else has frozen."""
        layers: set[int] = set()
        for position, group in enumerate(self.holder.param_groups):
            parameters = group["params"]
            for layer, indices in self.owners.places(position, parameters).items():
                trained = (parameters[i].requires_grad or self.cut.holds(parameters[i]) for i in indices)
                if layer is not None and any(trained):
                    layers.add(layer)
        return sorted(layers)

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

    def watch(
        self, student: nn.Module, teacher: nn.Module, process_group: distributed.ProcessGroup | None = None
    ) -> None:
        """Attach to these nets."""
        self.rates.watch(student, teacher, process_group)
        self.owners.resolve(student)
        _in_use[self.optimizer] = weakref.ref(self)

    def _prepare(self) -> None:
        """The rates are up to date and lie where this step reads them; the layer of every parameter is known."""
        check_learning_rates(self.optimizer)
        groups, device = self.optimizer.param_groups, self.rates.locate()
        on_host = f"{self.rates.policy!r} freezes layers" if self.freezes else why_on_host(groups, device)
        self.rates.before_step(device if on_host is None else None, on_host)
        if self.owners.refresh(self.holder.param_groups, self.rates.student):
            self._check_strangers()
        if self.rates.due:  # nobody asks which layers count in an update without a measurement
            self.rates.count_layers(self._trained_layers())

    @untraced  # the step of the base may be compiled
    def __call__(self, base_step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """One update, after which the rates of the next one are set.

        Args:
            base_step: ``step`` of the base.
            args: for it, as the user gave them: a closure, if there is one, is the first, or called ``closure``.
            kwargs: as ``args``.

        Returns:
            What the base returns.
        """
        with self.around(args, kwargs) as (args, kwargs), step_hooks_disabled(self.optimizer):
            return base_step(*args, **kwargs)

    @contextlib.contextmanager
    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Around a step of the base, which is called with what this yields: see :meth:`__call__`."""
        if self._makes_states():
            yield args, kwargs
            return
        self._check_not_joined()
        self._warn_of_missing_rates()
        self._prepare()
        self.rates.begin_step()
        if args == (None,):
            args = ()
        if kwargs.get("closure", 0) is None:  # a base without closures is stepped by those who always name one
            kwargs = {name: value for name, value in kwargs.items() if name != "closure"}
        multipliers = self.rates.multipliers
        scaling, places_of = lr_scaling(multipliers), self.owners.places
        with scaled_groups(
            self.optimizer, scaling, places_of, self.memory, args, kwargs, displaced=self.displaced
        ) as call:
            yield call
        # A GradScaler calls the step of a fused base even when gradients are infinite, and sets found_inf on the base,
        # which then does nothing, and neither do the rates. With other bases it does not call step at all.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and self.rates.store.mode != "device":
            if not bool(found_inf):
                self.rates.after_step()
        else:
            self.rates.after_step(found_inf)
        # By the rates of this step, not of the next one, which are known later on CUDA: both do the same then.
        if self.freezes and self.rates.watching:
            self._leave_out({layer for layer, multiplier in enumerate(multipliers) if multiplier == 0})

    def _leave_out(self, layers: set[int]) -> None:
        """These layers, and no others, are left out of the backward pass from now on."""
        self.cut.follow(
            layers,
            parameters_in(self.holder),
            self.owners.layer_of,
            self.rates.pairing.names,
            lambda: why_not_cut(self.rates.student, self.rates.ranks.count),
        )

    def close(self) -> None:
        """Watch no net any more; every layer is in the backward pass again, at the rate that it has."""
        self.rates.close()
        self.cut.restore()

    def _check_not_joined(self) -> None:
        """Check that no rank may run out of batches before the others, which would wait for its sum.

        Raises:
            RuntimeError: the student is inside ``join()``; nothing has been changed.
        """
        if self.rates.ranks.count == 1:
            return
        config = getattr(self.rates.student, "_join_config", None)
        if config is not None and config.enable:
            raise RuntimeError(
                f"the student is inside join(), in which {self.rates.ranks.count} ranks make different numbers of "
                "steps, and lwkd sums statistics over all of them in every step. Leave join() out and give all ranks "
                "as many batches, the last of which may have fewer rows: DistributedSampler, or drop_last=True"
            )

    def _makes_states(self) -> bool:
        """Whether this is no update: torch.distributed.checkpoint steps once at rates of 0, to have states to load.

        It does so for a base without a state, between updates, with gradients that are all zero. Every rank answers
        alike: one that takes part in no sum would keep the others waiting.
        """
        if self.optimizer.state or not self.rates.idle:
            return False
        rates = [group["lr"] for group in self.optimizer.param_groups]
        on_host = all(not isinstance(rate, Tensor) or rate.device.type == "cpu" for rate in rates)
        if not on_host or any(rates):
            return False
        trained = [parameter for parameter in parameters_in(self.optimizer) if parameter.requires_grad]
        gradients = [local(p.grad) for p in trained if p.grad is not None and not p.grad.is_sparse]
        return len(gradients) == len(trained) and not any(bool(gradient.any()) for gradient in gradients)

    # What is saved

    def note_load(self) -> None:
        """The base was given a state. If its rates do not come too before the next step, that step says so."""
        self._without_rates = self.rates.updates == 0 and bool(self.optimizer.state)

    def _warn_of_missing_rates(self) -> None:
        if self._without_rates:
            warnings.warn(
                "the optimizer was given a saved state, and its rates per layer were not: they start anew, at 1. If "
                "they were saved, load them too: with the state_dict of a LayerwiseOptimizer, or through rate_state",
                stacklevel=6,
            )
        self._without_rates = False

    def state_dict(self) -> dict[str, Any]:
        """The rates, and what the base keeps in its groups for each layer."""
        left_out = self.cut.layers(self.owners.layer_of)
        return {**self.rates.state_dict(), "groups": self.memory.state_dict(), "left_out": left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        self.rates.load_state_dict(state_dict)
        self._without_rates = False
        self.memory.load_state_dict(state_dict.get("groups", {}), self.optimizer.param_groups)
        self.owners.refresh(self.holder.param_groups, self.rates.student)
        self.cut.restore()
        if self.freezes and self.rates.watching:
            self._leave_out(set(state_dict.get("left_out", [])))
