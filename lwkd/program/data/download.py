"""Where the idx files of Fashion-MNIST and MNIST come from: the data folder, Debian's package, a download."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lwkd.program.errors import DamagedFileError, ProgramError, require

PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PATIENCE = 300
"""Seconds after which a package manager that does not answer is given up."""


def check_idx(path: Path) -> None:
    """Compare an idx file's size with its header (magic, dimensions, bytes).

    Errors: :class:`ProgramError` that names the file, where it is not an idx file of bytes or is cut off.
    """
    found = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4)
        ranks = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}
        sizes = file.read(4 * ranks.get(head, 0))
    if head not in ranks or len(sizes) != 4 * ranks[head]:
        raise _damaged(path, f"it begins with {head!r}, which is not an idx file of bytes")
    expected = 4 + len(sizes)
    count = 1
    for size in struct.unpack(f">{ranks[head]}I", sizes):
        count *= size
    if found != expected + count:
        raise _damaged(path, f"its header promises {expected + count} bytes, it has {found}")


def _damaged(path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(path, why, "delete this file and run again, it is then fetched afresh")


def unpack(folder: Path, raw: Path) -> None:
    """Put the four idx files found in ``folder`` (plain or gzipped) into ``raw``, each written aside and renamed.

    Errors: :class:`ProgramError` that names the file that cannot be unzipped.
    """
    raw.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        target = raw / f"{part}-ubyte"
        plain, zipped = folder / f"{part}-ubyte", folder / f"{part}-ubyte.gz"
        if target.exists():
            check_idx(target)
            continue
        aside = target.with_name(f".{target.name}.partial")
        try:
            with plain.open("rb") if plain.exists() else gzip.open(zipped) as source, aside.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            aside.unlink(missing_ok=True)
            raise _damaged(zipped, str(error)) from error
        check_idx(aside)
        os.replace(aside, target)


def holds_all(folder: Path) -> bool:
    """Whether the four idx files lie in a folder, plain or gzipped."""
    return all((folder / f"{part}-ubyte").exists() or (folder / f"{part}-ubyte.gz").exists() for part in PARTS)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError as error:
        raise ProgramError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{' '.join(command[:2])} did not finish within {PATIENCE} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise ProgramError(lines[-1])


def fetch_debian(raw: Path) -> None:
    """Fetch Debian's package without installing it (no root needed) and unpack its four files into ``raw``.

    Errors: :class:`ProgramError` with the last line that apt or dpkg said.
    """
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix=".debian-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt drops its rights to the user _apt, which must be able to write and look here
        try:
            _run(["apt-get", "download", DEBIAN_PACKAGE], folder)
        except ProgramError:
            if os.geteuid() != 0:
                raise
            # A fresh machine has no package lists; only root may fetch them.
            _run(["apt-get", "update"], folder)
            _run(["apt-get", "download", DEBIAN_PACKAGE], folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg-deb", "-x", package.name, "."], folder)
        unpack(folder / DEBIAN_FOLDER.relative_to("/"), raw)


def _from_folder(folder: Path, raw: Path) -> None:
    if not holds_all(folder):
        raise ProgramError(f"the four files {PARTS[0]}-ubyte[.gz] … {PARTS[-1]}-ubyte[.gz] are not there")
    unpack(folder, raw)


def provide_idx(kind: str, data_dir: Path, say: Callable[[str], None]) -> Any:
    """Find or fetch an idx data set and return torchvision's class for it.

    Tried in this order: ``FashionMNIST/raw`` (``MNIST/raw``) and ``fashion-mnist`` (``mnist``) in the data folder, not
    the folder itself, because the files of both sets have the same names; for Fashion-MNIST the place where Debian's
    package installs and that package fetched without root, then torchvision's downloader.

    Args:
        kind: ``"fashion-mnist"`` or ``"mnist"``.
        data_dir: the folder that keeps data; created.
        say: told what is being fetched.

    Errors: :class:`ProgramError` that lists what was tried and how to get the data, or names a damaged file.
    """
    dataset = getattr(require("torchvision.datasets"), {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}[kind])
    raw = data_dir / dataset.__name__ / "raw"
    steps: list[tuple[str, Callable[[], None]]] = [
        (f"files in {raw}", lambda: _from_folder(raw, raw)),
        (f"files in {data_dir / kind}", lambda: _from_folder(data_dir / kind, raw)),
    ]
    if kind == "fashion-mnist":
        steps.append((f"files in {DEBIAN_FOLDER}", lambda: _from_folder(DEBIAN_FOLDER, raw)))
        steps.append((f"apt-get download {DEBIAN_PACKAGE}", lambda: fetch_debian(raw)))
    steps.append(("torchvision's downloader", lambda: _download(dataset, data_dir)))
    return first_that_works(kind, data_dir, steps, say, dataset)


def _download(dataset: Any, data_dir: Path) -> None:
    try:
        dataset(str(data_dir), download=True)
    except Exception as error:  # the downloader raises whatever its transport raises
        raise ProgramError(f"{type(error).__name__}: {error}") from error


def first_that_works(
    kind: str, data_dir: Path, steps: Iterable[tuple[str, Callable[[], None]]], say: Callable[[str], None], dataset: Any
) -> Any:
    """Run the steps until one succeeds, then return ``dataset``.

    Errors: :class:`ProgramError` with the whole list, each step with its reason; a damaged file is reported at once.
    """
    tried = []
    for name, step in steps:
        try:
            if not name.startswith("files in"):
                say(f"{kind}: trying {name}")
            step()
            return dataset
        except PermissionError as error:
            raise ProgramError(
                f"{data_dir} cannot be written: {error}", "give another folder with --data-dir"
            ) from error
        except DamagedFileError:
            raise
        except ProgramError as error:
            tried.append(f"  {name}: {error.problem}")
    how = f"put the four files into {data_dir / kind}, or use --data digits, which is always there"
    if kind == "fashion-mnist":
        how = f"install Debian's package (apt install {DEBIAN_PACKAGE}), or {how}"
    raise ProgramError(f"{kind} was not found. Tried:\n" + "\n".join(tried), how)
