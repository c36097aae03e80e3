"""The autograd graph of one forward pass: its topological order, and its spine.

A tensor is on the *spine* if every path from the input to the output runs through it. The outputs of residual blocks
are on the spine; tensors inside their branches, inside squeeze-and-excite gates and inside inception branches are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Node = Any
"""A ``grad_fn`` of torch.autograd; kept alive while in use, since torch recreates dropped Python objects."""


def spine(sources: Sequence[Node], output: Node) -> dict[Node, tuple[int, int]]:
    """Spine nodes → (position in execution order, index of the node's output that the paths use).

    In an order that respects the graph, a node is on the spine exactly if no edge jumps over it. Nodes with several
    outputs of which the paths use more than one are left out: none of these outputs carries everything.

    Args:
        sources: nodes that stand for the input.
        output: node of the model's output.

    Returns:
        Empty if no path leads from a source to the output.
    """
    starts = set(sources)
    on_path: set[Node] = set()
    order = []
    for node in topological_order([output]):
        if node in starts or any(parent in on_path for parent, _ in parents(node)):
            on_path.add(node)
            order.append(node)
    if not order or order[-1] is not output:
        return {}
    position = {node: i for i, node in enumerate(order)}
    last_reader = [0] * len(order)  # per node, the position of the last node that reads it
    used: dict[Node, set[int]] = {node: set() for node in order}
    used[output].add(0)
    for node in order:
        for parent, index in parents(node):
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


def topological_order(ends: Iterable[Node]) -> list[Node]:
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
                stack.extend((parent, False) for parent, _ in parents(node))
    return order


def parents(node: Node) -> list[tuple[Node, int]]:
    """The nodes whose outputs this node reads, each with the index of that output."""
    return [(parent, index) for parent, index in node.next_functions if parent is not None]
