"""Statistics of all passes before one update, and of all ranks (legend: L layers, S statistics a layer)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwkd.nets.passes import staged
from lwkd.rates.device import Written
from lwkd.rates.distributed import Ranks


class Packet(NamedTuple):
    """What goes to the host of one update's statistics.

    ``values``, in one tensor so that one copy takes it there: the mean ``(L, S)``, flat, and behind it, where
    ``flagged``, whether the gradients were infinite. Where ``rows`` is None they are sums over the ranks: of the
    statistics, behind them (of a signal that remembers the teacher) whether it had changed, then the rows, and whether
    gradients were infinite.
    """

    values: Tensor
    rows: float | None
    flagged: bool


class StatisticsAccumulator:
    """Sums of statistics, weighted by rows, in float64 on the device that they were measured on.

    Most updates have one pass: its statistics are kept as they came, and nothing is computed.

    Args:
        layers: L.
        statistics: S.
    """

    def __init__(self, layers: int, statistics: int) -> None:
        self.shape = layers, statistics
        self.clear()

    def clear(self) -> None:
        """Start afresh."""
        self.rows = 0.0
        self._only: Tensor | None = None  # the statistics (L, S) of the only pass so far
        self._sums: Tensor | None = None  # (L, S) float64, of several
        self._written: Written | None = None  # where either was

    def add(self, statistics: Tensor, rows: int, written: Written | None = None) -> None:
        """Add statistics ``(L, S)`` that are the mean over so many rows.

        Args:
            statistics: of one pair of passes.
            rows: weight.
            written: where, for statistics that were not measured just now.
        """
        if self.rows == 0:
            self._only, self._sums, self.rows = statistics.detach(), None, float(rows)
            self._written = Written(statistics.device) if written is None else written
            return
        if written is not None:
            written.read([statistics], "statistics")
        # A teacher's pass may end under inference_mode, and what is made there could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            self._sums = torch.add(self._sum(statistics.device), statistics, alpha=rows)
        self._only, self._written = None, Written(statistics.device)
        self.rows += rows

    def _sum(self, device: torch.device) -> Tensor:
        """``(L, S)``, on another device than before for statistics of nets that were moved, or of a checkpoint."""
        self._read()
        if self._sums is not None:
            return staged(self._sums, device).to(device)
        if self._only is not None:
            return staged(self._only, device).to(device, torch.float64) * self.rows
        return torch.zeros(self.shape, dtype=torch.float64, device=device)

    def _read(self) -> None:
        """Before the statistics are read: the current stream waits for them."""
        kept = self._only if self._sums is None else self._sums
        if kept is not None and self._written is not None:
            self._written.read([kept], "statistics")

    def mean(self, device: torch.device) -> Tensor | None:
        """Mean statistics ``(L, S)`` of this rank on the device of the nets, or None; starts afresh."""
        if not self.rows:
            return None
        if self._only is None:
            mean = self._sum(device) / self.rows
        else:
            self._read()
            mean = staged(self._only, device).to(device)
        self.clear()
        return mean

    def packet(
        self, device: torch.device, found_inf: Tensor | None, ranks: Ranks | None, *, changed: bool | None = None
    ) -> Packet | None:
        """All that was measured, summed over ranks, for :meth:`unpacked`; None where there is nothing. Starts afresh.

        Every rank takes part in the sum, whether it has measured anything or not: the others would wait for it.

        Args:
            device: the device of the nets.
            found_inf: scalar, nonzero where the gradients were infinite; on any device.
            ranks: over which it is summed; None leaves the others out.
            changed: whether this rank found another teacher than it had measured; None where nobody looks.
        """
        if ranks is None or ranks.count == 1:
            rows, mean = self.rows, self.mean(device)
            if mean is None:
                return None
            if found_inf is None:
                return Packet(mean, rows, flagged=False)
            return Packet(torch.cat([mean.flatten(), self._flag(found_inf, device)]), rows, flagged=True)
        counts = [self.rows] if changed is None else [float(changed), self.rows]
        counted = torch.tensor(counts, dtype=torch.float64, device="cpu")
        counted = staged(counted, device).to(device, non_blocking=True)
        # Every rank sends as much as the others, which may have a flag.
        flag = torch.zeros_like(counted[:1]) if found_inf is None else self._flag(found_inf, device)
        values = torch.cat([self._sum(device).flatten(), counted, flag])
        self.clear()
        return Packet(ranks.summed(values), None, flagged=True)

    def _flag(self, found_inf: Tensor, device: torch.device) -> Tensor:
        return staged(found_inf.detach().reshape(1), device).to(device, non_blocking=True)

    def unpacked(self, packet: Packet) -> tuple[Tensor, bool, bool, int | None]:
        """What a packet says: mean statistics ``(L, S)``, whether there are any, whether the gradients were infinite.

        Behind these, for how many ranks the teacher had changed; None where no rank was asked.

        Args:
            packet: as of :meth:`packet`, its values on the CPU.
        """
        values, rows, flagged = packet
        infinite = flagged and bool(values[-1] != 0)
        if rows is not None:
            return (values[:-1].view(self.shape) if flagged else values), True, infinite, None
        layers, statistics = self.shape
        sums, (*changed, rows) = values[: layers * statistics], values[layers * statistics : -1].tolist()
        return sums.view(self.shape) / rows, rows > 0, infinite, round(changed[0]) if changed else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU."""
        sums = self._sum(torch.device("cpu")).clone()
        return {"sums": sums, "rows": torch.tensor(self.rows, dtype=torch.float64, device="cpu")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off."""
        self.clear()
        self._sums, self.rows = state["sums"].clone(), float(state["rows"])
