"""A stand-in for the CUDA driver: launches of the real host code are recorded, and run in Triton's interpreter.

The host code of the CUDA ops (csrc/cuda) does not mind where memory lies, so its plans, tables, arguments and grids are
tested whole on CPU tensors: they are handed straight to what is registered for CUDA (:func:`on_cuda`).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from triton.runtime import interpreter

from lwkd import _C
from lwkd.kernels import spec
from lwkd.kernels.compile import constant

SOURCE = Path(__file__).with_name("standin_driver.cpp")
OPS = (
    *("attention_maps", "attention_maps_backward", "attention_divergence", "attention_divergence_backward"),
    *("jacobian_sums", "jacobian_sums_backward", "jacobian_divergence", "rademacher", "hutchinson_trace"),
    "update_rates",
)
HIDDEN = 2
"""Pointers that the compiler puts behind a kernel's parameters in Triton 3.6."""

TABLES = {"addresses_ptr", "table_ptr", "ends_ptr", "layers_ptr"}
"""Arguments that point into what a plan keeps from call to call."""

POINTED = {"*i64": torch.int64, "*i32": torch.int32, "*fp32": torch.float32}
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("variant", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("parameters", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("sizes", ctypes.c_int32 * 32),
        ("bytes", ctypes.c_uint8 * 256),
    )


_EXECUTOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    variant: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    device: int
    stream: int
    parameters: tuple[bytes, ...]

    @classmethod
    def of(cls, raw: _Launch) -> Launch:
        found, offset, memory = [], 0, bytes(raw.bytes)
        for size in raw.sizes[: raw.parameters]:
            offset = (offset + size - 1) // size * size
            found.append(memory[offset : offset + size])
            offset += size
        text = raw.variant.decode()
        return cls(text, tuple(raw.grid), tuple(raw.block), raw.shared, raw.device, raw.stream, tuple(found))

    @property
    def kernel(self) -> str:
        return self.variant.split()[0]


def words(pointer: bytes, count: int) -> list[int]:
    """The int64 that a parameter points to."""
    array = ctypes.cast(int.from_bytes(pointer, "little"), ctypes.POINTER(ctypes.c_int64))
    return array[:count]


def _at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """One element at an address: all that the interpreter needs of a pointer."""
    if address == 0:  # of a buffer without elements
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def interpret(launch: Launch) -> None:
    """Run a launch in Triton's interpreter, on the memory that it names."""
    variant = spec.parse(launch.variant)
    kernel = getattr(importlib.import_module(f"lwkd.kernels.{variant.kernel.module}"), variant.kernel.name)
    given: dict[str, object] = {}
    for parameter, value in zip(variant.parameters, launch.parameters, strict=False):
        if parameter.type.startswith("*"):
            given[parameter.name] = _at(int.from_bytes(value, "little"), POINTED[parameter.type])
        elif parameter.type == "fp32":
            given[parameter.name] = ctypes.c_float.from_buffer_copy(value).value
        else:
            given[parameter.name] = int.from_bytes(value, "little", signed=True)
    for name, value in variant.setting.items():
        if name not in ("num_warps", "maxnreg"):
            given[name] = constant(name, value)
    kernel[(launch.grid[0],)](**given)


def patch_language_once() -> None:
    """The interpreter patches triton.language anew for every call of a device function; once is enough."""
    patch_language, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        modules = frozenset(
            id(value) for value in fn.__globals__.values() if value is interpreter.tl or value is interpreter.tl.core
        )
        if modules not in patched:
            patched.add(modules)
            patch_language(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


class Driver:
    """The stand-in. It replaces the driver of this process until the process ends."""

    def __init__(self, folder: Path) -> None:
        library = folder / "standin.so"
        command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++17", "-shared", "-fPIC", str(SOURCE), "-o", library]
        subprocess.run(command, check=True)
        os.environ["LWKD_CUDA_DRIVER"] = str(library)
        self.library = ctypes.CDLL(str(library))
        self.library.standin_launch.restype = ctypes.POINTER(_Launch)
        self.asked: list[tuple[str, int]] = []
        self.problems: list[str] = []
        self._one_at_a_time = threading.Lock()  # the interpreter keeps its place in the grid in a global
        self._run = _EXECUTOR(self._execute)
        _C.set_image_provider(self.find)

    def find(self, text: str, architecture: int):
        """An image as the stand-in reads it; every variant must be one that spec.py states."""
        self.asked.append((text, architecture))
        variant = spec.parse(text)
        sizes = [parameter.bytes for parameter in variant.parameters]
        image = f"{text}\n{' '.join(map(str, [*sizes, *[8] * HIDDEN]))}\0".encode()
        return image, variant.kernel.name, sizes, HIDDEN, 0, variant.warps

    def kept(self, launch: Launch) -> list[bool]:
        """Whether each table of a launch lies in memory that the driver gave, and not in torch's."""
        parameters = zip(spec.parse(launch.variant).parameters, launch.parameters, strict=False)
        tables = [int.from_bytes(value, "little") for parameter, value in parameters if parameter.name in TABLES]
        return [bool(self.library.standin_owns(ctypes.c_uint64(table))) for table in tables]

    def _execute(self, raw) -> int:
        try:
            launch = Launch.of(raw.contents)
            assert self.library.standin_capturing() or all(self.kept(launch)), (
                f"{launch.variant} keeps a table in torch's memory"
            )
            with self._one_at_a_time:
                interpret(launch)
        except BaseException:
            self.problems.append(traceback.format_exc())
            return 999
        return 0

    def interpreting(self, active: bool) -> None:
        """Whether launches are run, or only recorded."""
        self.library.standin_set_executor(self._run if active else _EXECUTOR())

    def recording(self, active: bool) -> None:
        """Whether anything is recorded at all; without, the driver costs next to nothing."""
        self.library.standin_set_recording(int(active))

    @property
    def launches(self) -> list[Launch]:
        count = self.library.standin_launches()
        return [Launch.of(self.library.standin_launch(index).contents) for index in range(count)]

    def calls(self, name: str) -> int:
        """How often a function of the driver was called."""
        return self.library.standin_calls(name.encode())

    def fail(self, name: str, result: int) -> None:
        """Let a function of the driver answer with an error, until told otherwise."""
        self.library.standin_fail(name.encode(), result)

    def clear(self) -> None:
        """Forget what was recorded, and let every function succeed again."""
        self.library.standin_clear()
        self.fail("", 0)
        self.library.standin_set_capturing(0)
        self.library.standin_set_captured_elsewhere(0)
        self.problems.clear()
        self.asked.clear()


def on_cuda(op: str, *arguments, **options):
    """What is registered for CUDA, called with CPU tensors."""
    return getattr(torch.ops.lwkd, op).default.redispatch(CUDA, *arguments, **options)


@contextmanager
def as_on_cuda(*ops: str) -> Iterator[None]:
    """CPU tensors are given to what is registered for CUDA, whoever calls the ops: ``lwkd.ops``, or autograd."""
    with ExitStack() as stack:
        library = torch.library.Library("lwkd", "IMPL")
        stack.callback(library._destroy)
        for op in ops:
            library.impl(op, partial(on_cuda, op), "CPU")
        yield
