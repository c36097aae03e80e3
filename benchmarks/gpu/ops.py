"""Microbenchmarks of the ops: lwkd against eager PyTorch and ``torch.compile``, beside the copy bandwidth.

Run by run.py; by hand, from ``benchmarks/``: ``python -m gpu.ops --out ../runs/gpu`` writes ``ops.json`` and
``bandwidth.png`` there. Cases are written as they are done; those that were not reached in time are named.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu import pictures
from gpu.clock import Clock, clock_of
from gpu.contest import Contender, compare
from gpu.inputs import Case, cases, work
from gpu.options import measuring
from gpu.record import provenance, write
from lwkd.program.provenance import quartiles

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Relative error beyond which a time means nothing; bfloat16 results are rounded to 8 bits."""

RESERVE = 10.0
"""Seconds that are kept for the case that is being measured when time is up, and for the picture."""

COPIED = 1 << 30
"""Bytes of the tensor that is copied to find out what the memory can do."""


def copy_bandwidth(clock: Clock, size: int) -> dict[str, float]:
    """Gigabytes a second of a copy from device to device, bytes read and bytes written both counted."""
    source = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(source)
    copying = Contender([lambda: lambda: target.copy_(source)])
    copying.warm_up(clock)
    rates = []
    for _ in range(31):
        seconds, _ = clock.on_device(copying.next(), copying.head_start)
        rates.append(2e-9 * size / seconds)
    return quartiles(rates)


def floors(clock: Clock) -> dict[str, Any]:
    """What a call costs that does next to nothing: an allocation, and one kernel on one number."""
    one = torch.ones(1, device=clock.device)
    nothing = {
        "an allocation": lambda: torch.empty(1, device=clock.device),
        "one tiny kernel": lambda: one.zero_(),
    }
    found: dict[str, Any] = {}
    for name, call in nothing.items():
        contender = Contender([lambda call=call: call])
        contender.warm_up(clock)
        for _ in range(51):
            contender.take_turn(clock)
        found[name] = {
            f"{kind}_microseconds": quartiles([1e6 * s for s in seconds]) for kind, seconds in contender.seconds.items()
        }
    return found


def measured(case: Case, clock: Clock, backend: str, longest: float) -> dict[str, Any]:
    """One case: first whether the result is right, then the times."""
    torch._dynamo.reset()  # compiled code is kept for eight variants of a function, and then silently becomes eager
    job = work(case, clock.device, clock.cache_bytes, backend)
    found: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "memory": case.memory,
        "layers": len(case.shapes) if case.op != "rate update" else case.shapes[0][0],
        "bytes": job.bytes,
        "sets": len(job.contenders["lwkd"]),
        "left_out": job.left_out,
    }
    error = job.check()
    found["relative_error"] = float(f"{error:.2e}")
    if not error <= TOLERANCE[case.dtype]:
        return found | {"error": f"wrong result: relative error {error:.2e}"}
    return found | compare(clock, job.contenders, longest=longest)


def attempted(case: Case, clock: Clock, backend: str, longest: float) -> dict[str, Any]:
    """One case, or what kept it from being measured."""
    try:
        return measured(case, clock, backend, longest)
    except Exception as error:
        return {"op": case.op, "size": case.size, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    """Exit status 1 if an op of ours failed, or gave a wrong result."""
    options, device = measuring(__doc__, seconds="after which no further case is begun")
    begin = time.perf_counter()
    clock, backend = clock_of(device), "aot_eager" if options.small else "inductor"
    wanted, size = cases(options.small), 1 << 16 if options.small else COPIED
    result: dict[str, Any] = {
        **provenance(device),
        "copy_gigabytes_a_second": copy_bandwidth(clock, size),
        "floors": floors(clock),
        "cases": [],
        "not_reached": [],
    }
    try:
        while wanted and time.perf_counter() - begin < options.seconds - RESERVE:
            started = time.perf_counter()
            found = attempted(wanted[0], clock, backend, longest=0.05 if options.small else 4.0)
            found["seconds"] = round(time.perf_counter() - started, 2)
            result["cases"].append({"name": wanted.pop(0).name, **found})
            write(options.out / "ops.json", result)
            print(found["op"], found["size"], found.get("error", ""), f"{found['seconds']} s", flush=True)
        result["copy_gigabytes_a_second_at_the_end"] = copy_bandwidth(clock, size)
    except KeyboardInterrupt:  # out of time after all: what there is, is kept
        print("interrupted", flush=True)
    result["not_reached"] = [case.name for case in wanted]
    write(options.out / "ops.json", result)
    pictures.bandwidth(result, options.out / "bandwidth.png")
    return int(any("error" in case for case in result["cases"]))


if __name__ == "__main__":
    raise SystemExit(main())
