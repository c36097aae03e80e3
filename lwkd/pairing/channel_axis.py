"""Which dimension of a layer's output holds the channels, and which the batch, followed through the autograd graph.

Convolutions, batch and group norms put channels at dimension 1; layer norms, linear layers, recurrent layers and
embeddings put them at the last; permutations, reshapes and stacks move them; all other operations keep them where they
were. Where they are not known before a pool, or before a convolution reads them, they are at dimension 1. The batch,
the grid that image tokens came from, and the class tokens put in front of them, are followed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from lwkd.nets.layout import Layout
from lwkd.pairing.spine import Node, parents, topological_order

_CHANNELS_FIRST_OPS = (
    "Convolution",
    "MkldnnConvolution",
    "SlowConv",
    "ThnnConv",
    "BatchNorm",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "GroupNorm",
    "NativeGroupNorm",
    "PixelShuffle",
    "PixelUnshuffle",
)
_RESIZING_OPS = (
    "MaxPool",
    "AvgPool",
    "AdaptiveMaxPool",
    "AdaptiveAvgPool",
    "MkldnnAdaptiveAvgPool",
    "FractionalMaxPool",
    "Upsample",
    "GridSampler",
)
"""Over the last dimensions, whatever these hold: pooling over a part of (B, H, W, C) is done by transposing first."""
_CHANNELS_LAST_OPS = ("Addmm", "Mm", "Linear", "MkldnnLinear", "Embedding")
_RECURRENT_OPS = ("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn")
_AXIS_LOST_OPS = ("Bmm", "Baddbmm", "ScaledDotProduct")
_PERMUTING_OPS = ("Permute", "Transpose", "TBackward")
_RESHAPE_OPS = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze", "Alias")
MOVING_OPS = (*_PERMUTING_OPS, *_RESHAPE_OPS)
"""They give the same numbers in another order."""

_MAX_PREFIX = 8  # class and register tokens; if N − g² is larger, the square g² is a coincidence


@dataclass(frozen=True)
class ChannelAxis:
    """Channels are at dimension ``dim`` of ``shape`` (None: not known), rows of the batch at dimension ``batch``.

    ``grid`` and ``prefix`` are as in Layout; a ``prefix`` of None says that the grid's tokens are mixed with others in
    an order that no layout can express, or that there is no grid.
    ``merged`` is the axis before two dimensions were merged into one: batch and tokens, as linear layers do, or batch
    and channels, as instance norms do, which are batch norms of one row.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    batch: int | None = None
    grid: tuple[int, int] | None = None
    prefix: int | None = 0
    merged: ChannelAxis | None = None

    @property
    def folded(self) -> bool:
        """Whether batch and channels are one dimension."""
        return self.merged is not None and len(self.merged.shape) == len(self.shape) and self.shape[0] == 1

    @property
    def no_grid(self) -> int | None:
        """The prefix of what is made of this and has no grid yet: None if it can have none."""
        return None if self.prefix is None else 0

    @property
    def tokens_dim(self) -> int | None:
        """The dimension of the tokens; None unless there are three dimensions and the channels are known."""
        batch = self.batch or 0
        return 3 - self.dim - batch if len(self.shape) == 3 and self.dim not in (None, batch) else None


def channel_axes(
    ends: Iterable[Node],
    inputs: Collection[Node] = (),
    batch: int = 1,
    said: Mapping[Node, int] | None = None,
) -> dict[Node, ChannelAxis]:
    """Channel axis of every node from which the ends were computed.

    Args:
        ends: the nodes.
        inputs: nodes of the net's inputs, whose rows are in front; where none is given, no rows are followed.
        batch: number of rows.
        said: the dimension of the rows, of outputs ``(B, N, C)`` or ``(N, B, C)`` whose layer says it; counts where the
            graph does not tell.
    """
    axes: dict[Node, ChannelAxis] = {}
    order = topological_order(ends)
    for node in order:
        shape = output_shape(node)
        if shape is None:
            continue
        axis = _axis_after(node, shape, axes)
        if axis.batch is None and said and node in said and axis.shape[said[node]] == batch:
            axis = replace(axis, dim=2, batch=said[node])
        if node in inputs:  # token ids may be given to their embedding the other way round
            looked_up = node.name().startswith("Embedding") and len(axis.shape) == 3
            turned = looked_up and axis.shape[0] != batch == axis.shape[1]
            axis = replace(axis, batch=1 if turned else 0)
        axes[node] = axis
    for node in reversed(order):
        for parent, dim in _said_of_parents(node, axes):
            axes[parent] = replace(axes[parent], dim=dim)
    return axes


def output_shape(node: Node) -> tuple[int, ...] | None:
    """Shape of a node's first output; None where it is not a plain tensor's."""
    metadata = getattr(node, "_input_metadata", ())
    if not metadata or metadata[0].is_nested_tensor:
        return None
    return tuple(metadata[0].shape)


