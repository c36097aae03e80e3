"""A base is tried before it is used: do its steps follow the learning rates of parameter groups?

Copies of the base with a few small parameters, its own options and a cut of its state take the same steps with one
explicit group a layer and as :mod:`lwkd.optimizer.param_groups` splits them. What does not come out the same, or does
not depend on the learning rate, is refused with the reason. The base itself is never stepped.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lwkd.optimizer.group_memory import GroupMemory
from lwkd.optimizer.lr_scaling import HostScaling
from lwkd.optimizer.ownership import Places, places_by_layer
from lwkd.optimizer.param_groups import scaled_groups, step_hooks_disabled
from lwkd.optimizer.small_copy import Toy, small_copy, toys_of

STEPS = ((1.0, 1.0), (1.5, 1.0), (0.5, 1.25), (1.0, 1.25), (1.0, 1.0), (1.5, 0.75), (0.5, 1.0), (1.0, 1.5))
"""Multipliers of two layers at every step of a trial: together, apart, and together again."""

TOLERANCE = 1e-3
"""Largest deviation between two trials, as a share of the distance that a parameter moves.

Sums may be taken in another order, and some bases convert half precision.
"""

Way = list[list[Tensor]]
"""Values of a trial's parameters after every step."""


class BaseRefusedError(ValueError):
    """A base whose steps cannot be scaled by layer."""

    def __init__(self, optimizer: Optimizer, why: str, remedy: str) -> None:
        super().__init__(f"{_name(optimizer)} cannot be given a learning rate per layer: {why}. {remedy}")


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def check_learning_rates(optimizer: Optimizer) -> None:
    """Check that every group has a learning rate that can be multiplied.

    Raises:
        ValueError: one has none; names the group.
    """
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if isinstance(rate, Tensor) or (isinstance(rate, (int, float)) and not isinstance(rate, bool)):
            continue
        found = f"is {rate!r}" if "lr" in group else "is missing"
        raise BaseRefusedError(
            optimizer,
            f"the learning rate (lr) of parameter group {index} {found}; expected a number or a tensor",
            "If it makes step sizes of its own, switch them off and give it a number "
            "(Adafactor: lr=1e-3, relative_step=False), or use another optimizer",
        )


def moves_by_displacement(optimizer: Optimizer) -> bool:
    """Whether a base takes one group only, so that layers are scaled after its step: ``p_old + m (p_new − p_old)``.

    That is the definition for LBFGS, whose step looks at all parameters together. For others it has to be what an
    optimizer for each layer would do. False: the base's groups are split by rate.

    Args:
        optimizer: the base.

    Raises:
        ValueError: its steps do not follow the learning rates of its groups; says why, and what to do.

    Warns:
        UserWarning: it could not be tried on small tensors; its groups are split by rate all the same.
    """
    check_learning_rates(optimizer)
    if isinstance(optimizer, LBFGS):
        return True
    with _undisturbed(optimizer):
        try:
            trial = Trial.that_runs(optimizer)
        except Exception as error:  # whatever a base that is not ours raises
            trial, found = None, error
        if trial is not None:
            return trial.judge()
    warnings.warn(
        f"lwkd could not try {_name(optimizer)} on small tensors ({type(found).__name__}: {found}), so that nobody "
        "knows whether its steps follow the learning rates of its parameter groups; they are split by rate all the "
        "same. Compare one step with explicit groups, one a layer, before you trust the rates",
        stacklevel=4,
    )
    return "_params" in vars(optimizer)  # relatives of LBFGS keep a list of their own and look at no group


@contextlib.contextmanager
def _undisturbed(optimizer: Optimizer) -> Iterator[None]:
    """Random numbers and warnings as they were; nothing is compiled."""
    devices = {p.device.index for group in optimizer.param_groups for p in group["params"] if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),  # compiling takes minutes
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


