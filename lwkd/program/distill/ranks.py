"""``lwkd distill`` under torchrun: the processes train one net together, and the first one has the word and the folder.

Without torchrun everything here does nothing: there is one rank, the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console as RichConsole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lwkd.program.console import Console
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import ProgramError
from lwkd.rates.distributed import world_size as count

T = TypeVar("T")

LET_GO = 0.2
"""Seconds that threads of gloo get for it at the end; they need milliseconds."""


def own() -> int:
    """Number of this rank."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def joined(settings: Settings, console: Console) -> Iterator[None]:
    """Join the other processes of torchrun for the length of a run; only the first of them speaks.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) for settings that do not go with so many ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "RANK" not in os.environ:
        yield
        return
    _check(settings, ranks)
    device, backend = torch.device(settings.device), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # wishes to stop and objects go over the CPU
    dist.init_process_group(backend)
    if dist.get_rank() > 0:
        console.out = RichConsole(quiet=True)
    try:
        yield
    finally:
        # A thread of gloo lets go of an object a little after it has arrived, and needs the interpreter for that. Where
        # the interpreter has ended meanwhile, the process aborts; DistributedDataParallel keeps the thread alive.
        time.sleep(LET_GO)
        dist.destroy_process_group()


def _check(settings: Settings, ranks: int) -> None:
    if settings.batch_size % ranks or settings.batch_size < 2 * ranks:
        raise ProgramError(
            f"--batch-size {settings.batch_size} cannot be shared by {ranks} ranks: it is the batch of all together, "
            "of which each takes an equal part of at least 2 pictures",
            f"give a multiple of {ranks}, at least {2 * ranks}, or another --nproc-per-node",
            code=2,
        )
    device = torch.device(settings.device)
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ProgramError(
            f"--device {settings.device} names one device for {ranks} ranks",
            "give --device cuda (each rank takes the GPU of its number) or --device cpu",
            code=2,
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if device.type == "cuda" and torch.cuda.device_count() < local:
        raise ProgramError(
            f"{local} ranks on this machine, and {torch.cuda.device_count()} GPUs",
            "give torchrun as many processes as there are GPUs (--nproc-per-node), or --device cpu",
            code=2,
        )


def parallel(net: nn.Module) -> nn.Module:
    """The net as it is called in training: gradients are averaged over the ranks."""
    return net if count() == 1 else DistributedDataParallel(net)


def summed(tensor: Tensor) -> Tensor:
    """Sum over the ranks."""
    tensor = tensor.clone()
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_wants(wish: bool) -> bool:
    """Whether any rank wants something: a signal does not reach all of them before the same batch."""
    return wish if count() == 1 else bool(summed(torch.tensor(float(wish))) > 0)


def same_buffers(net: nn.Module) -> None:
    """Statistics of batches, which each rank has of its own, become those of the first."""
    for buffer in net.buffers() if count() > 1 else ():
        dist.broadcast(buffer, 0)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def by_first(make: Callable[[], T]) -> T:
    """What the first rank made, which the others get; where it fails, they end without a word of their own."""
    if count() == 1:
        return make()
    told: list[Any] = [None, None]
    error: ProgramError | None = None
    if own() == 0:
        try:
            told[0] = make()
        except ProgramError as found:
            error, told[1] = found, found.code
    dist.broadcast_object_list(told)
    if error is not None:
        raise error
    if told[1] is not None:
        raise SystemExit(told[1])
    return told[0]
