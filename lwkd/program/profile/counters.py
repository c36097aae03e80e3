"""What a step takes beside time, counted by torch.profiler: peak memory, launches, the host's share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from lwkd.program.checkpoint import write_aside


class Counts(NamedTuple):
    """Of one step.

    ``peak_bytes`` are those beyond what was held before the step; ``calls`` are kernel launches on a GPU, and calls of
    ATen ops on a CPU; ``host_seconds`` pass on a GPU's host until the whole step is launched (None on a CPU).
    """

    peak_bytes: int
    calls: int
    host_seconds: float | None


def counted(step: Callable[[], object], device: torch.device) -> Counts:
    """Count what one step takes.

    Args:
        step: launches one step; called once on a CPU and three times on a GPU, where the second call is not counted.
        device: where it runs.
    """
    if device.type == "cuda":
        return _on_cuda(step, device)
    with _profiler(memory=True) as found:
        step()
    held, peak = 0, 0
    events = found.profiler.kineto_results.events()  # every allocation; those of FunctionEvent are sums
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Counts(peak, sum(event.name().startswith(("aten::", "lwkd::")) for event in events), None)


def _on_cuda(step: Callable[[], object], device: torch.device) -> Counts:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    step()
    host = time.perf_counter() - begin
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    step()  # of those that measure every other step, this one does not
    with _profiler() as found:
        step()
        torch.cuda.synchronize(device)
    # The runtime's and the driver's calls alike, plain and extended.
    launches = sum("LaunchKernel" in event.name() for event in found.profiler.kineto_results.events())
    return Counts(peak, launches, host)


def traced(step: Callable[[], object], steps: int, path: Path) -> None:
    """Write a Chrome trace of some steps."""
    with _profiler() as found:
        for _ in range(steps):
            step()
    aside = path.with_name(f".{path.name}.trace")
    found.export_chrome_trace(str(aside))
    write_aside(path, lambda file: file.write(aside.read_bytes()))
    aside.unlink()


def _profiler(*, memory: bool = False) -> Any:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return torch_profile(activities=activities, profile_memory=memory, acc_events=True)
