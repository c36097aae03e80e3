"""From matched passes to the multiplier of every parameter: what stands between features and parameter groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwkd.features import FeatureWatch
from lwkd.names import named_parameters
from lwkd.pairing import Pairing
from lwkd.policies import Policy, Relative
from lwkd.reference import RateState
from lwkd.signals import Attention

FORMAT = 1


def signal_named(signal: str | Attention) -> Attention:
    """The signal object for a name; an object is returned as it is."""
    if isinstance(signal, Attention):
        return signal
    if signal == "attention":
        return Attention()
    raise ValueError(f"signal is {signal!r}; expected 'attention' or an object of lwkd.signals")


class LayerRates:
    """The rate of every layer over a training run: measures passes, updates rates, remembers both.

    A measurement made before update k takes effect at update k+1. Passes before one update are averaged, weighted by
    their rows; an update without a pass changes no rate.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: from :func:`lwkd.pair`.
        signal: name or object.
        policy: rule; None is ``Relative()``.
        every: measure at every so many updates; None is the signal's default.
        samples: rows of the batch that are measured; None is all.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        signal: str | Attention = "attention",
        policy: Policy | None = None,
        every: int | None = None,
        samples: int | None = None,
    ) -> None:
        for what, count in (("every", every), ("samples", samples)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{what} is {count!r}; expected a whole number of at least 1, or None")
        self.pairing, self.signal = pairing, signal_named(signal)
        self.policy: Policy = Relative() if policy is None else policy
        self.every, self.samples = every or self.signal.every, samples
        self.state: RateState = self.policy.start(len(pairing), self.signal.statistics)
        self.updates = 0
        self._clear_sums()
        self._read_multipliers()
        self._owners: dict[int, tuple[Tensor, int | None]] = {}
        self._student: nn.Module | None = None
        self._watch: FeatureWatch | None = None
        self.watch(student, teacher)

    def watch(self, student: nn.Module, teacher: nn.Module) -> None:
        """Attach to these nets (again, after a copy); both must fit the pairing."""
        self.pairing.check(student, teacher)
        self.close()
        self._student = student
        self._watch = FeatureWatch(
            student, teacher, self.pairing, self._measure, lambda: self.due, raw=self.signal.source == "probabilities"
        )
        self._resolve_owners()

    def close(self) -> None:
        """Remove the hooks; rates stay as they are."""
        if self._watch is not None:
            self._watch.close()
        self._watch = self._student = None

    @property
    def watching(self) -> bool:
        """Whether hooks are in place: False after :meth:`close`, and in a copy."""
        return self._watch is not None

    @property
    def due(self) -> bool:
        """Whether the coming update is measured."""
        return self.updates % self.every == 0

    # Measuring

    def _measure(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        if self.samples is not None:
            student, teacher = [f[: self.samples] for f in student], [f[: self.samples] for f in teacher]
        rows = student[0].shape[0]
        self._sums += rows * self.signal.measure(student, teacher).to(self._sums)
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
        if self.due:
            if self.watching:
                self._sum_over_ranks()
            measured = bool(self._rows > 0)
            if measured:
                statistics = (self._sums / self._rows).float()
                self.state = self.policy.update(self.state, statistics, self.signal.ratio)
                self._read_multipliers()
                self._clear_sums()
            if self._watch is not None:
                self._watch.end_step(measured)
        self.updates += 1

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
    def measured(self) -> int:
        """How many measurements have set rates."""
        return int(self.state.counts[0])

    @property
    def skipped(self) -> int:
        """How many measurements were NaN, infinite or all zero, and left the rates as they were."""
        return int(self.state.counts[1])

    @property
    def passes(self) -> Counter[str]:
        """What became of the student's passes; see :class:`lwkd.features.FeatureWatch`."""
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
            "every": self.every,
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
        ):
            if state.get(what) != mine:
                raise ValueError(
                    f"rate state has {what} {state.get(what)!r}, expected {mine!r}: it was saved with another "
                    f"{'version' if what == 'format' else 'pairing or signal'}; make the optimizer as it was made then"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off. Settings (policy, every) are those of this object."""
        self.check_state(state)
        self.state = RateState(**{name: state[name].clone() for name in RateState._fields})
        self._sums, self._rows = state["sums"].clone(), state["rows"].clone()
        self.updates = state["updates"]
        self._read_multipliers()

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps rates and owners, and watches nothing: hooks belong to the nets they were put on."""
        owners = list(self._owners.values())
        return {**self.__dict__, "_student": None, "_watch": None, "_owners": owners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owners = {id(parameter): (parameter, layer) for parameter, layer in state["_owners"]}
