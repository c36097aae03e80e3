"""Time of the one sum over ranks that a measured update makes, for 1 to 4 processes (gloo on this machine's CPU).

    python -m benchmarks.studies.rank_sums

writes ``benchmarks/results/rank_sums.json``.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import report
from lwkd.rates.distributed import summed

SIZES = ((16, 1), (48, 4), (200, 4))
"""Layers and statistics a layer."""

RANKS = (1, 2, 3, 4)
SUMS, WARM_UP = 200, 50


def _rank(rank: int, ranks: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = {}
    for layers, count in SIZES:
        values = torch.ones(layers * count + 2, dtype=torch.float64)
        times = []
        for _ in range(SUMS):
            dist.barrier() if ranks > 1 else None
            began = time.perf_counter()
            summed(values)
            times.append(time.perf_counter() - began)
        if rank == 0:
            times = sorted(times[WARM_UP:])
            fast, middle, slow = (1e6 * times[len(times) * tenth // 10] for tenth in (1, 5, 9))
            shown = f"{fast:.0f} / {middle:.0f} / {slow:.0f} us (one, five, nine in ten are quicker)"
            print(f"{ranks} ranks, {layers} layers x {count}: {values.nbytes} bytes, {shown}", flush=True)
            micros = {"one in ten": fast, "half": middle, "nine in ten": slow}
            found[f"{layers} x {count}"] = {"bytes": values.nbytes, "microseconds_below": micros}
    if rank == 0:
        report.write(Path(folder, "found.json"), found)
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)  # as in the ranks, for the origin
    result = {}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, args=(ranks, folder), nprocs=ranks)
            result[ranks] = report.read(Path(folder, "found.json"))
    report.keep("rank_sums", sums=SUMS - WARM_UP, by_ranks_and_size=result)


if __name__ == "__main__":
    main()
