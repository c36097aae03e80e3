"""Finds the image of a kernel variant for a GPU: shipped, cached, compiled now, or PTX for the driver to compile.

In this order:

1. ``images/sm_XX.zip`` beside this file: what a wheel carries (``make wheel``);
2. the cache: ``$LWKD_CACHE_DIR``, else ``$XDG_CACHE_HOME/lwkd``, else ``~/.cache/lwkd``; whoever can write there
   decides what runs on the GPU, so it must belong to this user, and nobody else may write to it;
3. Triton, if it can be imported; what it makes goes into the cache;
4. ``images/ptx80.zip`` beside this file.

An image is used only if it was made from the same sources as the kernels that are installed. Triton is imported only
when an image must be compiled.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from lwkd.kernels import packs, spec
from lwkd.kernels.packs import Image, PackError

SHIPPED = Path(__file__).parent / "images"

FIRST_PORTABLE = 80
"""The first architecture that runs the PTX."""

_unkept: dict[tuple[str, str], Image] = {}
"""Images that could not be written to the cache."""


def find(variant: str, architecture: int) -> tuple[bytes, str, list[int], int, int, int]:
    """The image of a variant, for the C++ extension, which asks once for each variant and device.

    Args:
        variant: its name, see spec.py.
        architecture: compute capability of the device, 10·major + minor.

    Returns:
        Code (a cubin, or PTX that ends in a NUL), name of the kernel in it, bytes of its run-time parameters, number of
        hidden pointers behind them, bytes of dynamic shared memory, warps of a program.

    Raises:
        ValueError: there is no such variant.
        RuntimeError: there is no image of it; the message says where it was looked for, and what to do. Or the folder
            that LWKD_CACHE_DIR names is one that others can write to.
    """
    spec.parse(variant)
    image = _find(variant, architecture)
    return image.code, image.entry, list(image.parameters), image.hidden, image.shared, image.warps


def describe(architecture: int | None = None) -> str:
    """Where images come from, in a few words; for ``lwkd.backend()``.

    Args:
        architecture: of one device; None where it is not known.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.zip") if path.stem != packs.PORTABLE)
    good, refused = _usable(shipped if architecture is None else [f"sm_{architecture}"])
    portable, refused_too = _usable([packs.PORTABLE] if (architecture or FIRST_PORTABLE) >= FIRST_PORTABLE else [])
    ways = [f"shipped for {', '.join(good)}"] if good else []
    version = triton_version()
    folder, why_not = _cache()
    if version:
        kept = f"and kept in {folder}" if folder else f"but not kept: {why_not}"
        ways.append(f"compiled by Triton {version} when first needed {kept}")
    elif folder and any(folder.glob(f"{packs.sources()}-triton-*/sm_{architecture or '*'}/*.zip")):
        ways.append(f"kept in {folder}")
    if portable:
        ways.append("shipped as PTX, which the driver compiles")
    said = ", else ".join(ways) or "not to be had: none shipped, none kept, and no Triton that could compile them"
    return "; refused: ".join((said, *refused, *refused_too))


def missing(variants: Iterable[str], target: str) -> list[str]:
    """The variants of which neither the package nor the cache has an image for this target."""
    try:
        shipped = packs.read_manifest(SHIPPED / f"{target}.zip", target)["images"]
    except (OSError, PackError):
        shipped = {}
    return [variant for variant in variants if variant not in shipped and not any(_kept_files(variant, target))]


def keep(image: Image) -> None:
    """Write an image that this Triton made to the cache.

    Raises:
        OSError: it cannot be written.
        RuntimeError: the folder that LWKD_CACHE_DIR names is one that others can write to.
    """
    version = triton_version() or "unknown"
    folder = writable_cache() / f"{packs.sources()}-triton-{version}" / image.target
    packs.make_private(folder)
    packs.write_pack(folder / _file_name(image.variant), version, [image])


