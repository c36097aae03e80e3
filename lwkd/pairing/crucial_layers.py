"""The crucial layers of a net: those whose outputs carry everything, where channels or size are about to change.

Legend: *spots*, *runs* and *blocks* as in :mod:`lwkd.pairing.blocks`; the layer at the end of a run is crucial. Long
skips, as in a U-Net, do not count as paths. A *tower* is the layers on all paths from one input to the output: an
encoder and its decoder have one each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.nets.names import unwrap
from lwkd.pairing.blocks import (
    MapLayer,
    Spot,
    last_block,
    outside_blocks,
    repeated,
    repeated_blocks,
    repeated_sums,
    weighted_layers,
    without_heads,
    without_stem,
)
from lwkd.pairing.channel_axis import MOVING_OPS, ChannelAxis, channel_axes, layout_of, output_shape
from lwkd.pairing.spine import Node, long_skips, main_output, parents, spine, topological_order
from lwkd.pairing.tracing import Call, PairingError, Trace

_MAX_SPATIAL = 3
_NORM_OPS = ("NativeLayerNorm", "FusedRmsNorm", "FusedRMSNorm")
_REARRANGING_OPS = (*MOVING_OPS, "Clone", "Slice", "AsStrided")
_POOLING_OPS = ("Mean", "AdaptiveAvgPool", "AdaptiveMaxPool", "MkldnnAdaptiveAvgPool", "Amax", "MaxBackward", "Sum")


class TracedNet:
    """A traced net with the channel axis of every output."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.class_name = type(unwrap(model)).__name__
        self.left_out: set[str] = set()  # layers that are no candidates
        calls = [call for call in trace.calls.values() if call.node is not None]
        self._axes: dict[Node, ChannelAxis] = channel_axes(
            [call.node for call in calls] + self._logits_nodes(),
            {node for sources in trace.sources for node in sources},
            trace.batch,
            {call.node: call.batch_dim for call in calls if call.batch_dim is not None},
        )
        self._check_batch_first()
        self._learned = self._behind_parameters([call.node for call in calls])
        self._begins = sorted(call.begin for call in trace.calls.values() if _has_weights(call.module))
        self._spines = [self._spine(sources) for sources in trace.sources]

    def _check_batch_first(self) -> None:
        """Check that no layer takes the rows of the batch for its sequence.

        Raises:
            PairingError: one does, and nothing shows that the rows are in front all the same.
        """
        trace = self.trace
        logits = () if isinstance(trace.logits, str) else trace.logits.shape
        for call in trace.calls.values():
            axis = self._axes.get(call.given[0])
            if call.batch_dim != 1 or axis is None or axis.batch != 0 or len(axis.shape) != 3:
                continue
            rows, others = axis.shape[:2]
            if others == 1 or (rows != others and len(logits) == 2 and logits[0] == rows):
                continue  # it mixes the rows of a batch, which are in front in what the net gives out, too
            raise PairingError(
                f"layer {call.name!r} of the {trace.role} ({self.class_name}) has batch_first=False and was called "
                f"with shape {axis.shape}, whose first dimension is that of example_input. If the net is called with "
                "sequences first, (N, B), give lwkd and the loop a module around it that takes (B, N) and transposes. "
                "If B and N are the same in example_input, give one in which they differ"
            )

    @property
    def has_path(self) -> bool:
        """Whether a differentiable path leads from the input to the output."""
        return any(self._spines)

    def crucial_layers(self, *, bare: bool) -> list[MapLayer]:
        """The ends of the runs, or the repeated blocks in them.

        Blocks are taken of a run of tokens, of the only run, and of one of two runs that is channels last.

        Args:
            bare: leave out what sets no rate (pools), and the stem of a net made of blocks. A net to compare with may
                keep both, which have sizes that no later layer has.
        """
        return [layer for tower in self.crucial_towers(bare=bare) for layer in tower]

    def crucial_towers(self, *, bare: bool) -> list[list[MapLayer]]:
        """:meth:`crucial_layers` of each tower, without those that have none."""
        towers = [self._crucial_layers_of(spots, bare=bare) for spots in self._towers()]
        return [layers for layers in towers if layers]

    def _crucial_layers_of(self, tower: list[list[MapLayer]], *, bare: bool) -> list[MapLayer]:
        spots = [spot for spot in outside_blocks(tower) if spot[0].positions > 1]
        runs = [list(run) for _, run in groupby(spots, key=lambda spot: spot[0].map_shape)]
        ends: list[MapLayer] = []
        token_blocks: list[MapLayer] = []
        for run in runs:
            kinds = {spot[0].layout.kind for spot in run}  # a convolution may have made the tokens
            tokens = "tokens" in kinds
            one_stage = len(runs) == 1 or (len(runs) == 2 and "channels_last" in kinds)  # SAM: blocks, and a neck
            blocks = repeated_blocks(run) if one_stage or tokens else []
            sums = self._sums(run, ends) if (one_stage or tokens) and not blocks else []
            if tokens and (sums or any(weighted_layers(block) > 1 for block in blocks)):
                token_blocks += blocks or sums
            ends.extend(blocks or sums or [last_block(run, _end(ends))])
        if token_blocks:
            ends = without_heads(ends, spots, token_blocks)
        ends = self._with_parameters(ends, bare=bare)
        return without_stem(ends, spots) if bare else ends

    def _sums(self, run: Sequence[Spot], ends: list[MapLayer]) -> list[MapLayer]:
        """Where no block is a module: the sums behind each, and the last layer of the run."""
        sums = repeated_sums(run)
        last = last_block(run, _end(ends))
        same = not sums or self._compared(last) is self._compared(sums[-1])
        return sums if same else [*sums, last]

    def spots(self) -> list[list[MapLayer]]:
        """Usable layers on the spine in execution order, those that give out the same tensor together.

        Those of one position are among them.
        """
        return [spot for _, spot in self._best_spine()[0]]

    def _towers(self) -> list[list[list[MapLayer]]]:
        """The spots of each tower, in execution order: one tower, unless inputs lead through blocks of their own.

        A decoder reads its encoder's output in every block, and begins behind it, so that hardly a layer is on all
        paths from all inputs. Where the paths from one input alone run through repeated blocks that the spine lacks,
        the spots are those of every such input. What towers share belongs to the last of them.
        """
        spots = self.spots()
        known = {layer.call.name for spot in spots for layer in spot}
        sources = list({node: None for sources in self.trace.sources for node in sources})
        if len(sources) < 2:
            return [spots]
        alone = [[spot for _, spot in self._spots_of(self._spine([source]))] for source in sources]
        found: dict[frozenset[str], list[list[MapLayer]]] = {}
        for blocks_of in (repeated, repeated_sums):
            for tower in alone if not found else ():
                if blocks := frozenset(layer.call.name for layer in blocks_of(tower) if _may_be_block(layer)):
                    found.setdefault(blocks, tower)
        if not any(blocks - known for blocks in found):
            return [spots]
        # By their blocks: the words of both may be looked up in one embedding before either begins.
        towers = [found[blocks] for blocks in sorted(found, key=self._first_end)]
        later: set[str] = set()
        for i in reversed(range(len(towers))):
            towers[i] = [spot for spot in towers[i] if later.isdisjoint(layer.call.name for layer in spot)]
            later |= {layer.call.name for spot in towers[i] for layer in spot}
        return towers

    def _first_end(self, names: Iterable[str]) -> int:
        return min(self.trace.calls[name].end for name in names)

    def end_of_stages(self, last: MapLayer) -> int:
        """When the stages end that begin with or behind ``last``, the last map of more than one position.

        On a small picture, strides leave one position to the last stages, and nothing can be compared there. They end
        where the net pools over the positions or drops them.
        """
        found, on_spine = self._best_spine()
        spots, end, begun = dict(found), last.call.end, False
        for node in on_spine:
            at = spots.get(node, [])
            if begun and (node.name().startswith(_POOLING_OPS) or len(output_shape(node) or ()) < 3):
                break
            begun = begun or any(layer.call is last.call for layer in at)
            if begun and at and at[0].positions == 1 and at[0].layout.kind != "tokens":
                end = max(end, *(layer.call.end for layer in at))
        return end

    def logits_layout(self) -> tuple[tuple[int, ...], Layout]:
        """Shape of the net's logits, and where their classes are.

        Raises:
            PairingError: no logits, or three dimensions of which nothing says which holds the classes.
        """
        logits = self.trace.logits
        if isinstance(logits, str):
            raise PairingError(f"head=True compares logits; {logits}. Leave out head=True")
        if len(logits.shape) < 2 or logits.shape[0] != self.trace.batch:
            raise PairingError(
                f"head=True compares logits (batch, classes, ...); the {self.trace.role} ({self.class_name}) gives "
                f"shape {logits.shape} for a batch of {self.trace.batch}. Leave out head=True"
            )
        axis = self._axes.get(logits.node)
        dim = 1 if len(logits.shape) != 3 else None if axis is None else axis.dim
        if dim not in (1, 2):
            raise PairingError(
                f"the {self.trace.role} ({self.class_name}) gives logits of shape {logits.shape}, whose classes may be "
                "at dimension 1 (batch, classes, positions) or last (batch, tokens, classes), and the operations that "
                "made them do not say which. Leave out head=True"
            )
        return logits.shape, Layout("logits" if dim == 1 else "logits_last")

    def _logits_nodes(self) -> list[Node]:
        logits = self.trace.logits
        return [] if isinstance(logits, str) or logits.node is None else [logits.node]

    def _spine(self, sources: list[Node]) -> dict[Node, tuple[int, int]]:
        output = main_output(sources, self.trace.outputs)
        return {} if output is None else spine(sources, output, long_skips(sources, output, self._positions))

    def _positions(self, node: Node) -> int | None:
        """Number of map positions in a node's output; None where its channels are not known, or it repeats a tensor."""
        axis = self._axes.get(node)
        if axis is None or axis.dim is None or node.name().startswith("Expand"):
            return None
        return math.prod(axis.shape) // (self.trace.batch * axis.shape[axis.dim]) or None

    def _best_spine(self) -> tuple[list[tuple[Node, list[MapLayer]]], list[Node]]:
        """The spots of the spine that has most of them, each with its node, and the nodes of that spine."""
        best: tuple[list[tuple[Node, list[MapLayer]]], list[Node]] = ([], [])
        for positions in self._spines:
            best = max(best, (self._spots_of(positions), list(positions)), key=lambda found: len(found[0]))
        return best

    def _spots_of(self, positions: dict[Node, tuple[int, int]]) -> list[tuple[Node, list[MapLayer]]]:
        """The spots of a spine, each with its node."""
        at: dict[Node, list[MapLayer]] = {}
        for call in self.trace.calls.values():
            if call.name in self.left_out:
                continue
            _, index = positions.get(call.node, (-1, -1))
            layer = self._any_map(call) if call.usable and call.name and index == call.output_index else None
            if layer is not None and not self.is_flat(layer) and self.learns(layer):
                at.setdefault(call.node, []).append(layer)
        for call in self.trace.calls.values():  # norms in front of branches read sums that no module gives out
            node, given = call.given
            _, index = positions.get(node, (-1, -1))
            layer = self._any_map(call) if call.norms and index == given else None
            if layer is not None and call.node not in positions and self.learns(layer):
                at.setdefault(node, []).append(replace(layer, reads=True))
        at = {node: self._makers(layers) for node, layers in at.items()}
        return [(node, at[node]) for node in sorted(at, key=lambda node: positions[node][0])]

    def _makers(self, layers: list[MapLayer]) -> list[MapLayer]:
        """Without the modules that went on with other layers once the tensor was there, as those that return a list."""
        made = min(layer.call.begin if layer.reads else layer.call.end for layer in layers)
        next_begin = next((begin for begin in self._begins if begin > made), math.inf)
        return [layer for layer in layers if layer.reads or layer.call.end < next_begin] or layers

    def map_layer(self, call: Call) -> MapLayer | None:
        """The layer of this call; None if its output is not a map of more than one position over the batch."""
        layer = self._any_map(call)
        return layer if layer is not None and layer.positions > 1 else None

    def _any_map(self, call: Call) -> MapLayer | None:
        shape = call.shape
        if shape is None or not 3 <= len(shape) <= 2 + _MAX_SPATIAL:
            return None
        layout = layout_of(self._axes.get(call.node), shape, self.trace.batch, self.trace.image)
        if layout is None:
            return None
        norm = self._norm_of(call)
        return MapLayer(call, layout if norm is None else replace(layout, before=norm.name))

    def is_flat(self, layer: MapLayer) -> bool:
        """Whether the layer's map is the same at all positions: it ends in a norm whose input cannot be read."""
        node = layer.call.node
        while node is not None and node.name().startswith(_REARRANGING_OPS):
            node = next((parent for parent, _ in parents(node)), None)
        return layer.layout.before is None and node is not None and node.name().startswith(_NORM_OPS)

    def on_spine(self, layer: MapLayer) -> bool:
        """Whether everything that the net does with an input runs through the layer's output."""
        return any(layer.call.node in spine for spine in self._spines)

    def learns(self, layer: MapLayer) -> bool:
        """Whether any parameter has a say in the layer's map: patches of a picture are the same in all nets."""
        node = self._compared(layer)
        return node is None or not self.trace.leaves or node in self._learned

    def _compared(self, layer: MapLayer) -> Node:
        """The node of what is compared: of the layer's output, or of its norm's input."""
        norm = layer.layout.before
        return layer.call.node if norm is None else self.trace.calls[norm].given[0]

    def _behind_parameters(self, ends: list[Node]) -> set[Node]:
        """The nodes, of those from which the ends were computed, that a parameter leads to."""
        found: set[Node] = set()
        for node in topological_order(ends):
            own = id(getattr(node, "variable", None)) in self.trace.leaves
            if own or any(parent in found for parent, _ in parents(node)):
                found.add(node)
        return found

    def _norm_of(self, call: Call) -> Call | None:
        """The norm over the channels that gave out this call's output, the innermost where one holds another."""
        if call.node is None:
            return None
        same = (c for c in self.trace.calls.values() if c.node is call.node and c.output_index == call.output_index)
        return max((c for c in same if c.norms), key=lambda c: c.name.count("."), default=None)

    def _with_parameters(self, ends: list[MapLayer], *, bare: bool) -> list[MapLayer]:
        """Drop the ends of runs without a parameter, such as a pool alone.

        In the student there is nothing whose rate they could set. In the teacher they give the output of the layer
        before them at a smaller size, which is of use where no later layer has that size.
        """
        holders = [
            c.begin for c in self.trace.calls.values() if any(p is not None for p in c.module._parameters.values())
        ]
        kept = []
        for i, layer in enumerate(ends):
            previous = ends[i - 1].call.end if i else 0
            learns = any(previous < begin <= layer.call.end for begin in holders)
            last_of_size = i + 1 == len(ends) or ends[i + 1].size != layer.size
            smaller = i > 0 and layer.positions < ends[i - 1].positions
            if learns or (not bare and last_of_size and smaller):
                kept.append(layer)
        return kept or ends


def _end(layers: list[MapLayer]) -> int:
    return layers[-1].call.end if layers else 0


def _may_be_block(layer: MapLayer) -> bool:
    """Whether a layer that is there several times has several weights, or gives or reads a sum of tokens."""
    return weighted_layers(layer) > 1 or (weighted_layers(layer) == 0 and layer.layout.kind == "tokens")


def _has_weights(module: nn.Module) -> bool:
    """Whether a module itself has parameters of two or more dimensions."""
    return any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())
