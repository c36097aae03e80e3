"""Which paired layer a parameter belongs to: known by name, looked up by object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from lwkd.nets.names import named_parameters
from lwkd.optimizer.group_memory import Group
from lwkd.pairing.pairs import Pairing

Layer = int | None
"""Index of a layer; None for parameters of no layer, whose multiplier is 1."""

LayerOf = Callable[[Tensor], Layer]

Places = dict[Layer, list[int]]
"""By layer, the indices of its parameters in a group; layers in the order of their first one."""


def places_by_layer(parameters: Sequence[Tensor], layer_of: LayerOf) -> Places:
    """Where each layer's parameters are among these."""
    places: Places = {}
    for index, parameter in enumerate(parameters):
        places.setdefault(layer_of(parameter), []).append(index)
    return places


class Ownership:
    """Parameter object → index of the layer whose rate it gets; None for those that no pair owns.

    Args:
        pairing: gives each layer the names of its parameters.
    """

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self._owners: dict[int, tuple[Tensor, Layer]] = {}
        self._places: dict[int, tuple[list[Tensor], Places]] = {}  # by position of the group, which changes rarely

    def resolve(self, student: nn.Module) -> None:
        """Look all parameters of the student up by name."""
        owners = self.pairing.owners()
        resolved: dict[int, tuple[Tensor, Layer]] = {}
        for name, parameter in named_parameters(student).items():
            layer, known = owners.get(name), resolved.get(id(parameter), (parameter, None))[1]
            # A tied parameter belongs to the first of its segments.
            first = layer if known is None else known if layer is None else min(layer, known)
            resolved[id(parameter)] = (parameter, first)
        self._owners, self._places = resolved, {}

    def refresh(self, groups: Sequence[Group], student: nn.Module | None) -> bool:
        """Look up by name again if a parameter object is new (wrappers replace them); unknown ones belong to no layer.

        Args:
            groups: whose parameters are about to be stepped.
            student: the student; None where there is none to look at any more.

        Returns:
            Whether the groups have changed, and hold parameters that are none of the student's.
        """
        if all(self._known_at(position, group["params"]) for position, group in enumerate(groups)):
            return False
        parameters = {id(parameter) for group in groups for parameter in group["params"]}
        if student is None or self._owners.keys() >= parameters:
            return False
        self.resolve(student)
        return not self._owners.keys() >= parameters

    def is_students(self, parameter: Tensor) -> bool:
        """Whether the parameter was found in the student."""
        return id(parameter) in self._owners

    def layer_of(self, parameter: Tensor) -> Layer:
        """Index of the parameter's layer; None for those of no layer, and for those that are not the student's."""
        return self._owners.get(id(parameter), (parameter, None))[1]

    def places(self, position: int, parameters: list[Tensor]) -> Places:
        """Where each layer's parameters are in a group.

        Args:
            position: of the group.
            parameters: the group's.
        """
        if not self._known_at(position, parameters):
            self._places[position] = list(parameters), places_by_layer(parameters, self.layer_of)
        return self._places[position][1]

    def _known_at(self, position: int, parameters: list[Tensor]) -> bool:
        known = self._places.get(position)
        return known is not None and len(known[0]) == len(parameters) and all(map(is_, known[0], parameters))

    def __getstate__(self) -> dict[str, Any]:
        """Objects instead of their ids, which a copy does not share."""
        return {"pairing": self.pairing, "owners": list(self._owners.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pairing = state["pairing"]
        self._owners = {id(parameter): (parameter, layer) for parameter, layer in state["owners"]}
        self._places = {}