def _said_of_parents(node: Node, axes: Mapping[Node, ChannelAxis]) -> Iterator[tuple[Node, int]]:
    """Inputs whose channels are not known, and where this node says that they are."""
    axis, name = axes.get(node), node.name()
    if axis is None or axis.dim is None or len(axis.shape) < 3 or name.startswith(MOVING_OPS):
        return
    proves = name.startswith(_CHANNELS_FIRST_OPS)  # of its first input; the others are parameters
    for parent, _ in parents(node)[: 1 if proves else None]:
        before = axes.get(parent)
        if before is None or before.dim is not None or len(before.shape) != len(axis.shape):
            continue
        if proves or "Pad" in name or before.shape == axis.shape:
            yield parent, axis.dim


def layout_of(axis: ChannelAxis | None, shape: tuple[int, ...], batch: int, image: bool) -> Layout | None:
    """The layout of a feature of rank 3 or more; None where the rows of the batch are not where a layout has them.

    Args:
        axis: the channel axis of the feature's node; unknown channels count as first, in three dimensions as last
            (tokens).
        shape: shape of the feature.
        batch: number of rows.
        image: whether tokens whose grid is not known may be the square grid of a picture, behind at most 8 others.
    """
    axis = ChannelAxis(shape) if axis is None or axis.shape != shape else axis
    second = len(shape) == 3 and axis.batch == 1 and axis.dim in (None, 2)
    if (axis.batch and not second) or shape[1 if second else 0] != batch:
        return None
    if len(shape) > 3:
        if axis.dim not in (None, 1, len(shape) - 1):  # (time, batch, channels, ...), say
            return None
        return Layout("channels_last" if axis.dim == len(shape) - 1 else "channels_first")
    if axis.dim == 1:
        return Layout("channels_first")
    tokens = partial(Layout, "tokens", batch_first=not second)
    if axis.grid is not None and axis.prefix is not None:
        return tokens(axis.prefix, axis.grid)
    positions = shape[0 if second else 1]
    side = math.isqrt(positions)
    prefix = positions - side * side
    if image and side > 1 and prefix <= _MAX_PREFIX and axis.prefix is not None:
        return tokens(prefix, (side, side))
    return tokens()


def _axis_after(node: Node, shape: tuple[int, ...], axes: dict[Node, ChannelAxis]) -> ChannelAxis:
    """The channel axis of an operation's output, from those of its inputs."""
    name = node.name()
    known = [axes[parent] for parent, _ in parents(node) if parent in axes]
    if name.startswith(_RESHAPE_OPS):
        return _reshaped(known[0], shape) if known else ChannelAxis(shape)
    if name.startswith(_PERMUTING_OPS):
        return _permuted(known[0], shape, _permutation(node, len(shape))) if known else ChannelAxis(shape)
    if name.startswith(("Select", "Unbind")):
        return _selected(known[0], shape, _signed(node._saved_dim)) if known else ChannelAxis(shape)
    if name.startswith("Stack"):
        return _stacked(known, shape, _signed(node._saved_dim) % len(shape))
    if name.startswith(_RECURRENT_OPS):
        return ChannelAxis(shape, len(shape) - 1, known[0].batch if known else None, prefix=None)
    of_equal_rank = [axis for axis in known if len(axis.shape) == len(shape)]
    before = max(of_equal_rank, key=_knowledge, default=ChannelAxis(shape))
    unknown = before.dim is None and name.startswith(_RESIZING_OPS)
    if (name.startswith(_CHANNELS_FIRST_OPS) and not before.folded) or unknown:
        return ChannelAxis(shape, 1 if len(shape) > 1 else None, batch=0)
    if name.startswith(_AXIS_LOST_OPS):
        return ChannelAxis(shape)
    if name.startswith("Embedding"):  # words, which are no grid even where the net also reads a picture
        return ChannelAxis(shape, len(shape) - 1, prefix=None)
    last = len(shape) - 1
    puts_last = name.startswith(_CHANNELS_LAST_OPS) or len(getattr(node, "_saved_normalized_shape", ())) == 1
    if puts_last and before.dim != last:
        before = ChannelAxis(shape, last, before.batch, prefix=before.no_grid, merged=before.merged)
    return _with_prefix(node, before, shape, axes)


