"""The crucial layers of a net: those whose outputs carry everything, where channels or size are about to change.

Legend: a *spot* is the layers on the spine that give out the same tensor (a block and the last layer in it); a *run* is
a stretch of spots over which channels and size stay the same. The layer at the end of a run is crucial. A *block* is a
module with several weighted layers, such as a residual block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.nets.names import unwrap
from lwkd.pairing.channel_axis import ChannelAxis, channel_axes, layout_of
from lwkd.pairing.spine import Node, spine
from lwkd.pairing.tracing import Call, Trace

_MAX_SPATIAL = 3


@dataclass(frozen=True, eq=False)
class MapLayer:
    """A layer whose output can be compared: a map of more than one position."""

    call: Call
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output as the module gives it."""
        assert self.call.shape is not None
        return self.call.shape

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial sizes of the map."""
        return self.map_shape[1:]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Channels and spatial sizes."""
        return self.layout.shape(self.shape)[1:]


Spot = Sequence[MapLayer]


class TracedNet:
    """A traced net with the channel axis of every output."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.class_name = type(unwrap(model)).__name__
        self._axes: dict[Node, ChannelAxis] = channel_axes(c.node for c in trace.calls.values() if c.node is not None)
        self._spines = [] if trace.output is None else [spine(sources, trace.output) for sources in trace.sources]

    @property
    def has_path(self) -> bool:
        """Whether a differentiable path leads from the input to the output."""
        return any(self._spines)

    def crucial_layers(self) -> list[MapLayer]:
        """The ends of the runs; of a run of tokens, or if there is one run only, its repeated blocks instead."""
        spots = _outside_blocks(self.spots())
        runs = [list(run) for _, run in groupby(spots, key=lambda spot: spot[0].map_shape)]
        ends: list[MapLayer] = []
        for run in runs:
            blocks = _repeated_blocks(run) if len(runs) == 1 or run[0][0].layout.kind == "tokens" else []
            ends.extend(blocks or [_last_block(run, ends[-1].call.end if ends else 0)])
        ends = self._with_parameters(ends)
        return _without_stem(ends, spots) if self.trace.role == "student" else ends

    def spots(self) -> list[list[MapLayer]]:
        """Usable layers on the spine in execution order, those that give out the same tensor together."""
        best: list[list[MapLayer]] = []
        for positions in self._spines:
            at: dict[int, list[MapLayer]] = {}
            for call in self.trace.calls.values():
                position, index = positions.get(call.node, (-1, -1))
                layer = self.map_layer(call) if call.usable and call.name and index == call.output_index else None
                if layer is not None:
                    at.setdefault(position, []).append(layer)
            best = max(best, [at[position] for position in sorted(at)], key=len)
        return best

    def map_layer(self, call: Call) -> MapLayer | None:
        """The layer of this call; None if its output is not a map of more than one position over the batch."""
        shape = call.shape
        if shape is None or not 3 <= len(shape) <= 2 + _MAX_SPATIAL or shape[0] != self.trace.batch:
            return None
        layer = MapLayer(call, layout_of(self._axes.get(call.node), shape, self.trace.image))
        return layer if max(layer.size) > 1 else None

    def _with_parameters(self, ends: list[MapLayer]) -> list[MapLayer]:
        """Drop the ends of runs without a parameter, such as a pool alone.

        In the student there is nothing whose rate they could set. In the teacher they give the output of the layer
        before them at another size, which is of use where no later layer has that size.
        """
        holders = [
            c.begin for c in self.trace.calls.values() if any(p is not None for p in c.module._parameters.values())
        ]
        kept = []
        for i, layer in enumerate(ends):
            previous = ends[i - 1].call.end if i else 0
            learns = any(previous < begin <= layer.call.end for begin in holders)
            last_of_size = i + 1 == len(ends) or ends[i + 1].size != layer.size
            if learns or (self.trace.role == "teacher" and last_of_size):
                kept.append(layer)
        return kept or ends


def _outside_blocks(spots: Sequence[Spot]) -> list[Spot]:
    """Drop what lies inside a repeated block, so that blocks with and without a residual path count alike.

    Such a block is of a class that occurs at least twice on the spine, is no plain container, and does not hold
    another module of its class.
    """
    modules = {layer.call.name: layer.call.module for spot in spots for layer in spot}
    kinds = [type(module) for module in modules.values()]
    insides = tuple(
        name + "."
        for name, module in modules.items()
        if kinds.count(type(module)) > 1
        and type(module) is not nn.Sequential
        and any(True for _ in module.children())
        and sum(isinstance(inner, type(module)) for inner in module.modules()) == 1
    )
    outside = ([layer for layer in spot if not layer.call.name.startswith(insides)] for spot in spots)
    return [spot for spot in outside if spot]


def _repeated_blocks(run: Sequence[Spot]) -> list[MapLayer]:
    """The outermost modules of one class whose names differ only in a number: the blocks of a ViT or a BERT."""
    groups: dict[tuple[type, str], list[MapLayer]] = {}
    for spot in run:
        for layer in spot:
            pattern = re.sub(r"\d+", "*", layer.call.name)
            if _weighted_layers(layer) > 0:
                groups.setdefault((type(layer.call.module), pattern), []).append(layer)
    repeated = {key: layers for key, layers in groups.items() if len(layers) > 1}
    if not repeated:
        return []
    return repeated[min(repeated, key=lambda key: (key[1].count("."), -len(repeated[key])))]


def _last_block(run: Sequence[Spot], after: int) -> MapLayer:
    """The last block of a run: not a norm or a pool that merely follows it; without blocks the last layer.

    A container that began before the run (``after``: the end of the run before it) holds more than the run, and counts
    only where nothing else gives out its tensor.
    """
    inside = [[layer for layer in spot if layer.call.begin > after] or spot for spot in run]
    blocks = [spot for spot in inside if any(_weighted_layers(layer) > 1 for layer in spot)]
    # The outermost by name; of equals the first that ran.
    return min((blocks or inside)[-1], key=lambda layer: layer.call.name.count("."))


def _without_stem(ends: list[MapLayer], spots: Sequence[Spot]) -> list[MapLayer]:
    """Drop leading single layers of the first size before the first block, as long as two layers remain.

    The first convolution of a residual net sees edges only, its map is the largest by far, and attention transfer
    leaves it out; its parameters belong to the first block's run. Only blocks with nothing of the spine inside count: a
    plain net of stages has none, and keeps its first layer.
    """
    layers = [layer for spot in spots for layer in spot]
    blocks = [
        layer
        for layer in layers
        if _weighted_layers(layer) > 1 and not any(x.call.name.startswith(layer.call.name + ".") for x in layers)
    ]
    size = ends[0].size if ends else ()
    while len(ends) > 2 and ends[0].size == size and _weighted_layers(ends[0]) < 2:
        if not any(block.call.begin > ends[0].call.end for block in blocks):
            break
        ends = ends[1:]
    return ends


def _weighted_layers(layer: MapLayer) -> int:
    """Number of weighted layers in a layer (parameters with two or more dimensions)."""
    return sum(parameter.dim() > 1 for parameter in layer.call.module.parameters())
