"""Makes images of kernel variants with Triton; the GPUs that they are for need not be there.

    python -m lwkd.kernels.compile --arch 90                       makes what the cache lacks
    python -m lwkd.kernels.compile --arch 80 90 100 --ptx --out D  D/sm_80.zip, D/sm_90.zip, D/sm_100.zip, D/ptx80.zip

From 9.0 on machine code runs on one architecture only; ``ptx80`` is PTX that the driver of any other can compile.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwkd.kernels import images, packs, spec
from lwkd.kernels.interface import TUNING, Parameter, Setting, Variant
from lwkd.kernels.packs import Image

Made = TypeVar("Made")

ELEMENTS = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16, "fp64": tl.float64}
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}

PTX_VERSION = 80
"""PTX version of portable images; every driver from CUDA 12.0 on understands it."""

KNOWN = frozenset((75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121))
"""Architectures that Triton 3.6 knows. Any other is first tried in a separate process, since LLVM aborts the process if
it does not know it."""

MOST_REGISTERS, REGISTERS = 168, 1 << 16
"""Of a thread: with these, three programs of 128 threads still fit into the registers of a processor."""

FEW = 16
"""Bytes of the stack that a thread may use where a variant's registers are limited so that more programs fit."""

_compiling = threading.Lock()


class CompileError(Exception):
    """A variant does not compile, or what it compiles to cannot be launched."""


class Resources(NamedTuple):
    """What the machine code of a kernel takes: registers a thread, bytes of stack and of local memory a thread."""

    registers: int
    stack: int
    local: int


def make_image(variant: str, target: str) -> Image:
    """Compile one variant.

    Args:
        variant: its name, see spec.py.
        target: ``sm_90``, or ``ptx80``.

    Raises:
        ValueError: there is no such variant.
        CompileError: Triton refuses it, or what it makes is not what the launcher counts on.
    """
    return image_of(compile_variant(variant, target), variant, target)


def compile_variant(variant: str, target: str, tuning: Setting | None = None) -> triton.compiler.CompiledKernel:
    """What Triton makes of a variant: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``. Arguments and errors as above.

    Args:
        variant: its name, see spec.py.
        target: ``sm_90``, or ``ptx80``.
        tuning: what is to be tried in place of the tuning that spec.py states.

    By itself ptxas spills a few values of some variants, so that one more program fits on a processor. Such a variant
    is compiled again with an explicit limit, up to which ptxas then takes registers instead. A variant that is tuned to
    few registers may spill FEW bytes, once in a program.
    """
    stated = spec.parse(variant)
    if tuning is not None:
        kept = {name: value for name, value in stated.setting.items() if name not in TUNING}
        stated = Variant(stated.kernel, kept | dict(tuning))
    if triton.knobs.runtime.interpret:
        raise CompileError(
            f"{variant} cannot be compiled for {target}: TRITON_INTERPRET=1 makes Triton interpret its kernels. "
            "Start a process without it"
        )
    options = {"num_warps": stated.warps, "enable_fp_fusion": True, "ptx_options": ""}
    if stated.registers is not None:
        options["maxnreg"] = stated.registers
    if target == packs.PORTABLE:
        options["ptx_version"] = PTX_VERSION
    architecture = int(target.removeprefix("sm_").removeprefix("ptx"))
    if architecture not in KNOWN and (reason := _refusal(architecture)):
        raise CompileError(f"Triton {triton.__version__} cannot compile {variant} for {target}: {reason}")
    try:
        made = _quietly(stated, architecture, options)
        tolerated = 0 if stated.registers is None else FEW
        if can_read_resources() and resources(made.asm["cubin"]).stack > tolerated:
            most = min(MOST_REGISTERS, REGISTERS // (32 * stated.warps))
            made = _quietly(stated, architecture, options | {"maxnreg": most})
    except Exception as error:  # of many types: front end, passes, ptxas
        raise CompileError(
            f"Triton {triton.__version__} cannot compile {variant} for {target}: {type(error).__name__}: {error}"
        ) from error
    return made


def _quietly(stated: Variant, architecture: int, options: dict[str, Any]) -> triton.compiler.CompiledKernel:
    """Compile without what ptxas prints when it fails, which is the whole PTX."""
    printed = io.StringIO()
    with _compiling, _settings(), contextlib.redirect_stdout(printed):
        made = triton.compile(_source(stated), target=GPUTarget("cuda", architecture, 32), options=options)
    print(printed.getvalue(), end="")  # it did not fail: this is what other threads printed
    return made


def image_of(compiled: triton.compiler.CompiledKernel, variant: str, target: str) -> Image:
    """The image of what Triton made, after checking that it can be launched as the interface says.

    Raises:
        CompileError: it cannot: it wants other parameters, scratch memory, clusters, or is for another architecture.
    """
    stated, metadata, ptx = spec.parse(variant), compiled.metadata, compiled.asm["ptx"]
    entry, found = read_entry(ptx)
    expected = [_ptx_type(parameter) for parameter in stated.parameters]
    hidden = found[len(expected) :]
    wrong = {
        "parameters": (found[: len(expected)], expected),
        "hidden parameters": (hidden, ["u64"] * len(hidden)),
        "entry": (entry, metadata.name),
        "scratch memory": (metadata.global_scratch_size + metadata.profile_scratch_size, 0),
        "programs in a cluster": (metadata.num_ctas, 1),
        "architecture": (metadata.arch, target.replace("_", "").replace("ptx", "sm")),
    }
    for what, (is_, should) in wrong.items():
        if is_ != should:
            raise CompileError(f"{variant} for {target}: {what} should be {should} and is {is_}")
    code = ptx.encode() + b"\0" if target == packs.PORTABLE else compiled.asm["cubin"]
    sizes = tuple(parameter.bytes for parameter in stated.parameters)
    return Image(variant, target, code, entry, sizes, len(hidden), metadata.shared, metadata.num_warps)


def read_entry(ptx: str) -> tuple[str, list[str]]:
    """Name of the kernel in some PTX, and the types of its parameters.

    >>> read_entry(".visible .entry add(.param .u64 .ptr .global .align 1 add_param_0, .param .u32 add_param_1)")
    ('add', ['u64', 'u32'])
    """
    ((name, parameters),) = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx)
    return name, re.findall(r"\.param\s+\.(\w+)", parameters)


