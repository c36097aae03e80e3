"""What is remembered of the teacher's curvature, and how a teacher that changes is noticed (legend: L layers)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.sharding import is_fsdp, whole_parameters


class TeacherCurvature:
    """Running mean of the frozen teacher's curvature; settled once its standard error is small enough.

    After the first :data:`EAGER` measurements the teacher takes part in one of :data:`ONE_IN` only, until it is
    settled: it is the larger part of the cost, and the first updates would pay for all of it.

    A teacher that is no longer the one that was measured (:meth:`follow`) makes it start again: one that changes at
    every update (mutual learning, a running average of the student) is measured every time, and nothing is averaged.

    Args:
        layers: L.
        tolerance: settled when the standard error is at most this share of the mean, for every layer.
    """

    AT_LEAST = 8
    """Measurements before a standard error is believed."""

    EAGER = 4
    """Measurements that take in the teacher at first."""

    ONE_IN = 4
    """Measurements of which one takes in the teacher, after the first ``EAGER``."""

    def __init__(self, layers: int, tolerance: float) -> None:
        self.tolerance, self.count, self.rests = tolerance, 0, 0
        self.mean = torch.zeros(layers, dtype=torch.float64, device="cpu")
        self.squares = torch.zeros_like(self.mean)  # sum of squared deviations (Welford)
        self.moving = False  # whether the teacher has changed since the measurement before the last
        self._likeness = _Likeness()
        self._warned = False

    def follow(self, teacher: nn.Module) -> None:
        """Before a measurement: forget all where the teacher's parameters are not those that were measured before.

        Noticed are other parameter objects, writes in place that autograd counts, and other values in a sample of each
        tensor, which also sees writes through ``.data`` and another teacher after a resume. Buffers count where the
        module that holds them is in eval mode. On a GPU nothing is waited for, and values are compared one measurement
        late.
        """
        self.moving = self._likeness.changed(teacher)
        if not self.moving:
            return
        self._forget()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the teacher's parameters have changed since its curvature was measured (it learns, is an average of "
                "the student, or was replaced): what was known of it is forgotten, and it is measured every time while "
                "it goes on changing. If it should be frozen, keep it out of every optimizer",
                UserWarning,
                stacklevel=2,
            )

    def _forget(self) -> None:
        self.count, self.rests = 0, 0
        self.mean, self.squares = torch.zeros_like(self.mean), torch.zeros_like(self.squares)

    def agreed(self, changed: int, ranks: int) -> bool:
        """Whether all ranks saw the same: the teacher changed for all of them, or for none.

        Otherwise some have measured it and others took what was known, the measurement is of no use, and all forget:
        the next one takes the teacher in everywhere.
        """
        if changed in (0, ranks):
            return True
        self.moving = True
        self._forget()
        return False

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean ``(L,)``; infinite before the second measurement.

        0 where the teacher is measured every time: its noise is then seen in the measurements, as the student's is.
        """
        if self.count < 2:
            return torch.full_like(self.mean, 0.0 if self.moving else float("inf"))
        return (self.squares / (self.count - 1) / self.count).sqrt()

    @property
    def known(self) -> Tensor | None:
        """The curvature ``(L,)``, once it is settled."""
        settled = self.count >= self.AT_LEAST and bool((self.stderr <= self.tolerance * self.mean.abs()).all())
        return self.mean if settled else None

    @property
    def at_hand(self) -> Tensor | None:
        """What the coming measurement takes for the teacher ``(L,)``; None where the teacher is to be measured."""
        return self.mean if self.rests else self.known

    def fold(self, statistics: Tensor) -> Tensor:
        """Take in the teacher's column of new statistics ``(L, 2)``, and put the mean in its place.

        A column that is not finite is left alone: the measurement as a whole will be skipped.
        """
        h_T = statistics[:, 1]
        if not bool(torch.isfinite(h_T).all()):
            return statistics
        if self.at_hand is not None:
            self.rests = max(0, self.rests - 1)
        else:
            self.count += 1
            self.rests = self.ONE_IN - 1 if self.count >= self.EAGER else 0
            off = h_T - self.mean
            self.mean = self.mean + off / self.count
            self.squares = self.squares + off * (h_T - self.mean)
        return torch.stack([statistics[:, 0], self.mean], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        averages = {"mean": self.mean.clone(), "squares": self.squares.clone()}
        return {
            "count": self.count,
            "rests": self.rests,
            **averages,
            "moving": self.moving,
            **self._likeness.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off."""
        self.count, self.rests = state["count"], state["rests"]
        self.mean, self.squares = state["mean"].to("cpu", copy=True), state["squares"].to("cpu", copy=True)
        self.moving = state.get("moving", False)  # states of earlier versions know of no change
        self._likeness.load_state_dict(state)


class _Likeness:
    """What a net's parameters looked like at the last look.

    ``values`` ``(2, P)`` float32 on the CPU: the 1-norm and the 2-norm of about :data:`SAMPLE` entries of each of P
    tensors, the same in every process. Marks are identities and versions, and belong to this process.
    """

    SAMPLE = 1024

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self._marks: list[tuple[int, int]] | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None  # values on their way from a GPU

    def changed(self, net: nn.Module) -> bool:
        """Whether the net looks different from the last time; the first look finds nothing."""
        weights = _weights(net)
        marks = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in weights]
        if is_fsdp(net):
            marks = []  # of tensors that are gathered anew
        changed = self._marks is not None and marks != self._marks
        self._marks = marks
        arrived, sums = self._arrived(), self._sums(weights)
        if sums.device.type == "cpu":
            arrived = sums
        else:
            copied = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(sums.device))
            self._arriving = copied, event
        if arrived is not None:
            changed = changed or (self.values is not None and not torch.equal(arrived, self.values))
            self.values = arrived
        return changed

    def _arrived(self) -> Tensor | None:
        """The values that were copied from the GPU since the last measurement; waits for the copy."""
        if self._arriving is None:
            return None
        values, event = self._arriving
        event.synchronize()
        self._arriving = None
        return values

    def _sums(self, weights: list[Tensor]) -> Tensor:
        samples = []
        with torch.no_grad():
            for weight in weights:
                tensor = weight.detach()
                tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
                last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
                flat = (tensor.permute(0, 2, 3, 1) if last else tensor).reshape(-1)  # a view of dense tensors
                some = flat[:: max(1, flat.numel() // self.SAMPLE)].to(weights[0].device, torch.float64)
                samples.append(some)
            if not samples:
                return torch.zeros(2, 0, dtype=torch.float32, device="cpu")
            return (
                torch.stack([torch.stack(torch._foreach_norm(samples, order)) for order in (1, 2)]).float().nan_to_num()
            )

    def state_dict(self) -> dict[str, Any]:
        """A tensor on the CPU, or None."""
        if self.values is None:
            self.values = self._arrived()
        return {"likeness": None if self.values is None else self.values.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, which another process may have been."""
        values = state.get("likeness")
        self.values = None if values is None else values.to("cpu", copy=True)
        self._marks = self._arriving = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps the values; marks mean nothing to other nets, or in another process."""
        return {"values": self.state_dict()["likeness"], "_marks": None, "_arriving": None}


def _weights(net: nn.Module) -> list[Tensor]:
    """What a net's curvature depends on: its parameters, and the buffers of modules that do not update them."""
    buffers = [b for module in net.modules() if not module.training for b in module.buffers(recurse=False)]
    return [
        tensor
        for tensor in (*whole_parameters(net).values(), *buffers)
        if tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and (tensor.is_floating_point() or tensor.is_complex())
    ]
