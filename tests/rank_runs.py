"""Processes that train together, over gloo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, make, nets


def join(rank: int, folder: str, count: int, **options: Any) -> None:
    """Make this process one of so many, which meet in the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, **options)


def _joined(rank: int, call: Callable[..., Any], folder: str, count: int, arguments: tuple[Any, ...]) -> None:
    join(rank, folder, count)
    torch.save(call(rank, *arguments), f"{folder}/{rank}.pt")
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
