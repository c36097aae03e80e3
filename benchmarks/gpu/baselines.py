"""Compiles the ``torch.compile`` baselines ahead of their measurement, in several processes.

What they compile lies in the cache of inductor afterwards (``TORCHINDUCTOR_CACHE_DIR``), where the measuring process
finds it: compiling one after another there would take most of the time. A baseline that is not found is compiled then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from benchmarks.gpu.inputs import cases, work


def compile_share(shard: int, shards: int, device: torch.device, until: float) -> None:
    """Every so many-th case, the first ones first."""
    for case in cases()[shard::shards]:
        if not case.compiles or time.monotonic() > until:
            continue
        torch._dynamo.reset()
        begin = time.monotonic()
        try:
            work(case, device, sets=1).implementations["torch.compile"]()
        except Exception as error:  # it will be said again, and recorded, where it is measured
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
        print(f"{case.name}: {time.monotonic() - begin:.1f} s", flush=True)


def main() -> int:
    """Exit status: that of the process that fared worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard", type=int, help="do this share of the work")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further case is begun")
    options = parser.parse_args()
    if options.shard is not None:
        compile_share(
            options.shard, options.shards, torch.device(options.device), time.monotonic() + options.seconds - 15
        )
        return 0
    again = [sys.executable, "-m", "benchmarks.gpu.baselines", *sys.argv[1:]]
    started = [subprocess.Popen([*again, "--shard", str(shard)]) for shard in range(options.shards)]
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    raise SystemExit(main())
