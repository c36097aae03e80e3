"""The crucial layers of a net, and which of the student's goes with which of the teacher's.

A *run* is a stretch of the spine over which channels and size stay the same; the layer at its end is crucial.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.nets.names import unwrap
from lwkd.pairing.channel_axis import Axis, follow, layout_of
from lwkd.pairing.spine import Node, spine
from lwkd.pairing.tracing import Call, Trace

_MOST_SPATIAL = 3


@dataclass(frozen=True, eq=False)
class Layer:
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
        return self.layout.shape(self.shape)[2:]

    @property
    def stage(self) -> tuple[int, ...]:
        """Channels and spatial sizes."""
        return self.layout.shape(self.shape)[1:]


class Net:
    """A traced net with the channel axis of every output."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.title = type(unwrap(model)).__name__
        self._axes: dict[Node, Axis] = follow(c.node for c in trace.calls.values() if c.node is not None)
        self._spines = [] if trace.output is None else [spine(sources, trace.output) for sources in trace.sources]

    @property
    def on_spine(self) -> bool:
        """A path leads from the input to the output."""
        return any(self._spines)

    def layer(self, call: Call) -> Layer | None:
        """The call as a layer; None if its output is not a map over the batch."""
        shape = call.shape
        if shape is None or not 3 <= len(shape) <= 2 + _MOST_SPATIAL or shape[0] != self.trace.batch:
            return None
        layer = Layer(call, layout_of(self._axes.get(call.node), shape, self.trace.image))
        return layer if max(layer.size) > 1 else None

    def spine_layers(self) -> list[list[Layer]]:
        """Usable layers on the spine in execution order; layers that give the same tensor stand together."""
        best: list[list[Layer]] = []
        for found in self._spines:
            at: dict[int, list[Layer]] = {}
            for call in self.trace.calls.values():
                place, index = found.get(call.node, (-1, -1))
                layer = self.layer(call) if call.usable and call.name and index == call.output_index else None
                if layer is not None:
                    at.setdefault(place, []).append(layer)
            layers = [at[place] for place in sorted(at)]
            best = max(best, layers, key=len)
        return best

    def crucial_layers(self) -> list[Layer]:
        """The ends of the runs; instead of its end the repeated blocks of a run of tokens, or of the only run."""
        spots = _without_insides(self.spine_layers())
        runs = [list(run) for _, run in groupby(spots, key=lambda spot: spot[0].stage)]
        ends: list[Layer] = []
        for run in runs:
            blocks = _repeated(run) if len(runs) == 1 or run[0][0].layout.kind == "tokens" else []
            ends.extend(blocks or [_end(run, ends[-1].call.end if ends else 0)])
        ends = self._learning(ends)
        return _without_stem(ends, spots) if self.trace.role == "student" else ends

    def _learning(self, ends: list[Layer]) -> list[Layer]:
        """Drop runs without a parameter, such as a pool alone.

        In the student there is nothing whose rate they could set; in the teacher they stand in for the layer before
        them at another size, which is of use where no later layer has that size.
        """
        holders = [
            c.begin for c in self.trace.calls.values() if any(p is not None for p in c.module._parameters.values())
        ]
        kept = []
        for i, layer in enumerate(ends):
            previous = ends[i - 1].call.end if i else 0
            learns = any(previous < begin <= layer.call.end for begin in holders)
            only = self.trace.role == "teacher" and (i + 1 == len(ends) or ends[i + 1].size != layer.size)
            if learns or only:
                kept.append(layer)
        return kept or ends


def weights(module: nn.Module) -> int:
    """Number of weighted layers in a module (parameters with two or more dimensions)."""
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _outermost(spot: Sequence[Layer]) -> Layer:
    """Of layers that give the same tensor the outermost, by name; of equals the first that ran."""
    return min(spot, key=lambda layer: layer.call.name.count("."))


def _end(run: Sequence[Sequence[Layer]], after: int) -> Layer:
    """The last block of a run: not a norm or a pool that merely follows it; without blocks the last layer.

    Containers that began before the run (``after``: the end of the run before it) name the net rather than the run.
    """
    inside = [[layer for layer in spot if layer.call.begin > after] or spot for spot in run]
    blocks = [spot for spot in inside if any(weights(x.call.module) > 1 for x in spot)]
    return _outermost((blocks or inside)[-1])


def _without_insides(spots: list[list[Layer]]) -> list[list[Layer]]:
    """Drop what lies inside a block, so that blocks with and without a residual path count alike.

    A block is a module of a class that occurs at least twice on the spine, is no plain container, and does not hold
    another module of its class.
    """
    modules = {layer.call.name: layer.call.module for spot in spots for layer in spot}
    kinds = [type(module) for module in modules.values()]
    blocks = [
        name + "."
        for name, module in modules.items()
        if kinds.count(type(module)) > 1
        and type(module) is not nn.Sequential
        and any(True for _ in module.children())
        and sum(isinstance(inner, type(module)) for inner in module.modules()) == 1
    ]
    outside = ([x for x in spot if not x.call.name.startswith(tuple(blocks))] for spot in spots)
    return [spot for spot in outside if spot]


def _repeated(run: Sequence[Sequence[Layer]]) -> list[Layer]:
    """The outermost modules of one class whose names differ only in a number: the blocks of a ViT or a BERT."""
    groups: dict[tuple[type, str], list[Layer]] = {}
    for spot in run:
        for layer in spot:
            pattern = re.sub(r"\d+", "*", layer.call.name)
            if weights(layer.call.module) > 0:
                groups.setdefault((type(layer.call.module), pattern), []).append(layer)
    repeated = {key: layers for key, layers in groups.items() if len(layers) > 1}
    if not repeated:
        return []
    return repeated[min(repeated, key=lambda key: (key[1].count("."), -len(repeated[key])))]


def _without_stem(ends: list[Layer], spots: Sequence[Sequence[Layer]]) -> list[Layer]:
    """Drop leading single layers of the first size before the first block, as long as two layers remain.

    The first convolution of a residual net sees edges only, its map is the largest by far, and attention transfer
    leaves it out; its parameters belong to the first block's stage. Blocks are modules with several weighted layers
    and nothing of the spine inside: a plain net of stages has none, and keeps its first layer.
    """
    layers = [layer for spot in spots for layer in spot]
    blocks = [
        layer
        for layer in layers
        if weights(layer.call.module) > 1 and not any(x.call.name.startswith(layer.call.name + ".") for x in layers)
    ]
    size = ends[0].size if ends else ()
    while len(ends) > 2 and ends[0].size == size and weights(ends[0].call.module) < 2:
        if not any(block.call.begin > ends[0].call.end for block in blocks):
            break
        ends = ends[1:]
    return ends
