"""The three ways to compute an op, so that its agreement with the reference is written once.

``cpu`` is C++. ``interpreted`` is the host code of csrc/cuda with its Triton kernels in Triton's interpreter, on CPU
tensors. ``cuda`` is a GPU. A test that takes the fixture ``backend`` runs on all three, or on those that :func:`over`
or :func:`on` names. The interpreter is chosen when a process starts, so the second needs a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_rates.py

``LWKD_TEST_DEVICE=cpu`` runs on the CPU what does not ask for CUDA by name (the fixture ``cuda``): a dry run, for
whoever writes these tests without a GPU. ``LWKD_TEST_SEED`` repeats the random inputs of a run on a GPU, which prints
it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from cases import Case, build
from tolerances import FRESH_INPUTS, GRADIENT, ROUNDING, TRUNCATING_CAST, VALUE, assert_close
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device(os.environ.get("LWKD_TEST_DEVICE", "cuda:0"))
SEED = int(os.environ.get("LWKD_TEST_SEED", time.time_ns() % 2**31))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels read; the CPU reads float64 besides."""


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute an op, where its inputs lie, and how exact it is.

    Args:
        name: ``cpu``, ``interpreted`` or ``cuda``.
        device: where its tensors lie.
        dtypes: those that it reads.
        gradient: tolerance of a gradient, by dtype.
        seed: of random inputs. On a GPU every run has new ones.
        slack: of the attention ops' tolerances.
    """

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...] = DTYPES
    gradient: Mapping[torch.dtype, float] = field(default_factory=lambda: GRADIENT)
    seed: int = 0
    slack: int = 1

    def __str__(self) -> str:
        return self.name

    def given(self, tensors: Iterable[Tensor], grad: bool = False) -> list[Tensor]:
        """Copies on the device, detached, with the strides and the offset of each."""
        return [moved(tensor.detach(), self.device).requires_grad_(grad) for tensor in tensors]

    def built(self, case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        """Student's and teacher's features of a case, on the CPU."""
        return build(replace(case, name=f"{case.name} {self.seed}") if self.seed else case, dtype)

    def generator(self, number: int = 0) -> torch.Generator:
        """Of the CPU; equal numbers give equal random numbers within a run."""
        return torch.Generator().manual_seed(self.seed + number)

    def randoms(
        self, shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, number: int = 0
    ) -> list[Tensor]:
        """Normal random numbers, on the CPU."""
        source = self.generator(number)
        return [torch.randn(tuple(shape), generator=source, dtype=torch.float64).to(dtype) for shape in shapes]

    def together(self, layers: int) -> bool:
        """Whether results of all layers are judged as one.

        Among hundreds of tiny maps of new random numbers there is always one whose tangent or gradient is a difference
        of nearly equal numbers, and has few digits.
        """
        return self is CUDA and layers > 100

    def needs_kernels(self) -> None:
        """Skips a test of what C++ does not have, in a dry run."""
        if self is CUDA and self.device.type != "cuda":
            pytest.skip("a dry run on the CPU")


CPU = Backend("cpu", torch.device("cpu"), dtypes=(*DTYPES, torch.float64))
INTERPRETED = Backend("interpreted", torch.device("cpu"), gradient=GRADIENT | {torch.bfloat16: TRUNCATING_CAST})
CUDA = Backend("cuda", DEVICE, seed=SEED, slack=FRESH_INPUTS)
BACKENDS = {backend.name: backend for backend in (CPU, INTERPRETED, CUDA)}
MARKS = {"cpu": (), "interpreted": pytest.mark.interpreted, "cuda": pytest.mark.cuda}


def over(names: str, **cases: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrizes a test by backend, each with cases of its own: values of the named arguments."""
    rows = [
        pytest.param(backend, *(values if isinstance(values, tuple) else (values,)), marks=MARKS[backend])
        for backend, listed in cases.items()
        for values in listed
    ]
    arguments = ["backend", *(name.strip() for name in names.split(",") if name)]
    return pytest.mark.parametrize(arguments, rows, indirect=["backend"], ids=_label)


def on(*backends: str) -> pytest.MarkDecorator:
    """Runs a test on these backends."""
    return over("", **{backend: [()] for backend in backends})


def _label(value: object) -> str | None:
    return str(value) if isinstance(value, (Case, torch.dtype)) else None


each_dtype = over("dtype", **{backend.name: backend.dtypes for backend in BACKENDS.values()})


def moved(tensor: Tensor, device: torch.device = DEVICE) -> Tensor:
    """The tensor on the device, with its strides and its offset: ``.to`` would make it dense and aligned."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    whole = torch.tensor([], dtype=tensor.dtype).set_(storage, 0, (count,))
    return whole.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def in_float64(tensors: Iterable[Tensor], grad: bool = False) -> list[Tensor]:
    """Inputs of the reference."""
    return [tensor.detach().double().requires_grad_(grad) for tensor in tensors]


def order_one(gradients: Iterable[Tensor]) -> Tensor:
    """Per layer what makes its gradient as large as loss scaling does: float16 has no room for less."""
    largest = torch.tensor([float(gradient.abs().max()) for gradient in gradients])
    return torch.where(largest > ROUNDING, 1 / largest, torch.ones_like(largest))


def assert_gradient(found: Tensor, expected: Tensor, tensor: Tensor, tolerance: float, floor: float) -> None:
    """It has the dtype and memory order of the tensor that it is the gradient of, and the values expected."""
    assert found.dtype == tensor.dtype
    assert found.stride() == torch.empty_like(tensor).stride()
    assert_close(found.cpu(), expected, tolerance, floor)


def assert_compiled_is_the_same(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor], student: list[Tensor], teacher: list[Tensor]
) -> None:
    """The loss and its gradients, as a graph without a break and as they are."""
    torch._dynamo.reset()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [f.detach().requires_grad_() for f in student]
        value = run(inputs, teacher)
        value.backward()
        results.append([value.detach(), *(f.grad for f in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, VALUE[torch.float32])


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All of their elements, on the CPU."""
    return torch.cat([tensor.detach().cpu().flatten() for tensor in tensors])
