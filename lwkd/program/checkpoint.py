"""Files that are whole or not there: written aside, flushed to the disk, renamed.

A checkpoint is a zip of plain values and tensors, read with ``weights_only=True``. The one before it is kept, and is
the one to continue from where the last is damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from lwkd.program.errors import DamagedFileError, ProgramError, UnwrittenFileError

FORMAT = 1


def write_aside(path: Path, write: Callable[[IO[bytes]], object], *, keep: Path | None = None) -> None:
    """Write a file so that at every moment the old or the new one is there, whole.

    Args:
        path: the file.
        write: writes the content into an open binary file.
        keep: where the old file goes; None drops it.

    Errors: :class:`~lwkd.program.errors.UnwrittenFileError` that names the file; the old one is still there.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)  # half a file only takes room
        # torch.save turns a failed write into a RuntimeError.
        raise UnwrittenFileError(path, _cause(error)) from error


def _cause(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]


def files(path: Path) -> tuple[Path, Path, Path]:
    """The last checkpoint, the one before it, and one that was found damaged and put aside."""
    return path, previous(path), path.with_name(f"{path.stem}.damaged{path.suffix}")


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before it is kept beside it as ``NAME.previous.pt``."""
    write_aside(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=previous(path))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by :func:`save`; checksums are verified, nothing in it is executed.

    Errors: :class:`~lwkd.program.errors.ProgramError` that names a missing, damaged or foreign file.
    """
    state = load_anything(path)
    if state.get("format") != FORMAT:
        raise ProgramError(
            f"{path} is not a checkpoint of this program (format {state.get('format')!r}, expected {FORMAT})",
            "give a file from a run's checkpoints folder",
        )
    return state


def load_anything(path: Path) -> dict[str, Any]:
    """Read any file of ``torch.save`` that holds a dict of plain values and tensors."""
    try:
        content = path.open("rb")
    except FileNotFoundError as error:
        raise ProgramError(f"{path} is not there", "look at the path") from error
    except OSError as error:
        raise ProgramError(f"{path} cannot be read: {error}", "look at the path and its permissions") from error
    try:
        with content:
            if zipfile.is_zipfile(content):
                bad = zipfile.ZipFile(content).testzip()  # torch.load itself does not look at the checksums
                if bad is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            content.seek(0)
            state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # there is nothing that reading wrong bytes cannot raise
        raise DamagedFileError(path, str(error).splitlines()[0] if str(error) else repr(error), USE_A_COPY) from error
    if not isinstance(state, dict):
        raise DamagedFileError(path, f"it holds a {type(state).__name__}, expected a dict", USE_A_COPY)
    return state


USE_A_COPY = "use a copy, or delete it to train this net again"


def load_last(path: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Read the last checkpoint, or the one before where the last is missing or damaged; None where there is neither.

    A damaged file is put aside as ``NAME.damaged.pt``: it must not take the place of the whole one at the next save.

    Args:
        path: the last checkpoint.
        warn: is told of a damaged file that another one replaces.

    Errors: :class:`~lwkd.program.errors.ProgramError` that names what is damaged, if no file is whole.
    """
    there = [candidate for candidate in (path, previous(path)) if candidate.exists()]
    damaged: list[DamagedFileError] = []
    for candidate in there:
        try:
            state = load(candidate)
        except DamagedFileError as error:
            damaged.append(error)
            continue
        if damaged:
            aside = files(path)[2]
            try:
                os.replace(path, aside)
            except OSError as error:
                raise ProgramError(f"{path} could not be moved: {error}", "make the folder writable") from error
            warn(f"{damaged[0].problem}. Going on with the checkpoint before it, {candidate}; moved it to {aside}")
        return state
    if damaged:
        both = ", and so is the one before it" if len(damaged) > 1 else ", and there is none before it"
        raise ProgramError(damaged[0].problem + both, USE_A_COPY) from damaged[0]
    return None


def find(path: Path) -> Path | None:
    """The checkpoint to continue from: the last, or the one before if the program died between the two renames."""
    return next((p for p in (path, previous(path)) if p.exists()), None)


def random_states(device: str) -> dict[str, Any]:
    """The global random streams of Python, NumPy and torch, as plain values and tensors."""
    import numpy as np

    state: Any = np.random.get_state()
    name, keys, *rest = state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: str) -> None:
    """Put back what :func:`random_states` saved."""
    import numpy as np

    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def fingerprint(net: nn.Module) -> str:
    """A checksum of a net's weights and buffers: another one wherever a bit of them is another one.

    >>> fingerprint(nn.Linear(3, 2)) == fingerprint(nn.Linear(3, 2))
    False
    """
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(net: nn.Module, path: Path, name: str) -> None:
    """Load a net's weights from a checkpoint of this program or a plain state dict.

    Errors: :class:`~lwkd.program.errors.ProgramError` that says which weights do not fit, that it is another model, or
        that the file, which is the user's own, holds no weights.
    """
    try:
        state = load_anything(path)
    except DamagedFileError as error:
        raise ProgramError(
            f"{path} holds no weights of {name}: {error.why}",
            "give a state dict, saved by torch.save(net.state_dict(), path), or a teacher.pt of a run of lwkd distill",
            code=2,
        ) from error
    made_for = state.get("name")
    weights = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    weights = {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in weights.items()}
    expected = net.state_dict()
    wrong = [f"{key} is missing" for key in expected if key not in weights]
    wrong += [f"{key} is too many" for key in weights if key not in expected]
    wrong += [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if isinstance(weights.get(key), torch.Tensor) and weights[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        whose = f" (it was saved for {made_for})" if made_for else ""
        raise ProgramError(
            f"{path} holds another model than {name}{whose}: {'; '.join(wrong[:3])}{more}",
            "give the --teacher this checkpoint was made with, and the same --data",
            code=2,
        )
    net.load_state_dict(weights)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None] = lambda message: None) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go of the lock when the process dies, however it dies.

    Args:
        folder: is there.
        warn: is told where the file system knows no locks.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) where another process has it.
    """
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ProgramError(f"{folder} cannot be written: {error}", "give another folder with --out") from error
    with file:
        try:
            # lockf, not flock: processes that read pictures would inherit a lock of flock, and outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ProgramError(
                f"{folder}: another run writes there at this moment",
                "wait until it has ended, or give another folder with --out",
                code=2,
            ) from error
        except OSError as error:
            warn(f"{folder} cannot be locked ({error}): start no other run there before this one has ended")
        yield


def check_output(folder: Path, needed: int) -> None:
    """Make the output folder, and see before any work is done that it can be written and has room.

    Args:
        folder: the folder.
        needed: bytes that the run will write.

    Errors: :class:`~lwkd.program.errors.ProgramError` with the bytes needed and found.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ProgramError(f"{folder} cannot be written: {error}", "give another folder with --out") from error
    if free < needed:
        raise ProgramError(
            f"{folder}: {free / 2**20:.0f} MiB are free, the run writes about {needed / 2**20:.0f} MiB",
            "make room, or give another folder with --out",
        )