def can_read_resources() -> bool:
    """Whether Triton has the tool that tells what machine code takes; said once where it has not."""
    try:
        return bool(triton.knobs.nvidia.cuobjdump.path)
    except (AttributeError, OSError, RuntimeError) as error:
        images.warn_once(
            f"nobody checks whether images spill registers, since Triton {triton.__version__} has no cuobjdump "
            f"({error}): results are the same, some kernels may be slower. Name one in TRITON_CUOBJDUMP_PATH"
        )
        return False


def resources(cubin: bytes) -> Resources:
    """What the kernel in a cubin takes, according to cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Resources(*(int(re.findall(rf"\b{word}:(\d+)", usage)[0]) for word in ("REG", "STACK", "LOCAL")))


def in_parallel(
    function: Callable[..., Made], work: Sequence[tuple[Any, ...]], jobs: int | None = None, title: str = ""
) -> Iterator[Made]:
    """``function(*piece)`` for each piece of work, in order, in several new processes.

    Args:
        function: one that a new process can import.
        work: its arguments, most often a variant and a target.
        jobs: number of processes, by default the processors that this one may use, sixteen at most.
        title: shown on stderr with the progress; empty for no progress.
    """
    if not work:
        return
    jobs = min(jobs or min(16, len(os.sched_getaffinity(0))), len(work))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done, made in enumerate(pool.map(function, *zip(*work, strict=True), chunksize=4), start=1):
            if title and (sys.stderr.isatty() or done % 64 == 0):
                end = "\r" if sys.stderr.isatty() and done < len(work) else "\n"
                print(f"{title}: {done} of {len(work)}", end=end, file=sys.stderr, flush=True)
            yield made


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Triton's settings while it compiles for us.

    Without line numbers the bytes are the same whatever folder the kernels are in. Triton's own cache is in a temporary
    folder, since images are kept in ours, with checksums.
    """
    compilation, cache = triton.knobs.compilation, triton.knobs.cache
    with compilation.scope(), cache.scope():
        compilation.disable_line_info = True
        cache.dir = _scratch().name
        yield


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """One folder for the whole process, since a thread that compiles another variant meanwhile uses it as well."""
    return tempfile.TemporaryDirectory(prefix="lwkd-triton-")


