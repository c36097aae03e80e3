"""Microbenchmarks of the ops: lwkd beside eager PyTorch and ``torch.compile``, and the copy bandwidth.

Run by run.py; by hand ``python -m benchmarks.gpu.ops --out runs/gpu`` writes ``ops.json`` and ``bandwidth.png`` there.
Cases are written as they are done; those that were not reached in time are named.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import pictures, stage, tiles
from benchmarks.gpu.inputs import SETS, Case, cases, work
from benchmarks.gpu.timing import Times, compare, on_device, times
from benchmarks.harness import SMALL
from lwkd.program.provenance import origin, quartiles
from lwkd.program.turns import take_turns

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Relative error beyond which a time means nothing; bfloat16 results are rounded to 8 bits."""

COPIED = 1 << (16 if SMALL else 30)
"""Bytes of the tensor that is copied to find out what the memory can do."""

LONGEST = 0.05 if SMALL else 4.0
"""Seconds of a case after which no further round is begun."""


def copy_bandwidth(device: torch.device) -> dict[str, float]:
    """Gigabytes a second of a copy from device to device, bytes read and bytes written both counted."""
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    taken = on_device(lambda: target.copy_(source), device, milliseconds=60)
    return quartiles([2e-9 * COPIED / seconds for seconds in taken])


def floors(device: torch.device) -> dict[str, Any]:
    """What a call costs that does next to nothing: an allocation, and one kernel on one number."""
    one = torch.ones(1, device=device)
    calls = {"an allocation": lambda: torch.empty(1, device=device), "one tiny kernel": lambda: one.zero_()}
    turns = {name: partial(times, call, device) for name, call in calls.items()}
    return {
        name: {
            f"{kind}_microseconds": quartiles([1e6 * seconds for seconds in of])
            for kind, of in zip(Times._fields, zip(*found, strict=True), strict=True)
        }
        for name, found in take_turns(turns, 51, warm_up=3).items()
    }


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """One case: first whether the result is right, then the times."""
    torch._dynamo.reset()  # compiled code is kept for eight variants of a function, and then silently becomes eager
    job = work(case, device)
    error = job.check()
    found: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "memory": case.memory,
        "layers": len(case.shapes) if case.op != "rate update" else case.shapes[0][0],
        "bytes": job.bytes,
        "sets": SETS,
        "left_out": job.left_out,
        "relative_error": float(f"{error:.2e}"),
    }
    if not error <= TOLERANCE[case.dtype]:
        return found | {"error": f"wrong result: relative error {error:.2e}"}
    return found | compare(job.implementations, device, longest=LONGEST)


def main() -> int:
    """Exit status 1 if an op of ours failed, or gave a wrong result."""
    options, device = stage.options_of(__doc__)
    path = options.out / "ops.json"
    result = {
        **origin(device),
        "copy_gigabytes_a_second": copy_bandwidth(device),
        "floors": floors(device),
        "tunings": stage.attempted(partial(tiles.variants, device), device),
    }

    def attempt(case: Case, _: float) -> dict[str, Any]:
        return stage.attempted(partial(measured, case, device), device)

    stage.measured_in_time(
        path, result, "cases", {case.name: partial(attempt, case) for case in cases()}, options.until
    )
    result["copy_gigabytes_a_second_at_the_end"] = copy_bandwidth(device)
    report.write(path, result)
    pictures.bandwidth(result, options.out / "bandwidth.png")
    return int(any("error" in case for case in result["cases"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
