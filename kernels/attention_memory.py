"""How a feature lies in memory, and what the attention kernels read in place.

Legend: ``B C N`` batch, channels, map positions of one feature; ``V`` elements in 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lwkd.kernels.dtypes import check_dtypes

TILE_COLUMNS = 128
"""Columns of a tile of a channels-first feature: one warp reads 512 contiguous bytes of float32."""


@dataclass(frozen=True)
class Geometry:
    """What a kernel must know of one feature ``(B, C, *spatial)`` beside its address."""

    samples: int
    channels: int
    spatial: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    sample_stride: int

    @property
    def positions(self) -> int:
        """N."""
        return math.prod(self.spatial)

    @property
    def vector(self) -> int:
        """V."""
        return 16 // self.dtype.itemsize

    @cached_property
    def fold(self) -> int:
        """Channels k that are laid side by side, so that C rows of N columns are seen as C/k rows of k·N.

        Only for channels-first features: it fills the tile's columns and makes rows divisible by V. The partial map
        of such a row holds k maps of N.
        """
        fold = 1
        if not self.channels_last:
            while self.channels % (2 * fold) == 0 and (
                fold * self.positions < TILE_COLUMNS or fold * self.positions % self.vector
            ):
                fold *= 2
        return fold

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one sample as it lies in memory."""
        if self.channels_last:
            return self.positions, self.channels
        return self.channels // self.fold, self.fold * self.positions

    @property
    def wide(self) -> bool:
        """Whether every row of every sample starts at a multiple of V elements."""
        return self.matrix[1] % self.vector == 0 and self.sample_stride % self.vector == 0


def _dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def memory_order(feature: Tensor) -> str:
    """``"channels_first"`` or ``"channels_last"`` where the kernels read a feature in place, else ``"other"``.

    The stride of the batch is free, so a token sequence without its class token still counts.

    >>> memory_order(torch.zeros(2, 5, 4).transpose(1, 2)), memory_order(torch.zeros(2, 4, 10)[..., ::2])
    ('channels_last', 'other')
    """
    sizes, strides = feature.shape[1:], feature.stride()[1:]
    last = (*sizes[1:], sizes[0]), (*strides[1:], strides[0])
    if math.prod(sizes[1:]) == 1 and _dense(*last):
        return "channels_last"
    if _dense(sizes, strides):
        return "channels_first"
    return "channels_last" if _dense(*last) else "other"


def geometry(feature: Tensor) -> Geometry:
    """Geometry of a feature whose memory order is not ``"other"``."""
    return Geometry(
        samples=feature.shape[0],
        channels=feature.shape[1],
        spatial=tuple(feature.shape[2:]),
        dtype=feature.dtype,
        channels_last=memory_order(feature) == "channels_last",
        sample_stride=feature.stride(0) if feature.shape[0] > 1 else math.prod(feature.shape[1:]),
    )


def readable(features: Sequence[Tensor], what: str) -> tuple[list[Tensor], list[Geometry]]:
    """Features as the kernels read them, with their geometry.

    Dense samples, channels first or last, are read in place; any other strides are copied to a contiguous tensor.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    check_dtypes(features, f"{what} of layer")
    features = [f.contiguous() if memory_order(f) == "other" else f for f in features]
    return features, [geometry(f) for f in features]


def matched(features: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Features and tangents with equal strides, copied to contiguous ones where they differ.

    Raises:
        TypeError: a tangent of another dtype than its feature.
    """
    pairs = []
    for layer, (feature, tangent) in enumerate(zip(features, tangents, strict=True)):
        if feature.dtype != tangent.dtype:
            raise TypeError(
                f"the tangent of layer {layer} is {tangent.dtype}, its feature {feature.dtype}; the GPU kernels need "
                "equal dtypes. Measure tangents in float32, with autocast off"
            )
        equal = feature.stride() == tangent.stride()
        pairs.append((feature, tangent) if equal else (feature.contiguous(), tangent.contiguous()))
    return [feature for feature, _ in pairs], [tangent for _, tangent in pairs]


def gradients_like(features: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
    """Empty dense gradients in the memory order of their features."""
    results = []
    for feature, g in zip(features, geometries, strict=True):
        if g.channels_last:
            dense = torch.empty((g.samples, *g.spatial, g.channels), dtype=g.dtype, device=feature.device)
            results.append(dense.movedim(-1, 1))
        else:
            results.append(torch.empty(feature.shape, dtype=g.dtype, device=feature.device))
    return results
