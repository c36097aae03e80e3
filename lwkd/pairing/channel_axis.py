"""Which dimension of a layer's output holds the channels, followed through the autograd graph.

Convolutions, batch norms and pools put channels at dimension 1; layer norms, linear layers and embeddings put them at
the last; permutations and reshapes move them; all other operations keep them where they were. The grid that image
tokens came from, and the class tokens put in front of them, are followed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    "MaxPool",
    "AvgPool",
    "AdaptiveMaxPool",
    "AdaptiveAvgPool",
    "MkldnnAdaptiveAvgPool",
    "FractionalMaxPool",
    "Upsample",
    "PixelShuffle",
    "PixelUnshuffle",
    "GridSampler",
)
_CHANNELS_LAST_OPS = ("Addmm", "Mm", "Linear", "MkldnnLinear", "Embedding")
_AXIS_LOST_OPS = ("Bmm", "Baddbmm", "ScaledDotProduct")
_RESHAPE_OPS = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze", "Alias")
_MAX_PREFIX = 8  # class and register tokens; if N − g² is larger, the square g² is a coincidence


@dataclass(frozen=True)
class ChannelAxis:
    """Channels are at dimension ``dim`` of ``shape`` (None: not known); ``grid`` and ``prefix`` are as in Layout.

    A ``prefix`` of None says that the grid's tokens are mixed with others in an order that no layout can express, or
    that there is no grid.
    ``merged`` is the axis in three dimensions before batch and tokens were merged into one, as linear layers do.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    grid: tuple[int, int] | None = None
    prefix: int | None = 0
    merged: ChannelAxis | None = None

    @property
    def tokens_dim(self) -> int | None:
        """The dimension of the tokens; None unless there are three dimensions and the channels are known."""
        return 3 - self.dim if len(self.shape) == 3 and self.dim in (1, 2) else None


def channel_axes(ends: Iterable[Node]) -> dict[Node, ChannelAxis]:
    """Channel axis of every node from which the ends were computed."""
    axes: dict[Node, ChannelAxis] = {}
    for node in topological_order(ends):
        metadata = getattr(node, "_input_metadata", ())
        if metadata:
            axes[node] = _axis_after(node, tuple(metadata[0].shape), axes)
    return axes


def layout_of(axis: ChannelAxis | None, shape: tuple[int, ...], image: bool) -> Layout:
    """The layout of a feature of rank 3 or more.

    Args:
        axis: the channel axis of the feature's node; unknown channels count as first, in three dimensions as last
            (tokens).
        shape: shape of the feature.
        image: whether tokens whose grid is not known may be the square grid of a picture, behind at most 8 others.
    """
    axis = ChannelAxis(shape) if axis is None or axis.shape != shape else axis
    if len(shape) > 3:
        return Layout("channels_last" if axis.dim == len(shape) - 1 else "channels_first")
    if axis.dim == 1:
        return Layout("channels_first")
    if axis.grid is not None and axis.prefix is not None:
        return Layout("tokens", axis.prefix, axis.grid)
    side = math.isqrt(shape[1])
    prefix = shape[1] - side * side
    if image and side > 1 and prefix <= _MAX_PREFIX and axis.prefix is not None:
        return Layout("tokens", prefix, (side, side))
    return Layout("tokens")


def _axis_after(node: Node, shape: tuple[int, ...], axes: dict[Node, ChannelAxis]) -> ChannelAxis:
    """The channel axis of an operation's output, from those of its inputs."""
    name = node.name()
    known = [axes[parent] for parent, _ in parents(node) if parent in axes and axes[parent].dim is not None]
    if name.startswith(_RESHAPE_OPS):
        return _reshaped(known[0], shape) if known else ChannelAxis(shape)
    if name.startswith(("Permute", "Transpose", "TBackward")):
        return _permuted(known[0], shape, _permutation(node, len(shape))) if known else ChannelAxis(shape)
    if name.startswith(_CHANNELS_FIRST_OPS):
        return ChannelAxis(shape, 1 if len(shape) > 1 else None)
    if name.startswith(_AXIS_LOST_OPS):
        return ChannelAxis(shape)
    if name.startswith("Embedding"):  # words, which are no grid even where the net also reads a picture
        return ChannelAxis(shape, len(shape) - 1, prefix=None)
    of_equal_rank = [axis for axis in known if len(axis.shape) == len(shape)]
    before = max(of_equal_rank, key=_knowledge, default=ChannelAxis(shape))
    last = len(shape) - 1
    puts_last = name.startswith(_CHANNELS_LAST_OPS) or len(getattr(node, "_saved_normalized_shape", ())) == 1
    if puts_last and before.dim != last:
        before = ChannelAxis(shape, last)
    return _with_prefix(node, before, shape, axes)


def _reshaped(axis: ChannelAxis, shape: tuple[int, ...]) -> ChannelAxis:
    """The axis after a reshape.

    The channels are the dimension of the same size with as many elements ahead of it. Where the two spatial dimensions
    were merged into one, they are the grid.
    """
    assert axis.dim is not None
    ahead = math.prod(axis.shape[: axis.dim])
    candidates = (i for i, c in enumerate(shape) if c == axis.shape[axis.dim] and math.prod(shape[:i]) == ahead)
    after = ChannelAxis(shape, next(candidates, None))
    if len(shape) == 2 and after.dim == 1 and axis.tokens_dim == 1:
        return replace(after, merged=axis)
    if axis.merged is not None and after.dim == 2 and shape[:2] == axis.merged.shape[:2]:
        return replace(after, grid=axis.merged.grid, prefix=axis.merged.prefix)
    if after.dim is None or after.tokens_dim is None or shape[0] != axis.shape[0]:
        return after
    if axis.tokens_dim is not None and axis.shape[axis.tokens_dim] == shape[after.tokens_dim]:
        return replace(after, grid=axis.grid, prefix=axis.prefix)
    spatial = [size for i, size in enumerate(axis.shape) if i not in (0, axis.dim)]
    if len(axis.shape) == 4 and math.prod(spatial) == shape[after.tokens_dim]:
        return replace(after, grid=(spatial[0], spatial[1]))
    return after


def _permuted(axis: ChannelAxis, shape: tuple[int, ...], order: list[int]) -> ChannelAxis:
    assert axis.dim is not None
    after = ChannelAxis(shape, order.index(axis.dim))
    return replace(after, grid=axis.grid, prefix=axis.prefix) if order[0] == 0 else after


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


def _knowledge(axis: ChannelAxis) -> tuple[bool, bool, bool]:
    """Sort key for the inputs of a sum: the residual path is the one of which most is known."""
    return (axis.grid is not None, axis.prefix is None, axis.merged is not None)


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
