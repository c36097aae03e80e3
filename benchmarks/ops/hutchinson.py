"""Hutchinson's signs and traces: lwkd beside eager PyTorch, ``torch.compile``, and the time to touch the bytes once.

Tensors have the shapes of the parameters of a net.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import SMALL, beside_eager, filled, read, timed
from benchmarks.shapes import DTYPES
from lwkd import ops
from lwkd.program.models.registry import build

NETS = {"resnet8": (10, 32)} if SMALL else {"resnet50": (1000, 224), "resnet20": (10, 32)}
SEED = 1


def parameters(net: str, dtype: torch.dtype) -> tuple[list[Tensor], list[int], int]:
    """Tensors like the net's parameters, the layer of each, and the number of layers; a layer is a module."""
    classes, size = NETS[net]
    named = list(build(net, classes=classes, channels=3, size=size).named_parameters())
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(p.shape, generator=generator).to(dtype) for _, p in named]
    return tensors, *layers_of([name for name, _ in named])


def layers_of(names: Sequence[str]) -> tuple[list[int], int]:
    modules = [name.rpartition(".")[0] for name in names]
    index = {module: layer for layer, module in enumerate(dict.fromkeys(modules))}
    return [index[module] for module in modules], len(index)


def eager_signs(like: list[Tensor]) -> list[Tensor]:
    return [torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device) * 2 - 1 for p in like]


def eager_trace(products: list[Tensor], probes: list[Tensor], layer_of: list[int] | Tensor, layers: int) -> Tensor:
    """The probe is at hand and read, and sums of half precision are float32 too."""
    each = [(v * p).sum(dtype=torch.float32) for v, p in zip(probes, products, strict=True)]
    index = torch.as_tensor(layer_of)
    return torch.zeros(layers, device=index.device).index_add(0, index, torch.stack(each))


CASES = [pytest.param(net, dtype, id=f"{net}-{name}") for net in NETS for name, dtype in DTYPES.items()]


@pytest.mark.timeout(900)  # torch.compile makes a kernel for every tensor
@pytest.mark.parametrize(("net", "dtype"), CASES)
def test_probe(net, dtype, compare):
    like, _, _ = parameters(net, dtype)
    functions = beside_eager(lambda tensors: ops.rademacher(tensors, SEED), eager_signs) | {"fill": filled}
    compare({name: timed(f, like) for name, f in functions.items()})


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("net", "dtype"), CASES)
def test_trace(net, dtype, compare):
    products, layer_of, layers = parameters(net, dtype)
    probes = ops.rademacher(products, SEED)
    functions = beside_eager(
        lambda products, _: ops.hutchinson_trace(products, layer_of, SEED, layers),
        lambda products, probes: eager_trace(products, probes, layer_of, layers),
    )
    compare({name: timed(f, products, probes) for name, f in functions.items()} | {"read": timed(read, products)})


def test_traces_of_all_layers_against_one_plain_hessian_vector_product(compare):
    """The target is a ratio of at least 1 / 1.15 = 0.87 for the plain product."""
    torch.manual_seed(0)
    net = build("resnet20", classes=10, channels=3, size=32).eval()
    x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    names, weights = zip(*net.named_parameters(), strict=True)
    layer_of, layers = layers_of(names)
    ready = [torch.randn_like(p) for p in weights]

    def product(probes: list[Tensor]) -> tuple[Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(net(x), y)
        return torch.autograd.grad(torch.autograd.grad(loss, weights, create_graph=True), weights, probes)

    def traces() -> Tensor:
        return ops.hutchinson_trace(product(ops.rademacher(weights, SEED)), layer_of, SEED, layers)

    compare({"lwkd": timed(traces), "product": timed(lambda: product(ready))})
