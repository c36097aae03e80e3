"""Where the idx files of Fashion-MNIST and MNIST come from: the data folder, Debian's package, a download."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lwkd.program.errors import DamagedFileError, ProgramError, require

PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FOLDERS = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
"""torchvision's classes, and the folders that they keep their files in."""

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PATIENCE = 300
"""Seconds after which a package manager that does not answer is given up."""


def _damaged(path: Path, why: object) -> DamagedFileError:
    return DamagedFileError(path, str(why), "delete this file and run again, it is then fetched afresh")


def read_idx(path: Path) -> Tensor:
    """Images ``(N, H, W)`` uint8 or labels ``(N,)`` int64, read by torchvision.

    Errors: :class:`ProgramError` that names the file, where it is not an idx file of bytes or is cut off.
    """
    readers = require("torchvision.datasets.mnist")
    try:
        found: Tensor = (readers.read_image_file if "images" in path.name else readers.read_label_file)(str(path))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, f"it is no whole idx file of bytes: {error or type(error).__name__}") from error
    return found


def unpack(folder: Path, raw: Path) -> None:
    """Put the four idx files found in ``folder`` (plain or gzipped) into ``raw``, each written aside and renamed.

    Errors: :class:`ProgramError` that names the file that cannot be unzipped.
    """
    raw.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        plain, zipped = folder / part, folder / f"{part}.gz"
        if (raw / part).exists():
            continue
        aside = raw / f".{part}.partial"
        try:
            with plain.open("rb") if plain.exists() else gzip.open(zipped) as source, aside.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            aside.unlink(missing_ok=True)
            raise _damaged(zipped, error) from error
        os.replace(aside, raw / part)


def holds_all(folder: Path) -> bool:
    """Whether the four idx files lie in a folder, plain or gzipped."""
    return all((folder / part).exists() or (folder / f"{part}.gz").exists() for part in PARTS)


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
        raise ProgramError(f"the four files {PARTS[0]}[.gz] … {PARTS[-1]}[.gz] are not there")
    unpack(folder, raw)


def _download(kind: str, data_dir: Path) -> None:
    dataset = getattr(require("torchvision.datasets"), FOLDERS[kind])
    try:
        dataset(str(data_dir), download=True)
    except Exception as error:  # the downloader raises whatever its transport raises
        raise ProgramError(f"{type(error).__name__}: {error}") from error


def provide_idx(kind: str, data_dir: Path, say: Callable[[str], None]) -> list[Tensor]:
    """Find or fetch an idx data set, and read its four files: images and labels to train on, images and labels to test.

    Tried in this order: ``FashionMNIST/raw`` (``MNIST/raw``) and ``fashion-mnist`` (``mnist``) in the data folder, not
    the folder itself, because the files of both sets have the same names; for Fashion-MNIST the place where Debian's
    package installs and that package fetched without root, then torchvision's downloader.

    Args:
        kind: ``"fashion-mnist"`` or ``"mnist"``.
        data_dir: the folder that keeps data; created.
        say: told what is being fetched.

    Errors: :class:`ProgramError` that lists what was tried, each with its reason, and how to get the data; or one that
        names a damaged file, at once.
    """
    raw = data_dir / FOLDERS[kind] / "raw"
    steps: list[tuple[str, Callable[[], None]]] = [
        (f"files in {raw}", lambda: _from_folder(raw, raw)),
        (f"files in {data_dir / kind}", lambda: _from_folder(data_dir / kind, raw)),
    ]
    how = f"put the four files into {data_dir / kind}, or use --data digits, which is always there"
    if kind == "fashion-mnist":
        steps.append((f"files in {DEBIAN_FOLDER}", lambda: _from_folder(DEBIAN_FOLDER, raw)))
        steps.append((f"apt-get download {DEBIAN_PACKAGE}", lambda: fetch_debian(raw)))
        how = f"install Debian's package (apt install {DEBIAN_PACKAGE}), or {how}"
    steps.append(("torchvision's downloader", lambda: _download(kind, data_dir)))
    tried = []
    for name, step in steps:
        try:
            if not name.startswith("files in"):
                say(f"{kind}: trying {name}")
            step()
            return [read_idx(raw / part) for part in PARTS]
        except PermissionError as error:
            raise ProgramError(
                f"{data_dir} cannot be written: {error}", "give another folder with --data-dir"
            ) from error
        except DamagedFileError:
            raise
        except ProgramError as error:
            tried.append(f"  {name}: {error.problem}")
    raise ProgramError(f"{kind} was not found. Tried:\n" + "\n".join(tried), how)
