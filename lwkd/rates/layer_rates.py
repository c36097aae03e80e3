"""From matched forward passes to the learning-rate multiplier of every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lwkd.nets.passes import check_same_device, check_two_nets, device_of
from lwkd.nets.sharding import check_gatherable, reshard, warn_of_shares
from lwkd.pairing import Pairing
from lwkd.policies import Local, Policy
from lwkd.rates.batch_replay import BatchReplay
from lwkd.rates.device import HostCopy, Written, capturing
from lwkd.rates.distributed import Ranks
from lwkd.rates.pass_matcher import PassMatcher
from lwkd.rates.schedule import Schedule
from lwkd.rates.state import RateStore
from lwkd.rates.statistics import Packet, StatisticsAccumulator
from lwkd.reference import RateState
from lwkd.signals import Signal, default_interval, signal_named
from lwkd.signals.teacher_curvature import TeacherCurvature

FORMAT = 2
"""Version of the state dict's layout."""


class LayerRates:
    """The multiplier of every layer over a training run: measures matched passes, updates the rates, remembers both.

    A measurement made before update k takes effect at update k+1. Attention is measured on all passes before an update,
    averaged by their rows; Jacobian and Hessian are measured on rows of the last one, in :meth:`after_step`, when the
    memory of the training passes is free again. An update without a pass changes no rate.

    Nets on the CPU: the rates of update k+1 are ready when :meth:`after_step` of update k returns. Nets on CUDA:
    nothing in a step waits for the GPU. The statistics of update k are copied to the host asynchronously and applied in
    :meth:`before_step` of update k+1, or earlier by whoever reads, saves, copies or closes, which waits for the copy.
    Rates and results are the same, but for two things: the host cannot know whether a GradScaler will find infinite
    gradients, so that such an update of a fused base counts as an update and drops its measurement (on the CPU it does
    not count, and its passes are averaged with the next ones'); and a calibration (``budget``) takes one measurement
    more.

    Where the optimizer reads its learning rates on the device, it asks for the multipliers there
    (:meth:`before_step`). On a single rank, a signal that is measured on the training passes is then turned into rates
    on the device and nothing is read, so that a whole step can be captured in a CUDA graph; the number of updates
    counts what Python ran, not replays. Otherwise the rates are found on the host, one step late, and only the
    multipliers are written to the device: that waits for nothing, but cannot be captured.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: from :func:`lwkd.pair`.
        signal: name or object.
        policy: from divergences to multipliers; None is ``Local()``, with the signal's momentum.
        every: measure at every so many updates; None is the signal's default for the device of the nets.
        samples: rows of the batch that are measured; None is the signal's default, a share of the batch.
        budget: share of the time that measuring may take; the interval is then found from the library's own timings.
        process_group: the ranks that train this student together; None is all of them.
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
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        for what, count in (("every", every), ("samples", samples)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{what} is {count!r}; expected a whole number of at least 1, or None")
        if budget is not None and (every is not None or not 0 < budget <= 1):
            raise ValueError(
                f"budget is {budget!r} and every {every!r}; expected a budget in (0, 1], which finds it, or an interval"
            )
        self.pairing, self.signal = pairing, signal_named(signal)
        pairing.check_signal(self.signal)
        self.policy = Local(momentum=self.signal.momentum) if policy is None else policy
        chosen = every is not None or budget is not None
        self.schedule = Schedule(every or self.signal.every, budget, chosen=chosen)
        self.samples = samples or self.signal.samples
        self.store = RateStore(self.policy, self.signal, len(pairing))
        self.updates = 0
        self.accumulator = StatisticsAccumulator(len(pairing), self.signal.statistics)
        self._pending: tuple[HostCopy, Packet] | None = None  # statistics that are being copied to the host
        self._on_host: str | None = None  # why the multipliers are read by the host
        self._nets: tuple[nn.Module, nn.Module] | None = None
        self._matcher: PassMatcher | None = None
        self._replay: BatchReplay | None = None
        self._passes: Counter[str] = Counter()  # those that were counted until close()
        self.ranks = Ranks(process_group)
        self.watch(student, teacher)

    # The nets

    def watch(
        self, student: nn.Module, teacher: nn.Module, process_group: distributed.ProcessGroup | None = None
    ) -> None:
        """Attach to these nets (again, after a copy); both must fit the pairing.

        Raises:
            NotImplementedError: the signal makes passes of its own, and parameters are sharded, not by ``fully_shard``.
            ValueError: it does, and student and teacher are one module.
            RuntimeError: the process group was lost in a pickle, and none is given.
        """
        self.pairing.check(student, teacher)
        for whose, net in (("student", student), ("teacher", teacher)):
            reshard(net)
            warn_of_shares(net, whose)
        if self.signal.replays:
            check_two_nets(student, teacher, f"the {self.signal.name} signal, which makes passes of its own,")
            check_gatherable(student, "student")
            check_gatherable(teacher, "teacher")
        ranks = self.ranks if process_group is None else Ranks(process_group)
        if ranks.lost:
            raise RuntimeError(
                "this optimizer had a process_group, which a pickle does not hold: call watch(student, teacher, "
                "process_group=...) with that of the ranks that train this student together"
            )
        self.ranks = self.schedule.ranks = ranks
        self.close()
        self._nets = student, teacher
        if self.signal.replays:
            self._replay = BatchReplay(self.signal, student, teacher, self.pairing)
        self._matcher = PassMatcher(
            student,
            teacher,
            self.pairing,
            source=self.signal.source,
            samples=self.samples,
            on_match=self._on_match,
            due=lambda ahead: self.schedule.due(self.updates + ahead),
        )
        self.locate()

    def close(self) -> None:
        """Remove the hooks; rates stay as they are."""
        self.flush()
        if self._matcher is not None:
            self._passes = self.passes
            self._matcher.close()
        self._matcher = self._nets = self._replay = None

    @property
    def watching(self) -> bool:
        """Whether hooks are in place: False after :meth:`close`, and in a copy."""
        return self._matcher is not None

    @property
    def idle(self) -> bool:
        """Whether nobody called the student with gradients since the last step."""
        return self._matcher is None or self._matcher.idle

    @property
    def student(self) -> nn.Module | None:
        """The student that is watched; None after :meth:`close`, and in a copy."""
        return None if self._nets is None else self._nets[0]

    def locate(self) -> torch.device:
        """The device of the student, which may change until it is trained."""
        if self._nets is not None:
            self.device = device_of(self._nets[0])
            self.schedule.keep_time_on(self.device)
            if not self.schedule.chosen:
                self.schedule.every = default_interval(self.signal, self.device)
        return self.device

    # Measuring

    @property
    def due(self) -> bool:
        """Whether the coming update is measured."""
        return self.schedule.due(self.updates)

    def _on_match(self, student: Any, teacher: Any, rows: int) -> Callable[[], None]:
        """A pair of passes: features are measured now, inputs are kept for the replay after the update.

        Returns what makes the pair count, once it is certain that the two belong together.
        """
        if capturing():
            self._check_capturable(self._on_host)
        assert self._nets is not None
        if self._replay is not None:
            check_same_device(*self._nets, *(device_of(net) for net in self._nets))
            return partial(self._replay.remember, student, teacher, rows, Written(self.device))
        check_same_device(*self._nets, student[0].device, teacher[0].device)
        with self.schedule.measuring():
            if rows < student[0].shape[0]:
                student, teacher = [f[:rows] for f in student], [f[:rows] for f in teacher]
            statistics = self.signal.measure(student, teacher)
            return partial(self.accumulator.add, statistics, rows, Written(statistics.device))

    def begin_step(self) -> None:
        """The base's step begins: passes from now on may be those of its closure."""
        if self._matcher is not None:
            self._matcher.begin_step()

    def after_step(self, found_inf: Tensor | None = None) -> None:
        """After an update: what was measured before it becomes the rates of the next one.

        Args:
            found_inf: scalar tensor; where it is nonzero the gradients were infinite, and the measurement is dropped.
        """
        measured: bool | None = False
        try:
            if self.due:
                if self._matcher is not None:
                    self._matcher.confirm()
                replaying = nullcontext() if self._replay is None else self._replaying(self._replay)
                with replaying, self.schedule.measuring():
                    measured = self._finish_measurement(found_inf)
        finally:
            if self._replay is not None:
                self._replay.forget()
            if self._matcher is not None:
                self._matcher.end_step()
                if self.due and measured is not None:
                    self._matcher.count_step(measured)
            self.schedule.end_update(self.updates, measured)
            self.updates += 1

    @contextmanager
    def _replaying(self, replay: BatchReplay) -> Iterator[None]:
        """Inside, the nets can make passes: sharded parameters are whole, and the signal has checked the nets."""
        with ExitStack() as whole:
            if replay.sharded:
                with self.schedule.measuring():
                    whole.enter_context(replay.gathered(self.ranks))
            replay.check(self.updates)
            yield

    def _finish_measurement(self, found_inf: Tensor | None) -> bool | None:
        """Whether anything was measured, on whichever rank; None while that is being copied to the host."""
        if self._replay is not None:
            if self.teacher is not None and self._nets is not None:
                self.teacher.follow(self._nets[1])
            found = self._replay.measure(self.updates, None if self.teacher is None else self.teacher.at_hand)
            if found is not None:
                self.accumulator.add(*found)
        if self.store.mode == "device":
            mean = self.accumulator.mean(self.device)
            if mean is not None:
                self.store.update_on_device(mean, found_inf)
            return mean is not None
        ranks, changed = self.ranks if self.watching else None, None if self.teacher is None else self.teacher.moving
        packet = self.accumulator.packet(self.device, found_inf, ranks, changed=changed)
        if packet is None:
            return False
        copy = HostCopy(packet.values)
        if not copy.deferred:
            return self._apply(packet)
        self._pending = copy, packet
        return None

    def _apply(self, packet: Packet) -> bool:
        """Statistics on the host become the next rates; returns whether there were any."""
        statistics, measured, infinite, changed = self.accumulator.unpacked(packet)
        agreed = self.teacher is None or changed is None or self.teacher.agreed(changed, self.ranks.count)
        if measured and agreed and not infinite:
            self.store.update(statistics)
        return measured

    def flush(self) -> None:
        """Apply the pending measurement, if there is one; waits for its copy."""
        if self._pending is not None:
            copy, packet = self._pending
            packet = packet._replace(values=copy.tensor())
            self._pending = None
            measured = self._apply(packet)
            self.schedule.resolve(measured)
            if self._matcher is not None:
                self._matcher.count_step(measured)

    # Multipliers for a step

    def before_step(self, device: torch.device | None, on_host: str | None) -> None:
        """Before a step: the multipliers are up to date, and lie where the step needs them.

        Args:
            device: where the step reads them; None is the host.
            on_host: why the host reads them, for messages; None where it does not.

        Raises:
            RuntimeError: a CUDA graph is being captured, and this step cannot be; nothing has been changed then.
        """
        if capturing():
            if on_host is None and self._on_host is not None:
                on_host = "the base was changed after its last step, and moves them in a step that is not captured"
            self._check_capturable(on_host)
            return
        self.flush()
        self.store.move(device, alone=self.ranks.count == 1)
        self._on_host = on_host

    def _check_capturable(self, on_host: str | None) -> None:
        """Check that what is done for an update can be part of a CUDA graph.

        Raises:
            RuntimeError: it cannot; says what was found and what to do.
        """
        if self.signal.replays:
            found = f"the {self.signal.name} signal makes passes of its own. Use signal='attention'"
        elif self.schedule.budget is not None or self.schedule.every != 1:
            budget, every = self.schedule.budget, self.schedule.every
            kind = f"budget={budget}" if budget is not None else f"every={every}"
            found = f"found {kind}, and a graph does the same at every replay. Use every=1 and no budget"
        elif self.ranks.count > 1:
            found = f"statistics are summed over {self.ranks.count} ranks, which a graph does not do. Train on one"
        elif getattr(self.policy, "freezes", False):
            found = f"{self.policy!r} changes the backward pass, and a graph does the same at every replay. Use another"
        elif on_host is not None:
            found = f"the host reads the rates: {on_host}. Use a fused or capturable base with a tensor lr on the GPU"
        else:
            return
        raise RuntimeError(
            f"a CUDA graph is being captured; {found}, or capture without lwkd's step. The rates are as they were"
        )

    def count_layers(self, layers: Sequence[int]) -> None:
        """Only these layers have a say where the policy compares layers, from the next measurement on."""
        self.store.count_layers(layers)

    @property
    def multipliers(self) -> list[float] | Tensor:
        """Multiplier in force of each layer: L numbers, or ``(L,)`` on the device that :meth:`before_step` named."""
        return self.store.multipliers

    # Reading

    @property
    def state(self) -> RateState:
        """The state in force, on the device where it is kept."""
        self.flush()
        return self.store.state

    @property
    def teacher(self) -> TeacherCurvature | None:
        """What is remembered of the teacher's curvature."""
        return self.store.teacher

    def by_layer(self, values: Tensor) -> dict[str, float]:
        """Values ``(L,)`` by student layer."""
        return dict(zip(self.pairing.names, values.tolist(), strict=True))

    @property
    def passes(self) -> Counter[str]:
        """The student's forward passes, counted by outcome; see :class:`lwkd.rates.pass_matcher.PassMatcher`."""
        if self._matcher is None:
            return Counter(self._passes)
        passes = Counter(self._matcher.passes)
        if self._replay is not None and self._replay.incomplete:
            passes["incomplete"] += self._replay.incomplete
        return passes

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that a bitwise resume needs: plain values and tensors of the CPU, loadable with ``weights_only=True``."""
        self.flush()
        return {
            **self._identity(),
            "policy": self.policy.state_dict(),
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
            "asks_again": None if self._matcher is None else self._matcher.asks_again,
            **self.accumulator.state_dict(),
            **self.store.state_dict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be equal in the run that saved a state and the one that loads it."""
        return {
            "format": FORMAT,
            "layers": list(self.pairing.names),
            "signal": self.signal.name,
            "measured": self.signal.measured,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if this state belongs to another run; nothing is changed."""
        for what, mine in self._identity().items():
            if state.get(what) != mine:
                raise ValueError(
                    f"rate state has {what} {state.get(what)!r}, expected {mine!r}: it was saved with another "
                    f"{'version' if what == 'format' else 'pairing or signal'}; make the optimizer as it was made then"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Settings (policy, every, samples) are those of this object."""
        self.check_state(state)
        self._pending = None  # of the run that ends here
        self.store.load_state_dict(state)
        self.accumulator.load_state_dict(state)
        self.updates = state["updates"]
        self.schedule.load_state_dict(state["schedule"], self.updates)
        if self._matcher is not None:
            self._matcher.asks_again = state.get("asks_again")

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps the rates and watches nothing: hooks belong to the nets they were put on."""
        self.flush()
        return {**self.__dict__, "_nets": None, "_matcher": None, "_replay": None}
