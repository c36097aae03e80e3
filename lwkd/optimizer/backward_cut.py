"""Layers at rate 0 are left out of the backward pass: ``requires_grad`` of their parameters goes off, and on again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from lwkd.nets.sharding import any_sharded
from lwkd.optimizer.ownership import LayerOf

REDUCERS = {"DistributedDataParallel", "FullyShardedDataParallel"}
"""Modules that expect a gradient of every parameter that they were made with."""


def why_not_cut(student: nn.Module | None, ranks: int) -> str | None:
    """Why the backward pass has to stay whole; None where it may be cut.

    Args:
        student: as the training loop calls it.
        ranks: how many processes train it together.
    """
    if ranks > 1:
        return f"{ranks} ranks train the student together, and whoever sums its gradients waits for all of them"
    if student is None:
        return None
    for module in student.modules():
        names = {kind.__name__ for kind in type(module).__mro__} & REDUCERS
        if names:
            return f"{names.pop()} waits for a gradient of every parameter"
    if any_sharded(student):
        return "its parameters are sharded, and whoever gathers their gradients waits for all of them"
    return None


class BackwardCut:
    """Switches ``requires_grad`` off for parameters of layers that stand still, and on again when they move.

    Nobody else's switch is touched: a parameter that the user froze stays so. Changes are made between two updates, and
    clear a gradient that is left over, which no update would use.
    """

    def __init__(self) -> None:
        self._off: list[Tensor] = []
        self._behind: set[int | None] = set()  # layers that had a gradient before the last change, and must have one
        self._whole = False  # the backward pass stays whole for good, which has been said

    def holds(self, parameter: Tensor) -> bool:
        """Whether the parameter was switched off here."""
        return any(parameter is one for one in self._off)

    def layers(self, layer_of: LayerOf) -> list[int]:
        """Layers that are left out."""
        return sorted({layer for layer in map(layer_of, self._off) if layer is not None})

    def follow(
        self,
        still: Collection[int],
        parameters: Sequence[Tensor],
        layer_of: LayerOf,
        names: Sequence[str],
        why_not: Callable[[], str | None],
    ) -> None:
        """After a step: parameters of these layers are left out of the backward pass, all others are in it.

        Args:
            still: layers whose rate was 0 in the step.
            parameters: those that the optimizer holds.
            layer_of: index of a parameter's layer.
            names: of the layers, for messages.
            why_not: asked before something is left out, see :func:`why_not_cut`.

        Warns:
            UserWarning: they have to stay in, or gradients of other layers ended with theirs; said once.
        """
        self._check_those_behind(parameters, layer_of, names)
        if self._off:
            self.restore([parameter for parameter in self._off if layer_of(parameter) not in still])
        if self._whole or not still:
            return
        leaving = [p for p in parameters if p.requires_grad and layer_of(p) in still]
        if not leaving:
            return
        reason = why_not()
        if reason is not None:
            self._stay_whole(reason)
            return
        self._behind = {layer_of(p) for p in parameters if p.grad is not None and layer_of(p) not in still}
        self.leave_out(leaving)

    def leave_out(self, parameters: Sequence[Tensor]) -> None:
        """Switch these off, those that are on."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False).grad = None
                self._off.append(parameter)

    def restore(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Switch these on again (None: all), if they were switched off here."""
        going = {id(parameter) for parameter in (self._off if parameters is None else parameters)}
        for parameter in self._off:
            if id(parameter) in going:
                parameter.requires_grad_(True)
        self._off = [parameter for parameter in self._off if id(parameter) not in going]
        self._behind = set()

    def _check_those_behind(self, parameters: Sequence[Tensor], layer_of: LayerOf, names: Sequence[str]) -> None:
        """The step after a change: who had a gradient before has one now, else everything is put back."""
        if not self._behind:
            return
        lost = self._behind - {layer_of(parameter) for parameter in parameters if parameter.grad is not None}
        self._behind = set()
        if lost:
            self.restore()
            which = ", ".join("parameters behind the last pair" if one is None else names[one] for one in lost)
            self._stay_whole(
                f"left out of it, they took the gradients of {which} along in one update. Checkpointing with "
                "use_reentrant=True does that to a block whose input needs no gradient: use use_reentrant=False"
            )

    def _stay_whole(self, why: str) -> None:
        self._whole = True
        warnings.warn(
            f"frozen layers stand still at rate 0, but stay in the backward pass, which saves no time: {why}",
            stacklevel=5,
        )
