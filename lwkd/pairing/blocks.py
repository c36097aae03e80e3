"""Layers that give a map, and the blocks among them.

Legend: a *spot* is the layers that give out the same tensor of the spine (a block and the last layer in it), and the
norms in front of branches that read it; a *run* is a stretch of spots over which channels and size stay the same. A
*block* is a module with several weighted layers, such as a residual block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.pairing.tracing import Call


@dataclass(frozen=True, eq=False)
class MapLayer:
    """A layer whose output can be compared: a map, of more than one position unless that is said."""

    call: Call
    layout: Layout
    reads: bool = False  # stands for the tensor that it reads: a norm in front of a branch

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
    def positions(self) -> int:
        """Number of positions of the map."""
        return math.prod(self.size)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Channels and spatial sizes."""
        return self.layout.shape(self.shape)[1:]


Spot = Sequence[MapLayer]


def outside_blocks(spots: Sequence[Spot]) -> list[Spot]:
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


def repeated_blocks(run: Sequence[Spot]) -> list[MapLayer]:
    """The outermost modules of one class whose names differ only in a number: the blocks of a ViT or a BERT."""
    groups = _repeated_groups(run)
    if not groups:
        return []
    return groups[min(groups, key=lambda key: (key[1].count("."), -len(groups[key])))]


def repeated_sums(run: Sequence[Spot]) -> list[MapLayer]:
    """What is there once a block, where the blocks are no modules: residual sums, or the norms that read them.

    Layers without weights of one class whose names differ in one number, where no block gives out the same; the largest
    such group. The first norm reads what is in front of the first block, and is left out.
    """
    groups: dict[tuple[type, str], list[MapLayer]] = {}
    for spot in run:
        for layer in spot if all(weighted_layers(layer) < 2 for layer in spot) else ():
            parts = layer.call.name.split(".")
            for place, part in enumerate(parts):
                if part.isdigit() and weighted_layers(layer) == 0:
                    pattern = ".".join([*parts[:place], "*", *parts[place + 1 :]])
                    groups.setdefault((type(layer.call.module), pattern), []).append(layer)
    found = max(groups.values(), key=lambda layers: (not layers[0].reads and len(layers) > 1, len(layers)), default=[])
    if len(found) < 2:
        return []
    return found[1:] if found[0].reads else found


def repeated(spots: Sequence[Spot]) -> list[MapLayer]:
    """All layers with weights that are there several times."""
    return [layer for layers in _repeated_groups(spots).values() for layer in layers]


def _repeated_groups(spots: Sequence[Spot]) -> dict[tuple[type, str], list[MapLayer]]:
    """Layers with weights of one class, several of them, whose names differ only in a number."""
    groups: dict[tuple[type, str], list[MapLayer]] = {}
    for spot in spots:
        for layer in spot:
            pattern = re.sub(r"\d+", "*", layer.call.name)
            if weighted_layers(layer) > 0:
                groups.setdefault((type(layer.call.module), pattern), []).append(layer)
    return {key: layers for key, layers in groups.items() if len(layers) > 1}


def without_heads(ends: list[MapLayer], spots: Sequence[Spot], token_blocks: Collection[MapLayer]) -> list[MapLayer]:
    """The blocks of a net of token blocks, without what stands in front of them and behind.

    Left out are embeddings, the single convolutions of a feature extractor, and heads that give every token classes (a
    language model's) or another width.
    """
    several = {layer.call.name for layer in repeated(spots)}

    def counts(layer: MapLayer) -> bool:
        block = weighted_layers(layer) > 1 and (layer.layout.kind != "tokens" or layer.call.name in several)
        return block or layer in token_blocks

    return [layer for layer in ends if counts(layer)]


def last_block(run: Sequence[Spot], after: int) -> MapLayer:
    """The last block of a run: not a norm or a pool that merely follows it; without blocks the last layer.

    A container that began before the run (``after``: the end of the run before it) holds more than the run, and counts
    only where nothing else gives out its tensor.
    """
    made = [[layer for layer in spot if not layer.reads] or spot for spot in run]
    inside = [[layer for layer in spot if layer.call.begin > after] or spot for spot in made]
    blocks = [spot for spot in inside if any(weighted_layers(layer) > 1 for layer in spot)]
    # The outermost by name; of equals the first that ran.
    return min((blocks or inside)[-1], key=lambda layer: layer.call.name.count("."))


def without_stem(ends: list[MapLayer], spots: Sequence[Spot]) -> list[MapLayer]:
    """Drop leading single layers of the first size before the first block, as long as two layers remain.

    The first convolution of a residual net sees edges only, its map is the largest by far, and attention transfer
    leaves it out; its parameters belong to the first block's run. Only blocks with nothing of the spine inside count: a
    plain net of stages has none, and keeps its first layer.
    """
    layers = [layer for spot in spots for layer in spot]
    blocks = [
        layer
        for layer in layers
        if weighted_layers(layer) > 1 and not any(x.call.name.startswith(layer.call.name + ".") for x in layers)
    ]
    size = ends[0].size if ends else ()
    while len(ends) > 2 and ends[0].size == size and weighted_layers(ends[0]) < 2:
        if not any(block.call.begin > ends[0].call.end for block in blocks):
            break
        ends = ends[1:]
    return ends


def weighted_layers(layer: MapLayer) -> int:
    """Number of weighted layers in a layer (parameters with two or more dimensions)."""
    return sum(parameter.dim() > 1 for parameter in layer.call.module.parameters())