@functools.cache
def _refusal(architecture: int) -> str:
    """The error with which a separate process failed to compile for this architecture; empty if it did not fail."""
    code = (
        f"from lwkd.kernels import compile, spec; compile.KNOWN |= {{{architecture}}}; "
        f"compile.make_image(spec.KERNELS[0].variants[0].text, 'sm_{architecture}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip()[:400] or f"exit status {done.returncode}" if done.returncode else ""


def constant(name: str, value: int | str | None) -> Any:
    """A constant as the kernel takes it: the words of ELEMENT and SUMS are element types."""
    return ELEMENTS[str(value)] if name in ("ELEMENT", "SUMS") else value


def _source(variant: Variant) -> ASTSource:
    kernel = variant.kernel
    function = getattr(importlib.import_module(f"lwkd.kernels.{kernel.module}"), kernel.name)
    stated = [*(parameter.name for parameter in kernel.parameters), *kernel.constants]
    if function.arg_names != stated:
        raise TypeError(f"the kernel takes {function.arg_names}, and kernels/spec.py states {stated}")
    types, constants, hints = {}, {}, {}
    parameters = {parameter.name: parameter for parameter in variant.parameters}
    for index, name in enumerate(function.arg_names):
        if name in parameters:
            types[name] = parameters[name].type
            if parameters[name].hinted:
                hints[index,] = [["tt.divisibility", 16]]
        else:
            types[name] = "constexpr"
            constants[name] = constant(name, variant.setting[name])
    return ASTSource(function, signature=types, constexprs=constants, attrs=hints)


def _ptx_type(parameter: Parameter) -> str:
    return "u64" if parameter.type.startswith("*") else PTX_TYPES[parameter.type]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m lwkd.kernels.compile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, default=[], metavar="90", help="architectures, 90 for 9.0")
    parser.add_argument("--ptx", action="store_true", help="also PTX that drivers compile for other architectures")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write one file for each architecture there")
    parser.add_argument("--element", nargs="+", choices=spec.ITEM_BYTES, default=list(spec.ITEM_BYTES))
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one for each processor, sixteen at most)"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.arch and not chosen.ptx:
        parser.error("name an architecture (--arch 90), or --ptx")
    if chosen.ptx and not chosen.out:
        parser.error("--ptx is for shipping, and needs --out")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = _arguments(arguments)
    targets = [f"sm_{architecture}" for architecture in chosen.arch] + [packs.PORTABLE] * chosen.ptx
    variants = [variant.text for variant in spec.all_variants(chosen.element)]
    try:
        if chosen.out:
            _ship([(variant, target) for target in targets for variant in variants], chosen)
        else:
            with _alone():
                _fill([(variant, target) for target in targets for variant in images.missing(variants, target)], chosen)
    except (CompileError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _ship(work: Sequence[tuple[str, str]], chosen: argparse.Namespace) -> None:
    """Compile everything, and write one pack for each target."""
    start = time.perf_counter()
    all_made = in_parallel(make_image, work, chosen.jobs, "compiled")
    for target, of_target in itertools.groupby(all_made, lambda image: image.target):
        made, path = list(of_target), chosen.out / f"{target}.zip"
        packs.write_pack(path, triton.__version__, made)
        code = sum(len(image.code) for image in made)
        print(
            f"{target}: {len(made)} images, {code / 1e6:.1f} MB of code, {path.stat().st_size / 1e6:.1f} MB packed, "
            f"{time.perf_counter() - start:.0f} s, {path}",
            flush=True,
        )
        start = time.perf_counter()


def _fill(work: Sequence[tuple[str, str]], chosen: argparse.Namespace) -> None:
    """Compile the missing images into the cache."""
    counts = dict.fromkeys((f"sm_{architecture}" for architecture in chosen.arch), 0)
    for image in in_parallel(make_image, work, chosen.jobs, "compiled"):
        images.keep(image)
        counts[image.target] += 1
    for target, count in counts.items():
        print(f"{target}: {count} images compiled, the others were there, {images.cache_folder()}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """While one process fills the cache the others wait, and then find that nothing is left to do."""
    with (images.writable_cache() / ".filling").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: the work is done twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
