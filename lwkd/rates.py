"""From matched passes to the multiplier of every parameter: what stands between features and parameter groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwkd.meter import PassMeter
from lwkd.names import named_parameters
from lwkd.pairing import Pairing
from lwkd.policies import Policy, Relative
from lwkd.reference import RateState
from lwkd.schedule import Schedule
from lwkd.signals import Attention, Hessian, Jacobian, Signal
from lwkd.spread import Spread
from lwkd.watch import PassWatch

FORMAT = 2
SIGNALS: dict[str, type[Signal]] = {"attention": Attention, "jacobian": Jacobian, "hessian": Hessian}


def signal_named(signal: str | Signal) -> Signal:
    """The signal object for a name; an object is returned as it is."""
    if isinstance(signal, str) and signal in SIGNALS:
        return SIGNALS[signal]()
    if isinstance(signal, Signal):
        return signal
    raise ValueError(f"signal is {signal!r}; expected {', '.join(map(repr, SIGNALS))} or an object of lwkd.signals")


class LayerRates:
    """The rate of every layer over a training run: measures passes, updates rates, remembers both.

    A measurement made before update k takes effect at update k+1. Attention is measured on all passes before an update,
    averaged by their rows; Jacobian and Hessian are measured on rows of the last one, in ``advance``, when the memory
    of the training passes is free again. An update without a pass changes no rate.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: from :func:`lwkd.pair`.
        signal: name or object.
        policy: rule; None is ``Relative()``.
        every: measure at every so many updates; None is the signal's default.
        samples: rows of the batch that are measured; None is the signal's default (attention: all).
        budget: share of the time that measuring may take; the interval is then found from the library's own timings.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        signal: str | Signal = "attention",
        policy: Policy | None = None,
        every: int | None = None,
        samples: int | None = None,
        budget: float | None = None,
    ) -> None:
        for what, count in (("every", every), ("samples", samples)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{what} is {count!r}; expected a whole number of at least 1, or None")
        if budget is not None and (every is not None or not 0 < budget <= 1):
            raise ValueError(
                f"budget is {budget!r} and every {every!r}; expected a budget in (0, 1] that chooses the interval, or "
                "an interval, not both"
            )
        self.pairing, self.signal = pairing, signal_named(signal)
        self.policy: Policy = Relative(momentum=self.signal.momentum) if policy is None else policy
        self.schedule = Schedule(every or self.signal.every, budget)
        self.samples = samples or self.signal.samples
        self.state: RateState = self.policy.start(len(pairing), self.signal.statistics)
        self.spread = Spread(len(pairing), self.signal.statistics, getattr(self.policy, "momentum", 0.0))
        self.teacher = self.signal.memory(len(pairing)) if isinstance(self.signal, Hessian) else None
        self.updates = 0
        self._clear_sums()
        self._read_multipliers()
        self._owners: dict[int, tuple[Tensor, int | None]] = {}
        self._student: nn.Module | None = None
        self._watch: PassWatch | None = None
        self._meter: PassMeter | None = None
        self.watch(student, teacher)

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Attach to these nets (again, after a copy); both must fit the pairing."""
        self.pairing.check(student, teacher)
        self.close()
        self._student = student
        if not isinstance(self.signal, Attention):
            self._meter = PassMeter(self.signal, student, teacher, self.pairing)
        self._watch = PassWatch(
            student,
            teacher,
            self.pairing,
            source=self.signal.source,
            samples=self.samples,
            measure=self._take,
            due=lambda: self.due,
        )
        self._resolve_owners()

    def close(self) -> None:
        """Remove the hooks; rates stay as they are."""
        if self._watch is not None:
            self._watch.close()
        self._watch = self._student = self._meter = None

    @property
    def watching(self) -> bool:
        """Whether hooks are in place: False after :meth:`close`, and in a copy."""
        return self._watch is not None

    @property
    def due(self) -> bool:
        """Whether the coming update is measured."""
        return self.schedule.due(self.updates)

    # Measuring

    def _take(self, student: Any, teacher: Any, rows: int) -> None:
        """A matched pair of passes: their features are measured now, their inputs when the update is over."""
        if self._meter is not None:
            self._meter.remember(student, teacher, rows)
        elif isinstance(self.signal, Attention):
            with self.schedule.measuring():
                if self.samples is not None:
                    student, teacher = [f[:rows] for f in student], [f[:rows] for f in teacher]
                self._add(self.signal.measure(student, teacher), rows)

    def _add(self, statistics: Tensor, rows: int) -> None:
        self._sums += rows * statistics.to(self._sums)
        self._rows += rows

    def _clear_sums(self) -> None:
        self._sums = torch.zeros(len(self.pairing), self.signal.statistics, dtype=torch.float64)
        self._rows = torch.zeros((), dtype=torch.float64)

    def _sum_over_ranks(self) -> None:
        # At every due update, passes or none: a rank must never wait for one that saw no reason to take part.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            together = torch.cat([self._sums.flatten(), self._rows.view(1)])
            dist.all_reduce(together)
            self._sums, self._rows = together[:-1].view_as(self._sums), together[-1]

    def advance(self) -> None:
        """After an update: what was measured before it becomes the rates of the next one."""
        measured = False
        measured = False
        try:
            if self.due:
                if self._meter is not None:
                    self._meter.check(self.updates)
                with self.schedule.measuring():
                    measured = self._finish_measurement()
        finally:
            if self._meter is not None:
                self._meter.forget()
            if self._watch is not None and self.due:
                self._watch.end_step(measured)
            self.schedule.end_update(self.updates, measured)
            self.updates += 1

    def _finish_measurement(self) -> bool:
        """Statistics of all passes and ranks → the state's next average, divergences and multipliers."""
        if self._meter is not None:
            found = self._meter.measure(self.updates, None if self.teacher is None else self.teacher.at_hand)
            if found is not None:
                self._add(*found)
        if self.watching:
            self._sum_over_ranks()
        if not bool(self._rows > 0):
            return False
        statistics = self._sums / self._rows
        if self.teacher is not None:
            statistics = self.teacher.fold(statistics)
        before = self.state
        self.state = self.policy.update(before, statistics.float(), self.signal.ratio)
        if self._meter is not None and int(self.state.counts[0]) > int(before.counts[0]):
            self.spread.update(statistics, before.average)
        self._read_multipliers()
        self._clear_sums()
        return True

    # Reading

    def _read_multipliers(self) -> None:
        self._multipliers: list[float] = self.state.multipliers.tolist()

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier in force, by student layer."""
        return dict(zip(self.pairing.names, self._multipliers, strict=True))

    @property
    def divergences(self) -> dict[str, float]:
        """Averaged divergence, by student layer; 0 before the first measurement."""
        return dict(zip(self.pairing.names, self.state.divergences.tolist(), strict=True))

    @property
    def standard_errors(self) -> dict[str, float]:
        """Standard error of the averaged divergence, by student layer; NaN where it is not known."""
        known = None
        if self.teacher is not None:
            known = torch.stack([torch.zeros_like(self.teacher.stderr), self.teacher.stderr], dim=1)
        found = self.spread.stderr(self.state.average, self.signal.divergence, known)
        return dict(zip(self.pairing.names, found.tolist(), strict=True))

    @property
    def measured(self) -> int:
        """How many measurements have set rates."""
        return int(self.state.counts[0])

    @property
    def skipped(self) -> int:
        """How many measurements were NaN, infinite or all zero, and left the rates as they were."""
        return int(self.state.counts[1])

    @property
    def passes(self) -> Counter[str]:
        """What became of the student's passes; see :class:`lwkd.watch.PassWatch`."""
        return Counter() if self._watch is None else Counter(self._watch.passes)

    # Parameters

    def _resolve_owners(self) -> None:
        if self._student is None:
            return
        owners = self.pairing.owners()
        resolved: dict[int, tuple[Tensor, int | None]] = {}
        for name, parameter in named_parameters(self._student).items():
            layer, known = owners.get(name), resolved.get(id(parameter), (parameter, None))[1]
            # A tied parameter belongs to the first of its segments.
            first = layer if known is None else known if layer is None else min(layer, known)
            resolved[id(parameter)] = (parameter, first)
        self._owners = resolved

    def multiplier_of(self, parameter: Tensor) -> float:
        """Multiplier of a parameter; 1 for those that no pair owns, and for those that are not the student's."""
        _, layer = self._owners.get(id(parameter), (None, None))
        return 1.0 if layer is None else self._multipliers[layer]

    def refresh(self, parameters: Iterable[Tensor]) -> None:
        """Find owners by name again if a parameter object is new (wrappers replace them); keeps unknown ones at 1."""
        stepped = list(parameters)
        if any(id(p) not in self._owners for p in stepped):
            self._resolve_owners()
            for parameter in stepped:
                self._owners.setdefault(id(parameter), (parameter, None))

    def owns_any(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of these parameters belongs to a pair."""
        return any(self._owners.get(id(p), (p, None))[1] is not None for p in parameters)

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that a bitwise resume needs: plain values and tensors, loadable with ``weights_only=True``."""
        return {
            "format": FORMAT,
            "layers": list(self.pairing.names),
            "signal": self.signal.name,
            "policy": self.policy.state_dict(),
            "measured": self.signal.measured,
            "schedule": self.schedule.state_dict(),
            "spread": self.spread.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "updates": self.updates,
            "sums": self._sums.clone(),
            "rows": self._rows.clone(),
            **{name: tensor.clone() for name, tensor in self.state._asdict().items()},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if this state belongs to another run; nothing is changed."""
        for what, mine in (
            ("format", FORMAT),
            ("layers", list(self.pairing.names)),
            ("signal", self.signal.name),
            ("measured", self.signal.measured),
        ):
            if state.get(what) != mine:
                raise ValueError(
                    f"rate state has {what} {state.get(what)!r}, expected {mine!r}: it was saved with another "
                    f"{'version' if what == 'format' else 'pairing or signal'}; make the optimizer as it was made then"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Settings (policy, every, samples) are those of this object."""
        self.check_state(state)
        self.state = RateState(**{name: state[name].clone() for name in RateState._fields})
        self._sums, self._rows = state["sums"].clone(), state["rows"].clone()
        self.updates = state["updates"]
        self.schedule.load_state_dict(state["schedule"], self.updates)
        self.spread.load_state_dict(state["spread"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self._read_multipliers()

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps rates and owners, and watches nothing: hooks belong to the nets they were put on."""
        owners = list(self._owners.values())
        return {**self.__dict__, "_student": None, "_watch": None, "_meter": None, "_owners": owners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owners = {id(parameter): (parameter, layer) for parameter, layer in state["_owners"]}