class Trial:
    """Steps of small copies of a base.

    Args:
        optimizer: the base.
        dtype: of the small parameters.
        gradients: dense, sparse, or with the graph that second derivatives need.
        with_closure: step with a closure.
    """

    def __init__(self, optimizer: Optimizer, dtype: torch.dtype, *, gradients: str, with_closure: bool) -> None:
        self.optimizer, self.gradients, self.with_closure = optimizer, gradients, with_closure
        self.toys = toys_of(optimizer, dtype)
        # In one order, together and apart: a base may draw random numbers.
        self.together = [[toy for toy in self._in_order() if toy.group == group] for group in self._numbers()]
        self.apart = [
            part for toys in self.together for layer in (0, 1) if (part := [toy for toy in toys if toy.layer == layer])
        ]

    def _numbers(self) -> range:
        return range(len(self.optimizer.param_groups))

    @classmethod
    def that_runs(cls, optimizer: Optimizer) -> Trial:
        """The first kind of trial in which the base steps at all; raises what the first kind raises."""
        first: Exception | None = None
        for gradients, with_closure in (("dense", False), ("dense", True), ("sparse", False), ("with graph", False)):
            for dtype in (torch.float64, torch.float32):
                trial = cls(optimizer, dtype, gradients=gradients, with_closure=with_closure)
                try:
                    trial.bare = trial.way(trial.together)
                    return trial
                except Exception as error:  # whatever a base that is not ours raises
                    first = first or error
        assert first is not None
        raise first

    bare: Way
    """The base as it is, at its own learning rates."""

    def judge(self) -> bool:
        """Whether layers are scaled by displacement; raises :class:`BaseRefusedError` where neither way is right."""
        explicit, why = self._explicit_groups()
        if explicit is None:
            explicit = self._one_optimizer_a_layer(why)
        self._check_effect(explicit)
        if not why:
            try:
                if self._same(self.way(self.together, scaled=True, as_lwkd=True), explicit):
                    return False
                why = "groups that are split for a step do not move as one explicit group a layer does"
            except Exception as error:
                why = f"it does not step when its groups are split for a step ({type(error).__name__}: {error})"
        if self._same(self.way(self.together, scaled=True, as_lwkd=True, displaced=True), explicit):
            return True
        raise self._refused(f"{why}, and scaling its step afterwards is not the same as a learning rate per layer")

    def _explicit_groups(self) -> tuple[Way | None, str]:
        """One group a layer, each at its learning rate; or why that cannot be the measure."""
        try:
            equal = self.way(self.apart)
        except Exception as error:
            return None, f"it does not step with more parameter groups ({type(error).__name__}: {error})"
        if not self._same(equal, self.bare):
            return None, "its step changes when its parameters are split into more groups, at equal learning rates"
        try:
            return self.way(self.apart, scaled=True), ""
        except Exception as error:
            raise self._refused(
                f"it does not step with groups of different learning rates ({type(error).__name__}: {error})"
            ) from error

    def _one_optimizer_a_layer(self, why: str) -> Way:
        """The measure for a base that does not step with several groups, or steps differently with them."""
        explicit: Way = [[] for _ in self.bare]
        for layer in (0, 1):
            alone = [[toy for toy in toys if toy.layer == layer] for toys in self.together]
            try:
                for step, moved in enumerate(self.way(alone, scaled=True)):
                    explicit[step] += moved
            except Exception as error:
                raise self._refused(f"{why}, nor with some of them alone ({type(error).__name__}: {error})") from error
        return explicit

    def _check_effect(self, explicit: Way) -> None:
        """Check that rates which change from step to step change where parameters go, in every group."""
        for number in self._numbers():
            moved = heard = False
            for index, toy in enumerate(self._in_order()):
                if toy.group == number:
                    start, bare, scaled = self._start(toy), self.bare[-1][index], explicit[-1][index]
                    moved |= not torch.equal(start, bare)
                    heard |= not _near(scaled, bare, start, 1e-6)
            if moved and not heard:
                raise self._refused(
                    f"it does not follow the learning rate of parameter group {number} when that changes from step to "
                    "step",
                    "If it makes step sizes of its own, switch them off (Adafactor: relative_step=False), or use "
                    "another optimizer",
                )

    def _same(self, found: Way, expected: Way) -> bool:
        return all(
            _near(mine, theirs, self._start(toy), TOLERANCE)
            for one, other in zip(found, expected, strict=True)
            for toy, mine, theirs in zip(self._in_order(), one, other, strict=True)
        )

    def _refused(self, why: str, remedy: str = "Use another optimizer, or step it without lwkd") -> BaseRefusedError:
        return BaseRefusedError(self.optimizer, why, remedy)

    def _in_order(self) -> list[Toy]:
        """The small parameters by layer, in which order they are compared."""
        return sorted(self.toys, key=lambda toy: toy.layer)

    def _parameter(self, toy: Toy) -> nn.Parameter:
        """A small parameter with the plain attributes that the base has set on the original."""
        parameter = nn.Parameter(self._start(toy))
        noted = vars(self.optimizer.param_groups[toy.group]["params"][toy.number])
        vars(parameter).update({name: value for name, value in noted.items() if isinstance(value, (int, float, str))})
        return parameter

    def _start(self, toy: Toy) -> Tensor:
        return self._noise(toy, 0)

    def _noise(self, toy: Toy, step: int) -> Tensor:
        """Gradient of a step (from 1), or (0) where the parameter starts."""
        generator = torch.Generator().manual_seed(1000 * (self.toys.index(toy) + 1) + step)
        dtype = torch.complex128 if toy.dtype.is_complex else torch.float64
        noise = torch.randn(toy.shape, dtype=dtype, device="cpu", generator=generator)
        return noise.to(toy.device, toy.dtype)

    def way(
        self, groups: list[list[Toy]], *, scaled: bool = False, as_lwkd: bool = False, displaced: bool = False
    ) -> Way:
        """The steps of a small copy.

        Args:
            groups: the small parameters of each of its groups.
            scaled: at the rates of :data:`STEPS`.
            as_lwkd: not by the learning rates of the groups, but as a step of lwkd does it.
            displaced: then by displacement.
        """
        torch.manual_seed(0)
        parameters = {toy: self._parameter(toy) for toys in groups for toy in toys}
        small = small_copy(self.optimizer, groups, parameters)
        layers = {id(parameter): toy.layer for toy, parameter in parameters.items()}
        ordered = [parameters[toy] for toy in self._in_order() if toy in parameters]
        memory = GroupMemory()
        found: Way = []

        def called(name: str) -> None:
            if callable(getattr(type(small), name, None)):
                getattr(small, name)()

        def step(*args: Any) -> Any:
            return type(small).step(small, *args)

        def places_of(_: int, parameters: list[Tensor]) -> Places:
            return places_by_layer(parameters, lambda parameter: layers[id(parameter)])

        called("train")
        for count, multipliers in enumerate(STEPS):

            def give_gradients(count: int = count) -> Tensor:
                for toy, parameter in parameters.items():
                    gradient = self._noise(toy, count + 1)
                    if self.gradients == "with graph":
                        gradient = gradient + parameter / 2
                    parameter.grad = gradient.to_sparse() if self.gradients == "sparse" and toy.shape else gradient
                return torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)

            give_gradients()
            given = (give_gradients,) if self.with_closure else ()
            if as_lwkd:
                with (
                    scaled_groups(small, HostScaling(multipliers), places_of, memory, given, displaced=displaced) as (
                        args,
                        kwargs,
                    ),
                    step_hooks_disabled(small),
                ):
                    step(*args, **kwargs)
            else:
                if scaled:
                    before = STEPS[count - 1] if count else (1, 1)
                    for group in small.param_groups:
                        layer = layers[id(group["params"][0])]
                        # What the base has made of it counts, if it writes its own learning rate.
                        group["lr"] = group["lr"] * (multipliers[layer] / before[layer])
                with step_hooks_disabled(small):
                    step(*given)
            found.append([parameter.detach().clone() for parameter in ordered])
        called("eval")
        found.append([parameter.detach().clone() for parameter in ordered])
        return found


def _near(one: Tensor, other: Tensor, start: Tensor, tolerance: float) -> bool:
    """Whether two ways from one start end at the same place, but for a share of their length."""
    if not one.numel():
        return True
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    way = (other - start).abs().nan_to_num(0, 0, 0).max()
    return bool((one - other).abs().nan_to_num(0, 0, 0).max() <= tolerance * way)
