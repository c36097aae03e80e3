"""Every op once, forward and backward, as named calls on inputs that can be given new values in place.

``python every_op.py`` runs all of them in all dtypes on the first CUDA device: what the memory checker watches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lwkd import ops, reference

FEATURES = ((4, 24, 20, 20), (4, 64, 7, 7), (4, 5, 9, 5)), ((4, 96, 20, 20), (4, 96, 10, 10), (4, 3, 4, 5))
PARAMETERS = ((70000,), (64, 3, 7, 7), (5,), (0,), (512, 100))
LAYER_OF, LAYERS = (0, 1, 1, 2, 3), 5


class EveryOp:
    """Inputs on a device, and the ops on them.

    Args:
        device: where.
        seed: of the values.
        dtype: of features, derivatives and parameters.
        memory: ``channels_last``, or not.
    """

    def __init__(
        self, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32, memory: str = ""
    ) -> None:
        self.device = device
        self.student, self.teacher, self.tangents, self.parameters = (
            [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
            for shapes in (*FEATURES, FEATURES[0], PARAMETERS)
        )
        if memory == "channels_last":
            for side in (self.student, self.teacher, self.tangents):
                side[:] = [t.contiguous(memory_format=torch.channels_last) for t in side]
        self.statistics = torch.empty(LAYERS, 4, device=device)
        self.gradients = torch.empty(LAYERS, device=device)
        self.state = reference.initial_rates(LAYERS, 4, device)
        self.refill(seed)
        for feature in (*self.student, *self.tangents):
            feature.requires_grad_()
        self.calls: dict[str, Callable[[], list[Tensor]]] = {
            "attention_divergence": self.attention_divergence,
            "attention_maps": self.attention_maps,
            "jacobian_sums": self.jacobian_sums,
            "jacobian_divergence": self.jacobian_divergence,
            "rademacher": self.rademacher,
            "hutchinson_trace": self.hutchinson_trace,
            "update_rates": self.update_rates,
        }

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """Other random values in the same tensors, on the current stream."""
        source = torch.Generator(self.device).manual_seed(seed)
        for tensor in (*self.student, *self.teacher, *self.tangents, *self.parameters, self.statistics, self.gradients):
            tensor.copy_(torch.randn(tensor.shape, generator=source, device=self.device))
        a, b = self.statistics[:, 0].clone().abs_() + 1, self.statistics[:, 1].clone().abs_() + 1
        self.statistics.copy_(torch.stack([a, b, 0.3 * a, a + b - 0.6 * a], 1))  # sums that a pair can have

    def attention_divergence(self) -> list[Tensor]:
        """Divergences and the gradients of the student's features."""
        found = ops.attention_divergence(self.student, self.teacher)
        return [found.detach(), *torch.autograd.grad(found, self.student, self.gradients[: len(self.student)])]

    def attention_maps(self) -> list[Tensor]:
        """Maps, map tangents, and the gradients of features and tangents."""
        sizes = [(10, 10), (7, 7), (3, 5)]
        maps, tangents = ops.attention_maps(self.student, self.tangents, sizes=sizes)
        inputs = [*self.student, *self.tangents]
        given = [tangent.detach() for tangent in tangents] + [map_.detach() for map_ in maps]
        found = torch.autograd.grad([*maps, *tangents], inputs, given)
        return [t.detach() for t in (*maps, *tangents, *found)]

    def jacobian_sums(self) -> list[Tensor]:
        """Sums, and the gradients of both sides."""
        return self._of_pair(ops.jacobian_sums)

    def jacobian_divergence(self) -> list[Tensor]:
        """Divergences, and the gradients of both sides."""
        return self._of_pair(ops.jacobian_divergence)

    def _of_pair(self, op: Callable[[list[Tensor], list[Tensor]], Tensor]) -> list[Tensor]:
        found = op(self.student, self.tangents)
        gradients = torch.autograd.grad(found, [*self.student, *self.tangents], torch.ones_like(found))
        return [found.detach(), *gradients]

    def rademacher(self) -> list[Tensor]:
        """Signs."""
        return ops.rademacher(self.parameters, 7)

    def hutchinson_trace(self) -> list[Tensor]:
        """Traces; one layer has no tensor."""
        return [ops.hutchinson_trace(self.parameters, LAYER_OF, 7, LAYERS)]

    def update_rates(self) -> list[Tensor]:
        """Two measurements in a row, of which the first starts the average."""
        state, _, _ = ops.update_rates(self.state, self.statistics, divergence="direction")
        return list(ops.update_rates(state, self.statistics.flip(0), divergence="direction", normalize=True)[0])


NAMES = tuple(EveryOp(torch.device("cpu")).calls)


def main() -> None:
    """All ops, dtypes and memory orders."""
    device = torch.device("cuda", 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for memory in ("contiguous", "channels_last"):
            every = EveryOp(device, 0, dtype, memory)
            for name, call in every.calls.items():
                call()
                torch.cuda.synchronize()
                print(name, dtype, memory, flush=True)


if __name__ == "__main__":
    main()
