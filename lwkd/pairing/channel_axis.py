"""Where the channels of a layer's output are, followed through the autograd graph.

Convolutions, batch norms and pools put channels at dimension 1; layer norms, linear layers and embeddings at the
last; permutations and reshapes move them; everything else keeps them where they were. The grid that image tokens
came from, and the class tokens put in front of them, are followed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lwkd.nets.layout import Layout
from lwkd.pairing.spine import Node, in_order, parents

_FIRST = (
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
_LAST = ("Addmm", "Mm", "Linear", "MkldnnLinear", "Embedding")
_LOST = ("Bmm", "Baddbmm", "ScaledDotProduct")
_RESHAPES = ("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze", "Alias")
_MOST_PREFIX = 8  # class and register tokens; more than this, and N − g² is a coincidence


@dataclass(frozen=True)
class Axis:
    """Channels at dimension ``dim`` of ``shape`` (None: not known), the others as in Layout.

    A ``prefix`` of None says that the tokens of the grid stand among others in no order that a layout can express.
    ``merged`` is what stood in three dimensions before batch and tokens were merged, as linear layers do.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    grid: tuple[int, int] | None = None
    prefix: int | None = 0
    merged: Axis | None = None

    @property
    def tokens(self) -> int | None:
        """The dimension of the tokens, in three dimensions with known channels."""
        return 3 - self.dim if len(self.shape) == 3 and self.dim in (1, 2) else None


def follow(ends: Iterable[Node]) -> dict[Node, Axis]:
    """Channel axis of every node from which the ends were computed."""
    axes: dict[Node, Axis] = {}
    for node in in_order(ends):
        metadata = getattr(node, "_input_metadata", ())
        if metadata:
            axes[node] = _step(node, tuple(metadata[0].shape), axes)
    return axes


def layout_of(axis: Axis | None, shape: tuple[int, ...], image: bool) -> Layout:
    """The layout of a feature of rank 3 or more.

    Args:
        axis: what was followed to the feature's node; where the channels are not known they count as first, in
            three dimensions as last (tokens).
        shape: shape of the feature.
        image: tokens whose grid is not known may be the square grid of a picture, behind at most 8 other tokens.
    """
    axis = Axis(shape) if axis is None or axis.shape != shape else axis
    if len(shape) > 3:
        return Layout("channels_last" if axis.dim == len(shape) - 1 else "channels_first")
    if axis.dim == 1:
        return Layout("channels_first")
    if axis.grid is not None and axis.prefix is not None:
        return Layout("tokens", axis.prefix, axis.grid)
    side = math.isqrt(shape[1])
    prefix = shape[1] - side * side
    if image and side > 1 and prefix <= _MOST_PREFIX and axis.prefix is not None:
        return Layout("tokens", prefix, (side, side))
    return Layout("tokens")


def _step(node: Node, shape: tuple[int, ...], axes: dict[Node, Axis]) -> Axis:
    """The channel axis after one operation."""
    name = node.name()
    known = [axes[parent] for parent, _ in parents(node) if parent in axes and axes[parent].dim is not None]
    if name.startswith(_RESHAPES):
        return _reshaped(known[0], shape) if known else Axis(shape)
    if name.startswith(("Permute", "Transpose", "TBackward")):
        return _permuted(known[0], shape, _order(node, name, len(shape))) if known else Axis(shape)
    alike = [axis for axis in known if len(axis.shape) == len(shape)]
    if name.startswith(_FIRST):
        return Axis(shape, 1 if len(shape) > 1 else None)
    if name.startswith(_LOST):
        return Axis(shape)
    best = max(alike, key=_knowledge, default=Axis(shape))
    if name.startswith(_LAST) or len(getattr(node, "_saved_normalized_shape", ())) == 1:
        best = replace(best, dim=len(shape) - 1) if best.dim == len(shape) - 1 else Axis(shape, len(shape) - 1)
    return _counted(node, name, replace(best, shape=shape), best, axes)


def _knowledge(axis: Axis) -> tuple[bool, bool, bool]:
    """Of the inputs of a sum, the one to believe is the one of which most is known: the residual path."""
    return (axis.grid is not None, axis.prefix is None, axis.merged is not None)


def _counted(node: Node, name: str, after: Axis, before: Axis, axes: dict[Node, Axis]) -> Axis:
    """Tokens that were put in front of the grid's, or cut off there."""
    where = before.tokens
    if before.grid is None or where is None or before.prefix is None:
        return after
    change = after.shape[where] - before.shape[where]
    if change == 0:
        return after
    if name.startswith("Cat") and change > 0:
        last = node.next_functions[-1][0]
        if last in axes and axes[last] == before:
            return replace(after, prefix=before.prefix + change)
    if name.startswith("Slice") and change < 0 and -change == node._saved_start <= before.prefix:
        return replace(after, prefix=before.prefix + change)
    return replace(after, grid=None, prefix=None)


def _reshaped(axis: Axis, shape: tuple[int, ...]) -> Axis:
    """Channels keep their size and what stands before them; two dimensions beside them that merge are a grid."""
    assert axis.dim is not None
    ahead = math.prod(axis.shape[: axis.dim])
    places = (i for i, c in enumerate(shape) if c == axis.shape[axis.dim] and math.prod(shape[:i]) == ahead)
    after = Axis(shape, next(places, None))
    if len(shape) == 2 and after.dim == 1 and axis.tokens == 1:
        return replace(after, merged=axis)
    if axis.merged is not None and after.dim == 2 and shape[:2] == axis.merged.shape[:2]:
        return replace(after, grid=axis.merged.grid, prefix=axis.merged.prefix)
    if after.dim is None or after.tokens is None or shape[0] != axis.shape[0]:
        return after
    if axis.tokens is not None and axis.shape[axis.tokens] == shape[after.tokens]:
        return replace(after, grid=axis.grid, prefix=axis.prefix)
    spatial = [size for i, size in enumerate(axis.shape) if i not in (0, axis.dim)]
    if len(axis.shape) == 4 and math.prod(spatial) == shape[after.tokens]:
        return replace(after, grid=(spatial[0], spatial[1]))
    return after


def _permuted(axis: Axis, shape: tuple[int, ...], order: list[int]) -> Axis:
    assert axis.dim is not None
    after = Axis(shape, order.index(axis.dim))
    return replace(after, grid=axis.grid, prefix=axis.prefix) if order[0] == 0 else after


def _order(node: Node, name: str, rank: int) -> list[int]:
    """For each dimension of the output, the dimension of the input that it was."""
    if name.startswith("Permute"):
        return [_signed(dim) % rank for dim in node._saved_dims]
    order = list(range(rank))
    one, other = (0, 1) if name.startswith("TBackward") else (_signed(node._saved_dim0), _signed(node._saved_dim1))
    one, other = one % rank, other % rank
    order[one], order[other] = order[other], order[one]
    return order


def _signed(dim: int) -> int:
    """Torch hands out saved negative dimensions as unsigned 64-bit numbers."""
    return dim - 2**64 if dim >= 2**63 else dim
