r"""The specification of Hutchinson's trace estimator: probes of exactly ±1, and the traces that they give.

Legend: ``L`` layers, ``e`` an element's index within its tensor (row-major, whatever its strides), ``K`` = 512.

The sign of element ``e`` of the tensor with index ``i`` is one bit of Philox4x32-10 (Salmon et al. 2011). With

.. math:: \mathit{tile} = \lfloor e / 128K \rfloor,\quad s = \lfloor (e \bmod 128K) / K \rfloor,\quad j = e \bmod K

it is bit ``s mod 32`` of word ``⌊s/32⌋`` of ``philox(key = seed, counter = (tile·K + j, i, 0, 0))``; a set bit is −1.
So one call serves 128 elements, the elements of a bit plane use neighbouring counters, and no sign depends on a device,
on the number of threads, or on how tensors are grouped into layers.
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
    """Philox4x32-10 of counters ``(4, n)``: as many words of 32 bits; both are kept in int64."""
    c0, c1, c2, c3 = counters.unbind()
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The products wrap around in int64; the masks remove the sign bits that the shifts bring in.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3])


def _signs(count: int, seed: int, tensor: int) -> Tensor:
    """The first ``count`` signs of a tensor, int64."""
    element = torch.arange(count, device="cpu")
    tile, plane, column = element // (128 * PLANE), element % (128 * PLANE) // PLANE, element % PLANE
    tiles = -(-count // (128 * PLANE))
    counters = torch.zeros(4, tiles * PLANE, dtype=torch.int64, device="cpu")
    counters[0], counters[1] = torch.arange(tiles * PLANE, device="cpu"), tensor
    words = _philox(seed, counters)
    return 1 - 2 * ((words[plane // 32, tile * PLANE + column] >> (plane % 32)) & 1)


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """In plain PyTorch what :func:`lwkd.ops.rademacher` does: the signs defined at the head of this file."""
    return [
        _signs(tensor.numel(), seed, index).view(tensor.shape).to(tensor.device, tensor.dtype)
        for index, tensor in enumerate(like)
    ]


def hutchinson_trace(products: Sequence[Tensor], layer_of: Sequence[int], seed: int, layers: int) -> Tensor:
    r"""In plain PyTorch what :func:`lwkd.ops.hutchinson_trace` does: one probe's estimate of every layer's trace.

    .. math:: \tau_l = \sum_{i:\,\mathrm{layer}(i)=l} v_i \cdot (Hv)_i,\qquad v = \mathrm{rademacher}(\cdot, seed)
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
        statistics: ``(L, 2)``: h of student and teacher: trace per parameter, averaged over probes and measurements.

    Returns:
        ``(L,)`` in [0, 1], in the dtype of the statistics.

    >>> curvature_distance(torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
    tensor([0.5000, 0.0000])
    """
    h_S, h_T = statistics.double().unbind(-1)
    none = (h_S == 0) & (h_T == 0)
    whole = torch.where(none, torch.ones_like(h_S), h_S.abs() + h_T.abs())
    return torch.where(none, torch.zeros_like(h_S), (h_S - h_T).abs() / whole).to(statistics.dtype)
