"""Images on disk. A pack is a zip archive with a manifest and the images of some variants for one target.

One pack holds all that is shipped for an architecture; every cached image is a pack of its own. So both have the same
reader and writer, a file that appears whole or not at all (os.replace), and zip's checksums, and a wheel has seven
files instead of thousands. Finding one image among 258 takes three milliseconds, once for each kernel and process.

A target is ``sm_90`` for machine code of an architecture, ``ptx80`` for PTX that drivers compile for any from 8.0 on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PORTABLE = "ptx80"
"""The target of PTX."""

BESIDE = {"__init__.py", "images.py", "loops.py", "packs.py"}
"""Files here that have no influence on the images."""

MANIFEST = "manifest.json"

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a pack, so that equal images make equal packs."""


class PackError(Exception):
    """A pack that must not be used; the message says why."""


@dataclass(frozen=True)
class Image:
    """What the compiler made of one variant for one target, and what its launch needs to know."""

    variant: str
    target: str
    code: bytes
    """A cubin, or PTX that ends in a NUL."""
    entry: str
    """Name of the kernel in the code."""
    parameters: tuple[int, ...]
    """Bytes of the run-time parameters, in order."""
    hidden: int
    """Pointers that the compiler adds after them; they are null."""
    shared: int
    """Bytes of dynamic shared memory."""
    warps: int
    """Warps of a program, as compiled."""


@functools.cache
def sources() -> str:
    """Hash of what decides the contents of images: kernels, their interface, and how they are compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in BESIDE:
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_pack(path: Path, triton: str, images: Iterable[Image]) -> None:
    """Write images of one target; whoever reads at the same time finds the old pack, none, or the new one.

    Args:
        path: the file to make; its folder is made as well.
        triton: version of the Triton that compiled the images.
        images: what to write.

    Raises:
        OSError: the file cannot be written.
    """
    from lwkd import __version__

    images = list(images)
    entries: dict[str, dict[str, Any]] = {}
    for number, image in enumerate(images):
        launch = {"entry": image.entry, "parameters": image.parameters, "hidden": image.hidden}
        entries[image.variant] = {"file": str(number), **launch, "shared": image.shared, "warps": image.warps}
    (target,) = {image.target for image in images}
    origin = {"lwkd": __version__, "sources": sources(), "triton": triton, "target": target}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(draft, "x") as archive:
            for number, image in enumerate(images):
                archive.writestr(_member(str(number)), image.code, compresslevel=9)
            archive.writestr(_member(MANIFEST), json.dumps({**origin, "images": entries}, indent=1))
        draft.chmod(draft.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def not_private(path: Path) -> str:
    """Why others could change what is at a path, and what to do; empty where they cannot, or nothing is there."""
    try:
        found = path.stat()
    except OSError:  # whoever needs it will hear of it
        return ""
    if found.st_uid != os.geteuid():
        return (
            f"{path} belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}. Set LWKD_CACHE_DIR "
            "to a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}). Run: chmod go-w {path}"
    return ""


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are not there, for this user alone.

    Raises:
        OSError: it cannot be made.
    """
    for missing in (*reversed(folder.parents), folder):
        if not missing.is_dir():
            missing.mkdir(mode=0o700, exist_ok=True)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, EPOCH)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def read_manifest(path: Path, target: str) -> dict[str, Any]:
    """The manifest of a pack: origin, and the images by variant.

    Raises:
        OSError: the pack is not there, or cannot be read.
        PackError: it is damaged, of another target, or from another version of the kernels.
    """
    with _opened(path, target) as (_, manifest):
        return manifest


def read_image(path: Path, variant: str, target: str) -> Image:
    """One image of a pack.

    Raises:
        OSError: the pack is not there, or cannot be read.
        PackError: as :func:`read_manifest`.
        LookupError: it lacks the variant.
    """
    with _opened(path, target) as (archive, manifest):
        entry = manifest["images"].get(variant)
        if entry is None:
            raise LookupError(f"lacks it (it holds {len(manifest['images'])} others)")
        launch = {"hidden": entry["hidden"], "shared": entry["shared"], "warps": entry["warps"]}
        code, parameters = archive.read(entry["file"]), tuple(entry["parameters"])
        return Image(variant, target, code, entry["entry"], parameters, **launch)


@contextlib.contextmanager
def _opened(path: Path, target: str) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """A pack and its manifest; whatever error zipfile, zlib and json raise for a damaged file becomes a PackError."""
    from lwkd import __version__

    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            if manifest["sources"] != sources():
                raise PackError(
                    f"holds images from another version of the kernels (lwkd {manifest['lwkd']}, sources "
                    f"{manifest['sources']}; installed are lwkd {__version__}, sources {sources()})"
                )
            if manifest["target"] != target:
                raise PackError(f"holds images for {manifest['target']}")
            yield archive, manifest
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise PackError(f"is damaged ({type(error).__name__}: {error})") from error
