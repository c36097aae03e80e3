"""Compiles and loads every kernel for the GPU of this machine, and says how long that took, cold and warm."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

import lwkd

ONCE = "import time, torch, lwkd; b = time.perf_counter(); lwkd.warmup('cuda'); print(time.perf_counter() - b)"


def main() -> None:
    """Nothing to compile on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    print(lwkd.backend())
    if device.type != "cuda":
        return
    print(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    begin = time.perf_counter()
    lwkd.warmup(device)
    print(f"compiled and loaded in {time.perf_counter() - begin:.1f} s")
    done = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True, check=False)
    print(f"found again by another process and loaded in {done.stdout.strip()} s")
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
