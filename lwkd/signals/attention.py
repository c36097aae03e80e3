"""The attention signal: distance between attention maps (legend: L layers, B batch, C channels, N map positions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwkd import ops
from lwkd.reference import DivergenceKind, Ratio, Source, divergence_of
from lwkd.signals.signal import RowShare


@dataclass(frozen=True)
class Attention:
    r"""How far the student's attention maps are from the teacher's.

    .. math:: q_n \propto \sum_c |F_{cn}|^p,\qquad e = H(b_1 q + b_2 p) - b_1 H(q) - b_2 H(p)

    Args:
        source: ``"features"``: maps of layer outputs; ``"probabilities"``: layers that return self-attention
            ``(B, heads, N, N)``, or a tuple that carries it behind the feature. Padded positions take no part in maps
            and are no rows (:mod:`lwkd.nets.padding`).
        power: exponent p of the maps, at least 1.
        kind: ``"jsd"`` (nats) or ``"l2"`` (attention transfer).
        betas: weights of student and teacher in the JSD; positive, sum 1.

    Source: arXiv 2407.04871; definitions in :func:`lwkd.reference.attention_divergence`.

    >>> features = [torch.rand(2, 8, 4, 4)]
    >>> Attention().measure(features, features)
    tensor([[0.]])
    """

    source: Source = "features"
    power: float = 2.0
    kind: DivergenceKind = "jsd"
    betas: tuple[float, float] = (0.5, 0.5)
    name: ClassVar[str] = "attention"
    ratio: ClassVar[Ratio] = "attention"
    statistics: ClassVar[int] = 1
    every: ClassVar[int] = 1
    every_on_gpu: ClassVar[int] = 1
    momentum: ClassVar[float] = 0.9
    samples: ClassVar[RowShare] = RowShare(one_in=4, least=8)
    replays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.source not in ("features", "probabilities"):
            raise ValueError(f"source is {self.source!r}; expected 'features' or 'probabilities'")
        if self.kind not in ("jsd", "l2"):
            raise ValueError(f"kind is {self.kind!r}; expected 'jsd' or 'l2'")
        if not 1 <= self.power < float("inf"):
            raise ValueError(f"power is {self.power}; expected a finite number of at least 1")
        b1, b2 = self.betas
        if b1 <= 0 or b2 <= 0 or abs(b1 + b2 - 1) > 1e-6:
            raise ValueError(f"betas are {self.betas}; expected two positive weights with sum 1")

    @property
    def measured(self) -> str:
        """Names the measured quantity: a saved average is continued only by measurements of the same one."""
        return f"{self.kind} of {self.source}"

    def measure(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Statistics ``(L, 1)``: the divergence itself, mean over the batch, without a gradient."""
        with torch.no_grad():
            return self._divergence(student, teacher).float().unsqueeze(1)

    def divergence(self, statistics: Tensor) -> Tensor:
        """Divergence ``(L,)`` of averaged statistics ``(L, 1)``."""
        return divergence_of(statistics, self.ratio)

    def check(self, *_: Any, **__: Any) -> None:
        """Nothing to check."""

    def memory(self, layers: int) -> None:
        """Nothing to remember."""

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean divergence over the layers, a scalar that trains the student; teacher features are detached."""
        return self._divergence(student, [f.detach() for f in teacher]).mean()

    def _divergence(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        found = ops.attention_divergence(
            student, teacher, source=self.source, power=self.power, kind=self.kind, betas=self.betas
        )
        return found * _rows_of_padding(student, teacher) if self.source == "probabilities" else found


def _rows_of_padding(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Query rows over query rows that are no padding ``(L,)``: rows that are zero in both nets add 0 to the mean.

    Only where heads were averaged before, ``(B, 1, N, N)``, as it is done for masked passes.
    """
    shares = []
    for one, other in zip(student, teacher, strict=True):
        share = one.new_ones((), dtype=torch.float32)
        if one.shape[1] == other.shape[1] == 1:
            rows_S, rows_T = (rows.detach().amax((1, 3)) > 0 for rows in (one, other))
            share = rows_S.numel() / (rows_S | rows_T).sum().clamp(min=1)
        shares.append(share)
    return torch.stack(shares)
