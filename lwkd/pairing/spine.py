"""The autograd graph of one forward pass: its topological order, and its spine.

A tensor is on the *spine* if every path from the input to the output runs through it. The outputs of residual blocks
are on the spine; tensors inside their branches, inside squeeze-and-excite gates and inside inception branches are not.

A U-Net joins each stage of its encoder to a stage of its decoder by a *long skip*, and no tensor in between is on every
path. Such edges are found first, and the spine is that of the graph without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

Node = Any
"""A ``grad_fn`` of torch.autograd; kept alive while in use, since torch recreates dropped Python objects."""


Edge = tuple[Node, Node]
"""A node, and a parent whose output it reads."""

_WEIGHTED_OPS = ("Convolution", "MkldnnConvolution", "SlowConv", "ThnnConv", "Addmm", "Mm", "Linear", "MkldnnLinear")
_SKIPPED_WEIGHTS = 2  # a long skip bypasses at least so many more weighted layers than it has itself


def spine(sources: Sequence[Node], output: Node, without: Collection[Edge] = ()) -> dict[Node, tuple[int, int]]:
    """Spine nodes → (position in execution order, index of the node's output that the paths use).

    In an order that respects the graph, a node is on the spine exactly if no edge jumps over it. Nodes with several
    outputs of which the paths use more than one are left out: none of these outputs carries everything.

    Args:
        sources: nodes that stand for the input.
        output: node of the model's output.
        without: edges that do not count, from :func:`long_skips`.

    Returns:
        Empty if no path leads from a source to the output.
    """
    starts = set(sources)
    order = _on_paths(starts, output, without)
    if not order:
        return {}
    position = {node: i for i, node in enumerate(order)}
    last_reader = [0] * len(order)  # per node, the position of the last node that reads it
    used: dict[Node, set[int]] = {node: set() for node in order}
    used[output].add(0)
    for node in order:
        for parent, index in parents(node, without):
            if parent in position:
                last_reader[position[parent]] = max(last_reader[position[parent]], position[node])
                used[parent].add(index)
    # The furthest position that edges from the nodes so far lead to. No node before the last source is on every path.
    reach = max(position[source] for source in starts if source in position)
    found = {}
    for i, node in enumerate(order):
        if reach <= i and len(used[node]) == 1:
            found[node] = (i, next(iter(used[node])))
        reach = max(reach, last_reader[i])
    return found


def long_skips(sources: Sequence[Node], output: Node, positions: Callable[[Node], int | None]) -> set[Edge]:
    """Edges by which tensors jump over a stretch of the net that makes the map smaller and then larger again.

    Where paths meet, one that came through a smaller map and was enlarged again, and has more weighted layers, is the
    net's own way; the others, as far as they lead from where the paths parted, are skips. The branches of a residual
    block, of an inception block, of a gate that is multiplied in, or of attention with fewer keys than queries are
    none: no map in them is enlarged.

    Args:
        sources: nodes that stand for the input.
        output: node of the model's output.
        positions: number of map positions in a node's output; None where that is not known.
    """
    starts, skips = set(sources), set[Edge]()
    parted: dict[Node, Node] = {}  # the nearest node that all paths to a node run through; None: there is none
    depth: dict[Node, int] = {None: 0}
    here: dict[Node, int] = {}  # positions, those of the largest parent where they are not known
    enlarged: set[Node] = set()
    for node in _on_paths(starts, output):
        before = [] if node in starts else [p for p in dict(parents(node)) if p in here]
        largest = max((here[p] for p in before), default=0)
        here[node] = positions(node) or largest
        if before and here[node] > largest > 0:
            enlarged.add(node)
        parted[node] = _where_parted(before, parted, depth)
        meeting = [p for p in before if here[p] == here[node]]
        if len(meeting) > 1 and enlarged:
            found = {p: _stretch(p, parted[node], here, enlarged, skips) for p in meeting}
            smallest, _, weights = min((s for s in found.values() if s[1]), default=(here[node], False, 0))
            skips |= {
                (node, p)
                for p, (size, _, own) in found.items()
                if smallest < min(size, here[node]) and weights >= own + _SKIPPED_WEIGHTS
            }
            parted[node] = _where_parted([p for p in before if (node, p) not in skips], parted, depth)
        depth[node] = depth[parted[node]] + 1
    return skips


def main_output(sources: Sequence[Node], outputs: Sequence[Node]) -> Node:
    """The output that the paths from these sources lead to; None if there is no path.

    The first one, unless the deepest, in weighted layers, is more than twice as deep: nets give the outputs of stages
    from the shallowest on.
    """
    starts, depth = set(sources), dict[Node, int]()
    for node in topological_order(outputs):
        before = [depth[parent] for parent, _ in parents(node) if parent in depth]
        if node in starts or before:
            depth[node] = max(before, default=0) + node.name().startswith(_WEIGHTED_OPS)
    reached = [output for output in outputs if output in depth]
    if not reached:
        return None
    deepest = max(reached, key=depth.__getitem__)
    return reached[0] if 2 * depth[reached[0]] >= depth[deepest] else deepest


def _where_parted(nodes: Sequence[Node], parted: dict[Node, Node], depth: dict[Node, int]) -> Node:
    """The nearest node that all paths to all of these nodes run through; None if there is none."""
    common = nodes[0] if nodes else None
    for node in nodes[1:]:
        while common is not node:
            if depth[common] >= depth[node]:
                common = parted[common]
            else:
                node = parted[node]
    return common


def _stretch(
    end: Node, start: Node, here: dict[Node, int], enlarged: set[Node], skips: Collection[Edge]
) -> tuple[int, bool, int]:
    """Between two nodes: the smallest number of positions, whether a map is enlarged, the most weighted layers."""
    if end is start:
        return here[end], False, 0
    inside, stack = {end}, [end]
    while stack:
        for parent, _ in parents(stack.pop(), skips):
            if parent in here and parent is not start and parent not in inside:
                inside.add(parent)
                stack.append(parent)
    weights: dict[Node, int] = {}
    for node in (n for n in here if n in inside):  # here is in execution order
        most = max((weights[p] for p, _ in parents(node, skips) if p in weights), default=0)
        weights[node] = most + node.name().startswith(_WEIGHTED_OPS)
    return min(here[n] for n in inside), not enlarged.isdisjoint(inside), weights[end]


def _on_paths(starts: set[Node], output: Node, without: Collection[Edge] = ()) -> list[Node]:
    """The nodes on the paths from the starts to the output, in execution order; empty if there is no path."""
    on_path: dict[Node, None] = {}
    for node in topological_order([output], without):
        if node in starts or any(parent in on_path for parent, _ in parents(node, without)):
            on_path[node] = None
    return list(on_path) if output in on_path else []


def topological_order(ends: Iterable[Node], without: Collection[Edge] = ()) -> list[Node]:
    """All nodes from which the ends were computed, every node after those it reads."""
    order: list[Node] = []
    opened: set[Node] = set()
    for end in ends:
        stack = [(end, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in opened:
                opened.add(node)
                stack.append((node, True))
                stack.extend((parent, False) for parent, _ in parents(node, without))
    return order


def parents(node: Node, without: Collection[Edge] = ()) -> list[tuple[Node, int]]:
    """The nodes whose outputs this node reads, each with the index of that output."""
    found = [(parent, index) for parent, index in node.next_functions if parent is not None]
    return [edge for edge in found if (node, edge[0]) not in without] if without else found
