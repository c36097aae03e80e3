"""What the stages that measure have in common: their command line, and the time they have."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.harness import SMALL

RESERVE = 10.0
"""Seconds that are kept for what is being measured when time is up, and for the picture."""


def options_of(doc: str | None) -> tuple[argparse.Namespace, torch.device]:
    """The options of this process, with the moment ``until`` which it has time, and the device to measure on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="after which nothing further is begun")
    options = parser.parse_args()
    options.until = math.inf if SMALL else time.perf_counter() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    return options, torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)


def attempted(measure: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What was measured, or what kept it from being measured."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured_in_time(
    path: Path, result: dict[str, Any], into: str, work: dict[str, Callable[[float], dict[str, Any]]], until: float
) -> None:
    """Measure one thing after the other, and write what there is after each, with the names of what was not reached.

    Args:
        path: of the file.
        result: what stands in it beside the measurements.
        into: the measurements' key in ``result``.
        work: by name; called with the seconds that are left to each.
        until: when everything has ended, by ``time.perf_counter()``.
    """
    left = list(work)
    result |= {into: {}, "not_reached": left}
    report.write(path, result)
    try:
        while left and (begin := time.perf_counter()) < until - RESERVE:
            name = left[0]
            found = work[name]((until - RESERVE - begin) / len(left))
            result[into][left.pop(0)] = found | {"seconds": round(time.perf_counter() - begin, 2)}
            report.write(path, result)
            print(name, found.get("error", ""), f"{result[into][name]['seconds']} s", flush=True)
    except KeyboardInterrupt:  # out of time after all: what there is, is kept
        print("interrupted", flush=True)
