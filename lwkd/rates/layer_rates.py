"""From matched passes to the multiplier of every parameter: what stands between features and parameter groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from lwkd.nets.passes import device_of, on_one_device
from lwkd.optimizer.ownership import Ownership
from lwkd.optimizer.param_groups import Group, LrScaling
from lwkd.pairing.pairs import Pairing
from lwkd.policies import Policy, Relative
from lwkd.rates.device import HostCopy, capturing
from lwkd.rates.meter import BatchReplay
from lwkd.rates.pass_matcher import PassMatcher
from lwkd.rates.schedule import Schedule
from lwkd.rates.state import RateStore, check_captured, why_on_host
from lwkd.rates.statistics import StatisticsAccumulator
from lwkd.reference import RateState
from lwkd.signals import Attention, Signal, signal_named
from lwkd.signals.hessian import TeacherCurvature

FORMAT = 2


class LayerRates:
    """The rate of every layer over a training run: measures passes, updates rates, remembers both.

    A measurement made before update k takes effect at update k+1. Attention is measured on all passes before an update,
    averaged by their rows; Jacobian and Hessian are measured on rows of the last one, in ``advance``, when the memory
    of the training passes is free again. An update without a pass changes no rate.

    Nets on the CPU: the rates of update k+1 are ready when ``step`` k returns. Nets on CUDA: nothing in a step waits
    for the GPU. What was measured before update k is copied to the host behind it, and is taken in at the latest at the
    beginning of step k+1; reading rates, saving, copying and closing take it in (and so wait for it) earlier. Rates and
    results are the same, but for two things: the host cannot know whether a GradScaler will find infinite gradients, so
    that such an update of a fused base counts as an update and drops its measurement (on the CPU it does not count, and
    its passes are averaged with the next ones'); and a calibration (``budget``) takes one measurement more.

    Where every learning rate of the base is a CUDA tensor and the base fused or capturable, rates stay on the device:
    see :class:`lwkd.rates.state.RateStore`. The attention signal is then measured and turned into rates there, and
    nothing is read at all, so that a whole step can be captured in a CUDA graph; the number of updates counts what
    Python ran, not replays. With the other signals, or several ranks, the rates are still found on the host, one step
    late, and only the multipliers are written to the device: that waits for nothing, but cannot be captured.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: from :func:`lwkd.pair`.
        signal: name or object.
        policy: rule; None is ``Relative()``.
        every: measure at every so many updates; None is the signal's default.
        samples: rows of the batch that are measured; None is the signal's default (attention: all).
        budget: share of the time that measuring may take; the interval is then found from the library's own timings.
        fused_step: whether the optimizer's step reads device multipliers whatever its groups are.
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
        fused_step: bool = False,
    ) -> None:
        for what, count in (("every", every), ("samples", samples)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{what} is {count!r}; expected a whole number of at least 1, or None")
        if budget is not None and (every is not None or not 0 < budget <= 1):
            raise ValueError(
                f"budget is {budget!r} and every {every!r}; expected a budget in (0, 1], which finds it, or an interval"
            )
        self.pairing, self.signal, self.fused_step = pairing, signal_named(signal), fused_step
        self.policy = Relative(momentum=self.signal.momentum) if policy is None else policy
        self.schedule = Schedule(every or self.signal.every, budget)
        self.samples = samples or self.signal.samples
        self.residence = RateStore(self.policy, self.signal, len(pairing))
        self.updates = 0
        self.accumulation = StatisticsAccumulator(len(pairing), self.signal.statistics)
        self.owners = Ownership(pairing)
        self._arrival: HostCopy | None = None
        self._on_host: str | None = None  # why the rates are read by the host
        self._nets: tuple[nn.Module, nn.Module] | None = None
        self._watch: PassMatcher | None = None
        self._meter: BatchReplay | None = None
        self.watch(student, teacher)

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Attach to these nets (again, after a copy); both must fit the pairing."""
        self.pairing.check(student, teacher)
        self.close()
        self._nets = student, teacher
        if not isinstance(self.signal, Attention):
            self._meter = BatchReplay(self.signal, student, teacher, self.pairing)
        self._watch = PassMatcher(
            student,
            teacher,
            self.pairing,
            source=self.signal.source,
            samples=self.samples,
            measure=self._take,
            due=lambda: self.due,
        )
        self.owners.resolve(student)
        self._locate()

    def close(self) -> None:
        """Remove the hooks; rates stay as they are."""
        self.settle()
        if self._watch is not None:
            self._watch.close()
        self._watch = self._nets = self._meter = None

    @property
    def watching(self) -> bool:
        """Whether hooks are in place: False after :meth:`close`, and in a copy."""
        return self._watch is not None

    @property
    def due(self) -> bool:
        """Whether the coming update is measured."""
        return self.schedule.due(self.updates)

    def _locate(self) -> None:
        """Where the nets are, which may change until they are trained."""
        if self._nets is not None:
            self.device = device_of(self._nets[0])
            self.schedule.keep_time_on(self.device)

    # Measuring

    def _take(self, student: Any, teacher: Any, rows: int) -> None:
        """A matched pair of passes: their features are measured now, their inputs when the update is over."""
        if capturing():
            check_captured(self.signal, self.schedule, self._on_host)
        assert self._nets is not None
        if self._meter is not None:
            on_one_device(*self._nets, *(device_of(net) for net in self._nets))
            self._meter.remember(student, teacher, rows)
        elif isinstance(self.signal, Attention):
            on_one_device(*self._nets, student[0].device, teacher[0].device)
            with self.schedule.measuring():
                if self.samples is not None:
                    student, teacher = [f[:rows] for f in student], [f[:rows] for f in teacher]
                self.accumulation.add(self.signal.measure(student, teacher), rows)

    def advance(self, found_inf: Tensor | None = None) -> None:
        """After an update: what was measured before it becomes the rates of the next one.

        Args:
            found_inf: scalar tensor; where it is nonzero the gradients were infinite, and the measurement is dropped.
        """
        measured: bool | None = False
        try:
            if self.due:
                if self._meter is not None:
                    self._meter.check(self.updates)
                with self.schedule.measuring():
                    measured = self._finish_measurement(found_inf)
        finally:
            if self._meter is not None:
                self._meter.forget()
            if self._watch is not None and self.due:
                self._watch.end_step()
                if measured is not None:
                    self._watch.note(measured)
            self.schedule.end_update(self.updates, measured)
            self.updates += 1

    def _finish_measurement(self, found_inf: Tensor | None) -> bool | None:
        """Whether there was anything to measure, on whichever rank; None where that is on its way to the host."""
        if self._meter is not None:
            found = self._meter.measure(self.updates, None if self.teacher is None else self.teacher.at_hand)
            if found is not None:
                self.accumulation.add(*found)
        if self.residence.leads:
            mean = self.accumulation.mean(self.device)
            if mean is not None:
                self.residence.update_there(mean, found_inf)
            return mean is not None
        packet = self.accumulation.packet(self.device, found_inf, alone=not self.watching)
        if packet is None:
            return False
        self._arrival = HostCopy(packet)
        return None if self._arrival.deferred else self._take_in()

    def _take_in(self) -> bool:
        """What has arrived becomes the state's next average, divergences and multipliers."""
        assert self._arrival is not None
        statistics, measured, infinite = self.accumulation.unpacked(self._arrival.tensor())
        self._arrival = None
        if measured and not infinite:
            self.residence.update(statistics)
        return measured

    def settle(self) -> None:
        """Take in the measurement that is on its way, if there is one; waits until it is there."""
        if self._arrival is not None:
            measured = self._take_in()
            self.schedule.arrived(measured)
            if self._watch is not None:
                self._watch.note(measured)

    # Rates for a step

    def refresh(self, groups: list[Group]) -> None:
        """Before a step of these groups: rates are up to date, where the step needs them, and owners are known.

        Parameters that are new (wrappers replace them) are found again by name; unknown ones keep 1.

        Raises:
            RuntimeError: a CUDA graph is being captured, and this step cannot be; nothing has been changed then.
        """
        self._locate()
        on_host = why_on_host(groups, self.device, self.fused_step)
        if capturing():
            if on_host is None and self._on_host is not None:
                on_host = "the base was changed after its last step, and moves them in a step that is not captured"
            check_captured(self.signal, self.schedule, on_host)
        else:
            self.settle()
            self.residence.move(self.device if on_host is None or self.fused_step else None)
            self._on_host = on_host
        student = None if self._nets is None else self._nets[0]
        self.owners.refresh((parameter for group in groups for parameter in group["params"]), student)

    @property
    def scale(self) -> LrScaling:
        """How the coming step scales the learning rates."""
        return self.residence.scale(self.owners.layer_of)

    # Reading

    @property
    def state(self) -> RateState:
        """The state in force, on the device where it is kept."""
        self.settle()
        return self.residence.state

    @property
    def teacher(self) -> TeacherCurvature | None:
        """What is remembered of the teacher's curvature."""
        return self.residence.host.teacher

    def by_layer(self, values: Tensor) -> dict[str, float]:
        """Values ``(L,)`` by student layer."""
        return dict(zip(self.pairing.names, values.tolist(), strict=True))

    @property
    def measured(self) -> int:
        """How many measurements have set rates."""
        return int(self.state.counts[0])

    @property
    def passes(self) -> Counter[str]:
        """What became of the student's passes; see :class:`lwkd.rates.pass_matcher.PassMatcher`."""
        return Counter() if self._watch is None else Counter(self._watch.passes)

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that a bitwise resume needs: plain values and tensors of the CPU, loadable with ``weights_only=True``."""
        self.settle()
        return {
            "format": FORMAT,
            "layers": list(self.pairing.names),
            "signal": self.signal.name,
            "policy": self.policy.state_dict(),
            "measured": self.signal.measured,
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
            **self.accumulation.state_dict(),
            **self.residence.state_dict(),
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
        self._arrival = None  # of the run that ends here
        self.residence.load_state_dict(state)
        self.accumulation.load_state_dict(state)
        self.updates = state["updates"]
        self.schedule.load_state_dict(state["schedule"], self.updates)

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps rates and owners, and watches nothing: hooks belong to the nets they were put on."""
        self.settle()
        return {**self.__dict__, "_nets": None, "_watch": None, "_meter": None}
