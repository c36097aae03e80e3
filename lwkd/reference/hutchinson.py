r"""The specification of Hutchinson's trace estimator: probes of exactly ±1, and the reduction that makes them again.

Legend: ``L`` layers, ``e`` an element's index within its tensor (row-major, whatever its strides), ``K`` = 512.

The sign of element ``e`` of the tensor with index ``i`` comes from Philox4x32-10 (Salmon et al. 2011) in bit planes:

.. math:: \mathit{tile} = \lfloor e / 128K \rfloor,\quad s = \lfloor (e \bmod 128K) / K \rfloor,\quad j = e \bmod K

is bit ``s mod 32`` of word ``⌊s/32⌋`` of ``philox(key = seed, counter = (tile·K + j, i, 0, 0))``; a set bit is −1.
So one call serves 128 elements, neighbours use neighbouring counters, and no result depends on a device, on the number
of threads, or on how tensors are grouped into layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLANE = 512
"""K: elements in one bit plane."""

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _philox(seed: int, counters: Tensor) -> Tensor:
    """Philox4x32-10 of counters ``(4, n)`` in int64: as many words, in int64 too."""
    c0, c1, c2, c3 = counters.unbind()
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 wraps around, and the mask takes the sign that the shift brought in away again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3])


def _signs(count: int, seed: int, tensor: int) -> Tensor:
    """The first ``count`` signs of a tensor, int64."""
    element = torch.arange(count)
    tile, plane, column = element // (128 * PLANE), element % (128 * PLANE) // PLANE, element % PLANE
    tiles = -(-count // (128 * PLANE))
    counters = torch.zeros(4, tiles * PLANE, dtype=torch.int64)
    counters[0], counters[1] = torch.arange(tiles * PLANE), tensor
    words = _philox(seed, counters)
    return 1 - 2 * ((words[plane // 32, tile * PLANE + column] >> (plane % 32)) & 1)


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random signs, exactly ±1, one for every element.

    Args:
        like: tensors whose shapes, dtypes and devices the probes take.
        seed: the key, 64 bits.

    Returns:
        Contiguous tensors; the tensor's index in the list and the element's row-major index decide the sign.

    >>> rademacher([torch.empty(4)], seed=1)
    [tensor([ 1., -1.,  1., -1.])]
    """
    return [
        _signs(tensor.numel(), seed, index).view(tensor.shape).to(tensor.device, tensor.dtype)
        for index, tensor in enumerate(like)
    ]


def hutchinson_trace(products: Sequence[Tensor], layer_of: Sequence[int], seed: int, layers: int) -> Tensor:
    r"""One probe's estimate of the trace of every layer's diagonal block.

    .. math:: \tau_l = \sum_{i:\,\mathrm{layer}(i)=l} v_i \cdot (Hv)_i,\qquad v = \mathrm{rademacher}(\cdot, seed)

    Args:
        products: ``(Hv)_i`` for each parameter tensor, any shape.
        layer_of: the layer of each tensor, in ``range(layers)``.
        seed: that of the probe ``v`` from which the products were made.
        layers: L; a layer without a tensor has trace 0.

    Returns:
        ``(L,)`` float32, accumulated in float32 or better; float64 if an input is.

    Source: Hutchinson 1990.

    >>> v = rademacher([torch.empty(3)], seed=5)
    >>> hutchinson_trace([2 * v[0]], [0], seed=5, layers=2)
    tensor([6., 0.])
    """
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in products) else torch.float32
    traces = torch.zeros(layers, dtype=torch.float64, device=products[0].device)
    for index, (product, layer) in enumerate(zip(products, layer_of, strict=True)):
        signs = _signs(product.numel(), seed, index).to(product.device)
        traces[layer] += (product.flatten().double() * signs).sum()
    return traces.to(dtype)


def curvature_distance(statistics: Tensor) -> Tensor:
    r"""Distance between mean curvatures: ``|h_S − h_T| / (|h_S| + |h_T|)``, 0 where both are 0.

    Args:
        statistics: ``(L, 2)``: h of student and teacher, traces per parameter, averaged before they come here.

    Returns:
        ``(L,)`` in [0, 1], in the dtype of the statistics.

    >>> curvature_distance(torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
    tensor([0.5000, 0.0000])
    """
    h_S, h_T = statistics.double().unbind(-1)
    none = (h_S == 0) & (h_T == 0)
    whole = torch.where(none, torch.ones_like(h_S), h_S.abs() + h_T.abs())
    return torch.where(none, torch.zeros_like(h_S), (h_S - h_T).abs() / whole).to(statistics.dtype)
