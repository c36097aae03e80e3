"""Statistics of all passes before one update, and of all ranks (legend: L layers, S statistics a layer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwkd.nets.passes import staged
from lwkd.rates.device import Written
from lwkd.rates.distributed import summed, world_size


class StatisticsAccumulator:
    """Sums of statistics, weighted by rows, in float64 on the device that they were measured on.

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
        # (L·S + 2,): the sums, and room for the number of rows and the flag of infinite gradients, so that all of it
        # is summed over ranks and copied to the host in one piece.
        self._packet: Tensor | None = None
        self._written: Written | None = None

    def add(self, statistics: Tensor, rows: int, written: Written | None = None) -> None:
        """Add statistics ``(L, S)`` that are the mean over so many rows.

        Args:
            statistics: of one pair of passes.
            rows: weight.
            written: where, for statistics that were not measured just now.
        """
        if written is not None:
            written.read([statistics], "statistics")
        # A teacher's pass may end under inference_mode, and what is made there could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            packet = self._on(statistics.device)
            packet[:-2].add_(statistics.flatten(), alpha=rows)
            self._written = Written(packet.device)
        self.rows += rows

    def mean(self, device: torch.device) -> Tensor | None:
        """Mean statistics ``(L, S)`` of this rank on the device of the nets, or None; starts afresh."""
        if not self.rows:
            return None
        mean = self._on(device)[:-2].view(self.shape) / self.rows
        self.clear()
        return mean

    def packet(self, device: torch.device, found_inf: Tensor | None, *, alone: bool = False) -> Tensor | None:
        """All that was measured, summed over ranks, for :meth:`unpacked`; None where there is nothing. Starts afresh.

        Every rank takes part in the sum, whether it has measured anything or not: the others would wait for it.

        Args:
            device: the device of the nets.
            found_inf: scalar, nonzero where the gradients were infinite; on any device.
            alone: leave the other ranks out.
        """
        alone = alone or world_size() == 1
        if alone and not self.rows:
            return None
        packet = self._on(device)
        packet[-2:-1].fill_(self.rows)
        if found_inf is not None:
            packet[-1:].copy_(staged(found_inf.detach().reshape(1), packet.device), non_blocking=True)
        self.clear()
        return packet if alone else summed(packet)

    def unpacked(self, packet: Tensor) -> tuple[Tensor, bool, bool]:
        """Mean statistics ``(L, S)``, whether there are any, and whether the gradients were infinite.

        Args:
            packet: as of :meth:`packet`, on the CPU.
        """
        return packet[:-2].view(self.shape) / packet[-2], bool(packet[-2] > 0), bool(packet[-1] != 0)

    def _on(self, device: torch.device) -> Tensor:
        if self._packet is None:
            layers, statistics = self.shape
            self._packet = torch.zeros(layers * statistics + 2, dtype=torch.float64, device=device)
            return self._packet
        if self._written is not None:
            self._written.read([self._packet], "statistics")
        if self._packet.device != device:  # statistics from a checkpoint, or of nets that were moved
            self._packet = staged(self._packet, device).to(device)
        return self._packet

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU."""
        sums = torch.zeros(self.shape, dtype=torch.float64)
        if self._packet is not None:
            sums.copy_(self._on(self._packet.device)[:-2].view(self.shape))
        return {"sums": sums, "rows": torch.tensor(self.rows, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off."""
        self.clear()
        self._on(state["sums"].device)[:-2].copy_(state["sums"].flatten())
        self.rows = float(state["rows"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy is made on the current stream; events mean nothing in another process."""
        if self._packet is not None:
            self._on(self._packet.device)
        return {**self.__dict__, "_written": None}
