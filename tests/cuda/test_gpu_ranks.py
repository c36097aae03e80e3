"""DDP over NCCL with one process: the sums over ranks go through the all-reduce, and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def _rank(rank: int, folder: str, device: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from toy import BASES, batches, loss_of, moving, nets

    import lwkd
    from lwkd.rates import distributed as ranks

    torch.set_num_threads(1)
    found = {}
    for parallel in (True, False):
        student, teacher, pairing = nets()
        student, teacher = student.to(device), teacher.to(device)
        wrapped = student
        if parallel:
            dist.init_process_group(BACKENDS[device], init_method=f"file://{folder}/meet", rank=rank, world_size=1)
            wrapped = DistributedDataParallel(student, broadcast_buffers=False)
            ranks.world_size = lambda _: 2  # so that sums are formed by a collective, of which one process is all
        optimizer = lwkd.LayerwiseOptimizer(
            BASES["sgd"](student.parameters()), wrapped, teacher, pairing, policy=moving()
        )
        for x, y in batches(5):
            optimizer.zero_grad()
            loss_of(wrapped, teacher, x.to(device), y.to(device)).backward()
            optimizer.step()
        found[parallel] = list(optimizer.rates.values()), dict(optimizer.passes)
        if parallel:
            dist.destroy_process_group()
            ranks.world_size = lambda _: 1
    torch.save(found, f"{folder}/found.pt")


def test_one_process(tmp_path: Path) -> None:
    from backends import DEVICE

    mp.spawn(_rank, args=(str(tmp_path), DEVICE.type), nprocs=1)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4)
    assert found[True][1] == found[False][1] == {"measured": 5}
    assert set(found[True][0]) != {1.0}
