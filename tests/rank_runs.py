"""Processes that train together, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, make, nets, train


def join(rank: int, folder: str, count: int, **options: Any) -> None:
    """Make this process one of so many, which meet in the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, **options)


def _joined(rank: int, call: Callable[..., Any], folder: str, count: int, arguments: tuple[Any, ...]) -> None:
    join(rank, folder, count)
    torch.save(call(rank, *arguments), f"{folder}/{rank}.pt")
    # Threads of gloo that still hold a tensor of the last collective, such as one that fully_shard gathered, need the
    # interpreter to let go of it, and the process aborts where that has ended. Ours are waited for, torch's are not.
    time.sleep(0.5)
    dist.destroy_process_group()


def on_ranks(call: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """What ``call(rank, *arguments)`` returns on each rank."""
    mp.spawn(_joined, args=(call, str(folder), count, arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def parallel(form: str, base: Callable[..., Any] = BASES["sgd"], **options: Any) -> tuple[Any, ...]:
    """Student, the same under DDP, teacher, the optimizer to step, and the object that shows the rates."""
    student, teacher, pairing = nets()
    whole = DistributedDataParallel(student, broadcast_buffers=False)
    return student, whole, teacher, *make(form, base(student.parameters()), whole, teacher, pairing, **options)


def ends(folder: Path, form: str) -> list[tuple[int, str]]:
    """The exit code of each of two ranks that train a few steps, and what it said.

    Each is a Python of its own from the first line on: ranks that were forked off one end cleanly in any case.
    """
    words = [sys.executable, __file__, str(folder), form]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([*words, str(rank)], stderr=subprocess.PIPE, env=environment, text=True) for rank in (0, 1)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


if __name__ == "__main__":  # the last line of a script, with gloo's threads still there
    join(int(sys.argv[3]), sys.argv[1], 2)
    _, whole, teacher, optimizer, shown = parallel(sys.argv[2])
    train(optimizer, whole, teacher, 3, seed=int(sys.argv[3]))
    assert shown.measurements == 3
