"""Time of the one sum over ranks that a measured update makes, for 1 to 4 processes (gloo on this machine's CPU).

Run: ``python benchmarks/rank_sums.py``
"""

from __future__ import annotations

import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lwkd.rates.distributed import summed

SIZES = ((16, 1), (48, 4), (200, 4))
"""Layers and statistics a layer."""


def _rank(rank: int, ranks: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    for layers, count in SIZES:
        values = torch.ones(layers * count + 2, dtype=torch.float64)
        times = []
        for _ in range(200):
            dist.barrier() if ranks > 1 else None
            began = time.perf_counter()
            summed(values)
            times.append(time.perf_counter() - began)
        if rank == 0:
            times = sorted(times[50:])
            fast, middle, slow = (1e6 * times[len(times) * tenth // 10] for tenth in (1, 5, 9))
            shown = f"{fast:.0f} / {middle:.0f} / {slow:.0f} us (one, five, nine in ten are quicker)"
            print(f"{ranks} ranks, {layers} layers x {count}: {values.nbytes} bytes, {shown}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in range(1, 5):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, args=(ranks, folder), nprocs=ranks)
