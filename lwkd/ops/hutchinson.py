"""Hutchinson's trace estimator: random signs, and the traces, each one call over all tensors; neither has a gradient.

Legend: ``L`` layers, ``v`` the probe, ``Hv`` the Hessian-vector product, ``i`` a parameter tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.ops.checks import check_inputs
from lwkd.ops.gradients import accumulation


@torch.library.register_fake("lwkd::rademacher")
def _rademacher_fake(like: list[Tensor], seed: int) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in like]


@torch.library.register_fake("lwkd::hutchinson_trace")
def _hutchinson_trace_fake(products: list[Tensor], layer_of: list[int], seed: int, layers: int) -> Tensor:
    return products[0].new_empty((layers,), dtype=accumulation(*products))


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    r"""Random signs, exactly ±1, one for every element of every tensor.

    .. math:: v_{ie} = 1 - 2\,b,\qquad b = \text{one bit of } \mathrm{philox4x32}_{10}(seed;\, e, i)

    Only the seed, the tensor's index in the list and the element's row-major index decide which bit that is, in the
    layout that :mod:`lwkd.reference.hutchinson` defines. One call of Philox serves 128 elements. Has no gradient.

    Args:
        like: tensors whose shapes, dtypes (float32, float16, bfloat16 or float64) and devices the probes take. Their
            values and strides play no part.
        seed: the key, 64 bits, as a signed integer.

    Returns:
        Contiguous tensors, none of which requires grad; an empty list for an empty list. The same bits on every run
        and for any number of threads.

    Raises:
        ValueError: for a seed of more than 64 bits.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA, or not dense.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Hutchinson 1990 (signs); Salmon et al. 2011 (Philox).

    >>> rademacher([torch.empty(4)], seed=1)
    [tensor([ 1., -1.,  1., -1.])]
    """
    like = list(like)
    if not like:
        return []
    check_inputs("rademacher", like)
    _check_seed("rademacher", seed)
    with torch.no_grad():
        return torch.ops.lwkd.rademacher(like, seed)


def hutchinson_trace(products: Sequence[Tensor], layer_of: Sequence[int], seed: int, layers: int) -> Tensor:
    r"""One probe's estimate of the trace of every layer's diagonal block of the Hessian.

    .. math:: \tau_l = \sum_{i:\,\mathrm{layer}(i)=l}\ \sum_e v_{ie}\,(Hv)_{ie},\qquad
        v = \mathrm{rademacher}(\cdot, seed)

    The products are read once; the probe is not read but regenerated from its seed. Has no gradient: products that
    require grad are treated as detached.

    Args:
        products: ``(Hv)_i`` for each parameter tensor, in the order of the list that the probe was made for; any
            shape, empty included; float32, float16, bfloat16 or float64. Contiguous tensors are read where they are,
            other layouts from a copy.
        layer_of: the layer of each tensor, in ``range(layers)``.
        seed: that of the probe ``v`` with which the products were made.
        layers: L; a layer without a tensor has trace 0.

    Returns:
        ``(L,)`` float32; float64 if a product is. Summed in float32 over 32 elements at a time and from there on in
        float64 (float64 throughout for float64 products), in a fixed order: the same bits on every run and for any
        number of threads. NaN and infinity stay in their layer.

    Raises:
        ValueError: for no products, lists of different length, a layer that is not in ``range(layers)``, or a seed of
            more than 64 bits.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA, or not dense.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Hutchinson 1990.

    >>> v = rademacher([torch.empty(3)], seed=5)
    >>> hutchinson_trace([2 * v[0]], [0], seed=5, layers=2)
    tensor([6., 0.])
    """
    products = list(products)
    if not products:
        raise ValueError(
            "lwkd.ops.hutchinson_trace: expected at least one product, found an empty list. "
            "Pass one Hessian-vector product a parameter."
        )
    check_inputs("hutchinson_trace", products)
    _check_seed("hutchinson_trace", seed)
    with torch.no_grad():
        return torch.ops.lwkd.hutchinson_trace(products, list(layer_of), seed, layers)


def _check_seed(op: str, seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"lwkd.ops.{op}: seed: expected a signed integer of 64 bits, found {seed}. "
            "Keep the low 63 bits, for example seed & (2**63 - 1)."
        )
