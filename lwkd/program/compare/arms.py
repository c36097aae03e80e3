"""Rates of the arms that no teacher sets: controls that repeat another run's, and rivals without a teacher.

Legend: ``L`` segments in execution order; parameters behind the last pair are segment L, the tail; ``U`` updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.names import named_parameters
from lwkd.program.compare.recipe import Arm
from lwkd.program.seeds import seed_of


class Rates(Protocol):
    """Multipliers of the learning rate, one a parameter group."""

    def before(self, update: int) -> Sequence[float]:
        """Multipliers of an update (counted from 0), when gradients are there and the step is not done."""


def segments(student: nn.Module, pairing: lwkd.Pairing) -> list[list[nn.Parameter]]:
    """Parameters of the L segments, and of the tail."""
    owners = pairing.owners()
    found: list[list[nn.Parameter]] = [[] for _ in range(len(pairing) + 1)]
    for name, parameter in named_parameters(student).items():
        found[owners.get(name, len(pairing))].append(parameter)
    return found


class Replayed:
    """Rates (U, L) that another run had; the tail has rate 1.

    >>> Replayed(torch.tensor([[1.0, 1.0], [0.5, 1.5]])).before(1)
    [0.5, 1.5, 1.0]
    """

    def __init__(self, rows: Tensor):
        self.rows = rows.tolist()

    def before(self, update: int) -> Sequence[float]:
        """The row of this update."""
        return [*self.rows[update], 1.0]


def control(arm: Arm, rates: Tensor, seed: int) -> Replayed:
    """What a control repeats of the rates (U, L) of a layer-wise run.

    ``mean``: every segment has the mean over segments, update by update. ``profile`` and ``other-profile``: every
    segment has its mean over the updates (of the run of the same seed, or of another one). ``shuffled``: the
    segments' rates are dealt out to other segments, no segment keeps its own.
    """
    if arm.rates == "mean":
        return Replayed(rates.mean(1, keepdim=True).expand_as(rates))
    if arm.rates == "shuffled":
        return Replayed(rates[:, derangement(rates.shape[1], seed)])
    return Replayed(rates.mean(0, keepdim=True).expand_as(rates))


def derangement(count: int, seed: int) -> list[int]:
    """A random order in which nothing stands at its own place; a single thing stays.

    >>> derangement(2, seed=5), sorted(derangement(6, seed=1))
    ([1, 0], [0, 1, 2, 3, 4, 5])
    """
    generator = torch.Generator().manual_seed(seed_of(seed, 3))
    while count > 1:
        order = torch.randperm(count, generator=generator).tolist()
        if all(place != thing for place, thing in enumerate(order)):
            return order
    return list(range(count))


class Fixed:
    """The same multipliers at every update."""

    def __init__(self, multipliers: Sequence[float]):
        self.multipliers = list(multipliers)

    def before(self, update: int) -> Sequence[float]:
        """As given."""
        return self.multipliers


def layer_decay(segments: int, decay: float) -> Fixed:
    """A segment has ``decay`` times the rate of the one behind it; the tail has 1.

    Source: discriminative fine-tuning, Howard & Ruder 2018, section 3.2.

    >>> layer_decay(2, 0.5).multipliers
    [0.25, 0.5, 1.0]
    """
    return Fixed([decay ** (segments - i) for i in range(segments + 1)])


class AutoRGN:
    """Rates by the relative gradient norm of each tensor, ‖g‖ / ‖w‖, the largest of them having rate 1.

    Renewed every epoch from the mean over the updates of the epoch before; in the first epoch from its first gradient.

    Source: Auto-RGN, Lee et al. 2023 (arXiv 2210.11466), section 4.

    Args:
        tensors: one a parameter group.
        updates_per_epoch: after how many updates rates are renewed.
    """

    def __init__(self, tensors: Sequence[Tensor], updates_per_epoch: int):
        self.tensors, self.updates_per_epoch = tensors, updates_per_epoch
        self.sums = torch.zeros(len(tensors))
        self.multipliers = [1.0] * len(tensors)

    def before(self, update: int) -> Sequence[float]:
        """Adds this update's gradients, and renews the rates at the start of an epoch."""
        begins = update % self.updates_per_epoch == 0
        if begins and update:
            self._renew()
        self.sums += torch.stack([_relative_norm(tensor) for tensor in self.tensors])
        if update == 0:
            self._renew()
        return self.multipliers

    def _renew(self) -> None:
        largest = self.sums.nan_to_num(posinf=0.0).max()
        if largest > 0:  # without any gradient the rates stay
            self.multipliers = (self.sums / largest).clamp(max=1.0).tolist()
        self.sums.zero_()


def _relative_norm(tensor: Tensor) -> Tensor:
    """Infinite where all weights are 0 (a bias at its start): they get the largest rate."""
    if tensor.grad is None:
        return torch.zeros(())
    ratio = torch.linalg.vector_norm(tensor.grad) / torch.linalg.vector_norm(tensor.detach())
    return ratio.nan_to_num(nan=0.0, posinf=torch.inf)