def _reshaped(axis: ChannelAxis, shape: tuple[int, ...]) -> ChannelAxis:
    """The axis after a reshape.

    Channels and batch are the dimensions of the same size with as many elements ahead of them. Where the two spatial
    dimensions were merged into one, they are the grid.
    """
    if not axis.shape or not shape:
        return ChannelAxis(shape)
    dim, batch = (_found_again(old, axis.shape, shape) for old in (axis.dim, axis.batch))
    after = ChannelAxis(shape, dim, batch, prefix=axis.no_grid)
    if len(axis.shape) == 3 and shape == (axis.shape[0] * axis.shape[1], axis.shape[2]) and axis.dim in (None, 2):
        return replace(after, merged=axis)
    if axis.merged is not None and shape == axis.merged.shape and len(axis.shape) == len(shape):
        return axis.merged
    if len(axis.shape) > 2 and shape == (1, axis.shape[0] * axis.shape[1], *axis.shape[2:]) and axis.dim in (None, 1):
        return replace(after, dim=None, merged=replace(axis, dim=1))
    if axis.merged is not None and after.dim == 2 and shape[:2] == axis.merged.shape[:2]:
        return replace(after, batch=axis.merged.batch, grid=axis.merged.grid, prefix=axis.merged.prefix)
    batch_kept = after.batch is not None or (axis.batch is None and shape[0] == axis.shape[0])
    if after.tokens_dim is None or not batch_kept:
        return after
    if axis.tokens_dim is not None and axis.shape[axis.tokens_dim] == shape[after.tokens_dim]:
        return replace(after, grid=axis.grid, prefix=axis.prefix)
    spatial = [size for i, size in enumerate(axis.shape) if i not in (axis.batch or 0, axis.dim)]
    if len(axis.shape) == 4 and math.prod(spatial) == shape[after.tokens_dim]:
        return replace(after, grid=(spatial[0], spatial[1]), prefix=0)
    return after


def _selected(axis: ChannelAxis, shape: tuple[int, ...], at: int) -> ChannelAxis:
    """The axis without one dimension, as of one step of a sequence."""
    at %= len(axis.shape)
    dim, batch = (None if old in (None, at) else old - (old > at) for old in (axis.dim, axis.batch))
    return ChannelAxis(shape, dim, batch, prefix=axis.no_grid)


def _stacked(known: list[ChannelAxis], shape: tuple[int, ...], at: int) -> ChannelAxis:
    """The axis of tensors stacked along a new dimension, such as the steps of a recurrent cell, which are no grid."""
    dim = max(known, key=_knowledge, default=ChannelAxis(())).dim
    return ChannelAxis(shape, None if dim is None else dim + (dim >= at), prefix=None)


def _found_again(dim: int | None, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Where a dimension is after a reshape; None where it is split, merged, or was not known."""
    if dim is None:
        return None
    ahead = math.prod(before[:dim])
    return next((i for i, size in enumerate(after) if size == before[dim] and math.prod(after[:i]) == ahead), None)


def _permuted(axis: ChannelAxis, shape: tuple[int, ...], order: list[int]) -> ChannelAxis:
    dim, batch = (None if old is None else order.index(old) for old in (axis.dim, axis.batch))
    after = ChannelAxis(shape, dim, batch, prefix=axis.no_grid)
    return replace(after, grid=axis.grid, prefix=axis.prefix) if batch is not None or order[0] == 0 else after


def _permutation(node: Node, rank: int) -> list[int]:
    """For each dimension of the output, the dimension of the input that it was."""
    if node.name().startswith("Permute"):
        return [_signed(dim) % rank for dim in node._saved_dims]
    order = list(range(rank))
    saved = (0, 1) if node.name().startswith("TBackward") else (node._saved_dim0, node._saved_dim1)
    one, other = (_signed(dim) % rank for dim in saved)
    order[one], order[other] = order[other], order[one]
    return order


def _signed(dim: int) -> int:
    """Torch hands out saved negative dimensions as unsigned 64-bit numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


def _knowledge(axis: ChannelAxis) -> tuple[bool, ...]:
    """Sort key for the inputs of a sum: the residual path is the one of which most is known."""
    known = axis.dim is not None, axis.grid is not None, axis.prefix is None, axis.merged is not None
    return (*known, axis.batch is not None)


def _with_prefix(node: Node, before: ChannelAxis, shape: tuple[int, ...], axes: dict[Node, ChannelAxis]) -> ChannelAxis:
    """The axis of an output of this shape: its prefix counts tokens put in front of the grid's, or cut off there."""
    after = replace(before, shape=shape)
    where = before.tokens_dim
    if before.grid is None or where is None or before.prefix is None:
        return after
    change = shape[where] - before.shape[where]
    if change == 0:
        return after
    if node.name().startswith("Cat") and change > 0:
        last = node.next_functions[-1][0]
        if last in axes and axes[last] == before:
            return replace(after, prefix=before.prefix + change)
    if node.name().startswith("Slice") and change < 0 and -change == node._saved_start <= before.prefix:
        return replace(after, prefix=before.prefix + change)
    return replace(after, grid=None, prefix=None)