def cache_folder() -> Path:
    """Where images are kept that were compiled on this machine.

    Raises:
        RuntimeError: no environment variable says where, and there is no home folder.
    """
    if own := os.environ.get("LWKD_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwkd"


def writable_cache() -> Path:
    """The cache, which is made where it is not there, for this user alone.

    Raises:
        OSError: there is no cache that may be used, or it cannot be written.
        RuntimeError: the folder that LWKD_CACHE_DIR names is one that others can write to.
    """
    folder, why_not = _usable_cache()
    if folder is None:
        raise OSError(why_not)
    packs.make_private(folder)
    return folder


def _usable_cache() -> tuple[Path | None, str]:
    """The cache, or None and why there is none; a folder that the user named is not passed over.

    Raises:
        RuntimeError: the folder that LWKD_CACHE_DIR names is one that others can write to.
    """
    folder, why_not = _cache()
    if folder is None and os.environ.get("LWKD_CACHE_DIR"):
        raise RuntimeError(f"the images in LWKD_CACHE_DIR are not used: {why_not}")
    return folder, why_not


def _cache() -> tuple[Path | None, str]:
    """The cache, which need not be there yet; or None, and why there is none that may be used."""
    try:
        folder = cache_folder()
    except RuntimeError:
        return None, "there is no home folder for it"
    problem = packs.not_private(folder)
    return (None, problem) if problem else (folder, "")


def triton_version() -> str | None:
    """Version of the Triton that is installed, where possible without importing it; None where there is none."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a Triton that goes by another name
        import triton

        return triton.__version__
    except ImportError:
        return None


class _NotHere(Exception):  # noqa: N818 (it is not an error: the next place may have the image)
    """There is no image in this place; the message says why."""


def _find(variant: str, architecture: int) -> Image:
    target = f"sm_{architecture}"
    ways = [(_shipped, target), (_kept, target), (_compiled, target)]
    if architecture >= FIRST_PORTABLE:
        ways.append((_shipped, packs.PORTABLE))
    looked = []
    for way, form in ways:
        try:
            return way(variant, form)
        except _NotHere as reason:
            looked.append(f"\n  {reason}")
    raise RuntimeError(
        f"no image of the kernel variant {variant!r} for {target}. Looked for it here:{''.join(looked)}\n"
        "Install Triton (pip install triton). Or run, where Triton and the same lwkd are installed,\n"
        f"  python -m lwkd.kernels.compile --arch {architecture} --out DIR\n"
        f"and copy DIR/{target}.zip to {SHIPPED}"
    )


def _shipped(variant: str, target: str) -> Image:
    path = SHIPPED / f"{target}.zip"
    try:
        return packs.read_image(path, variant, target)
    except FileNotFoundError:
        raise _NotHere(f"{path}: not there") from None
    except LookupError as error:
        raise _NotHere(f"{path}: {error}") from error
    except (OSError, PackError) as error:
        warn_once(f"{path} {error}. It is not used: make it again, or delete it")
        raise _NotHere(f"{path}: refused, it {error}") from error


def _kept(variant: str, target: str) -> Image:
    looked = []
    for path in _kept_files(variant, target):
        try:
            return packs.read_image(path, variant, target)
        except (OSError, LookupError, PackError) as error:
            looked.append(f"{path} {error}")
    folder, why_not = _usable_cache()
    raise _NotHere(f"{folder}: {'; '.join(looked) or 'not there'}" if folder else f"the cache: {why_not}")


def _compiled(variant: str, target: str) -> Image:
    if unkept := _unkept.get((variant, target)):
        return unkept
    try:
        from lwkd.kernels.compile import CompileError, make_image
    except ImportError as error:
        raise _NotHere(f"Triton: cannot be imported ({error})") from error
    try:
        image = make_image(variant, target)
    except CompileError as error:
        warn_once(str(error))
        raise _NotHere(str(error)) from error
    try:
        keep(image)
    except OSError as error:
        warn_once(
            f"lwkd's images cannot be kept ({error}), so that every process compiles its own. Set LWKD_CACHE_DIR to a "
            "folder that can be written to"
        )
        _unkept[variant, target] = image
    return image


def _usable(targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the targets for which a good pack is shipped, and what is wrong with the packs that are not good."""
    good, refused = [], []
    for target in targets:
        path = SHIPPED / f"{target}.zip"
        try:
            packs.read_manifest(path, target)
            good.append(target)
        except FileNotFoundError:
            pass  # nothing is shipped for it, which is nothing wrong
        except (OSError, PackError) as error:
            refused.append(f"{path} {error}")
    return good, refused


def _file_name(variant: str) -> str:
    return f"{hashlib.sha256(variant.encode()).hexdigest()[:20]}.zip"


def _kept_files(variant: str, target: str) -> list[Path]:
    """Files of the cache that may hold a variant: of the Triton that is installed; without one, of any."""
    folder, _ = _usable_cache()
    if folder is None:
        return []
    made_by = f"{packs.sources()}-triton-{triton_version() or '*'}"
    found = sorted(folder.glob(f"{made_by}/{target}/{_file_name(variant)}"))
    return [path for path in found if not _refused(path, folder)]


def _refused(path: Path, folder: Path) -> bool:
    """Whether somebody else can write to a file of the cache, or to a folder on the way to it."""
    on_the_way = [path, *(parent for parent in path.parents if folder in parent.parents)]
    problem = next(filter(None, map(packs.not_private, on_the_way)), "")
    if problem:
        warn_once(f"an image is not used: {problem}")
    return bool(problem)


@functools.cache
def warn_once(text: str) -> None:
    """A warning that this process has not given before."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)
