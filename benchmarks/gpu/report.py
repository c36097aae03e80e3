"""The summary: tables of what was measured, and which targets were missed, from the files that the stages have left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.report import markdown, spread

LARGE = 64e6
"""Bytes from which on the copy bandwidth is the measure."""

EAGER, COMPILED, COPY, HOST_MICROSECONDS, KERNELS = 3.0, 1.0, 0.85, 20.0, 2
"""The targets: times faster than eager and ``torch.compile``, share of the copy bandwidth, one call for 16 layers."""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def _share_of_copy(case: Mapping[str, Any], copied: float) -> float:
    return case["bytes"] / case["implementations"]["lwkd"]["on_device_microseconds"]["median"] / 1e3 / copied


def verdict(case: dict[str, Any], copied: float) -> list[str]:
    """The targets that a case misses; none if it reaches all that apply to it."""
    if "error" in case:
        return [case["error"]]
    found, missed = case["implementations"], []
    for name, target in (("eager", EAGER), ("torch.compile", COMPILED)):
        for kind in ("latency", "on_device"):
            ratio = found.get(name, {}).get(f"{kind}_ratio", {}).get("median")
            if ratio is not None and ratio < target:
                missed.append(f"{ratio:.2f} x {name} by {kind.replace('_', ' ')} (target {target:g})")
    ours, share = found["lwkd"], _share_of_copy(case, copied)
    if case["bytes"] > LARGE and share < COPY:
        missed.append(f"{share:.0%} of the copy bandwidth (target {COPY:.0%})")
    if case["op"] == "launch" and case["layers"] == 16:
        host = found.get("lwkd, same addresses", ours)["host_microseconds"]["median"]
        if host > HOST_MICROSECONDS:
            missed.append(f"{host:.1f} µs on the host (target {HOST_MICROSECONDS:g})")
        if ours["kernels"] is not None and ours["kernels"] > KERNELS:
            missed.append(f"{ours['kernels']} kernels (target {KERNELS})")
    return missed


def _shown(missed: list[str]) -> str:
    return f"**{'; '.join(missed)}**" if missed else "ok"


def _failed(name: str, error: str, columns: int) -> list[str]:
    return [name, *["-"] * (columns - 2), f"**failed**: {error[:120]}"]


def _not_reached(result: Mapping[str, Any]) -> str:
    left = result["not_reached"]
    return f"\n\nNot reached in time: {'; '.join(left)}." if left else ""


def _ratios(of: Mapping[str, Any]) -> str:
    kinds = [f"{of[kind]['median']:.2f}" if kind in of else "-" for kind in ("on_device_ratio", "latency_ratio")]
    return " / ".join(kinds)


def _ops(result: dict[str, Any]) -> str:
    copied = result["copy_gigabytes_a_second"]["median"]
    head = ["case", "MB", "device µs", "of copy", "host µs", "kernels+copies", "eager ÷", "compiled ÷", "targets"]
    rows = [head]
    for name, case in result["cases"].items():
        if "error" in case:
            rows.append(_failed(name, case["error"], len(head)))
            continue
        found = case["implementations"]
        ours = found["lwkd"]
        rows.append(
            [
                name,
                f"{case['bytes'] / 1e6:.3g}",
                spread(ours["on_device_microseconds"]),
                f"{_share_of_copy(case, copied):.0%}",
                spread(ours["host_microseconds"]),
                "-" if ours["kernels"] is None else f"{ours['kernels']}+{ours['copies']}",
                *(_ratios(found.get(other, {})) for other in ("eager", "torch.compile")),
                _shown(verdict(case, copied)),
            ]
        )
    floors = [["floor", "GB/s", "host µs"], ["copy, read + write", spread(result["copy_gigabytes_a_second"]), ""]]
    floors += [[name, "", spread(of["host_microseconds"])] for name, of in result["floors"].items()]
    return (
        f"{markdown(floors)}\n\n{markdown(rows)}{_not_reached(result)}\n\nRatios: by the device's time / by latency.\n"
    )


def _steps(result: dict[str, Any]) -> str:
    targets, signals = result["targets"], result["signals"]
    measured = [name for name in signals if result["default_intervals"][name] > 1]
    steps = [f"steps that a measurement takes: {name}" for name in measured]
    added = [f"{name}, every {result['default_intervals'][name]}: %" for name in signals]
    head = ["pair", "step, ms", *steps, *added, "noise, %", "targets"]
    rows = [head]
    for title, found in result["pairs"].items():
        if "error" in found:
            rows.append(_failed(title, found["error"], len(head)))
            continue
        of = found["overhead"]
        missed = [
            f"{signal} {of[signal]['median']:.1%} (target {target:.0%})"
            for signal, target in targets.items()
            if signal in of and of[signal]["median"] > target
        ]
        missed += [f"{name} failed: {error[:120]}" for name, error in found["failed"].items()]
        percent = [spread(of[name], scale=100) if name in of else "-" for name in (*signals, "bare again")]
        taken = found["steps_a_measurement"]
        lasting = [spread(taken[name]) if name in taken else "-" for name in measured]
        rows.append([title, spread(found["step_milliseconds"]["bare"]), *lasting, *percent, _shown(missed)])
    table = f"{markdown(rows)}{_not_reached(result)}\n\n"
    costs = result["groups"]
    if "error" in costs:
        return f"{table}Groups: **failed**: {costs['error'][:120]}\n"
    on_host, share = costs["optimizer_step_microseconds_on_the_host"], costs["added_share_of_the_small_step"]
    groups = [["base, groups", "a step on the host, µs", "added to the small step"]]
    groups += [
        [f"{name}, {count}", spread(found), f"{share[name][count]:.1%}"]
        for name, of in on_host.items()
        for count, found in of.items()
    ]
    groups.append(["small training step, one group", spread(costs["small_training_step_microseconds"]), ""])
    return f"{table}{costs['tensors']} equal tensors:\n\n{markdown(groups)}\n"


def _tests(path: Path) -> str:
    try:
        suites = list(ElementTree.parse(path).iter("testsuite"))
    except (FileNotFoundError, ElementTree.ParseError):
        return "No report of the tests.\n"
    kinds = ("tests", "failures", "errors", "skipped")
    bad = [
        f"- {case.get('classname')}.{case.get('name')}: {(problem.get('message') or '').splitlines()[0][:160]}"
        for suite in suites
        for case in suite.iter("testcase")
        for problem in (*case.iter("failure"), *case.iter("error"))
    ]
    skipped = sorted({(s.get("message") or "")[:160] for suite in suites for s in suite.iter("skipped")})
    counts = [str(sum(int(suite.get(kind, 0)) for suite in suites)) for kind in kinds]
    lines = [markdown([kinds, counts]), "", *bad[:40], *(f"- skipped: {message}" for message in skipped)]
    return "\n".join(lines) + "\n"


def _origin(of: Mapping[str, Any]) -> str:
    machine, versions = of["machine"], of["versions"]
    accelerator = machine["accelerator"]
    rows = [
        ["accelerator", "driver", "processor", "cores", "python", "torch", "triton", "commit"],
        [
            accelerator["name"],
            accelerator.get("driver", "-"),
            machine["processor"],
            str(machine["cores"]),
            versions["python"],
            versions["torch"],
            versions["triton"],
            of["commit"],
        ],
    ]
    return f"{markdown(rows)}\n"


def summary(out: Path) -> str:
    """The Markdown page of a run."""
    ops, steps, stages = (_read(out / f"{name}.json") for name in ("ops", "overhead", "stages"))
    parts = ["# lwkd on a GPU\n"]
    if origin := ops or steps:
        parts.append(_origin(origin))
    parts += ["## Ops\n", "Not measured.\n" if ops is None else _ops(ops)]
    parts += ["## Training steps\n", "Not measured.\n" if steps is None else _steps(steps)]
    parts += ["## Tests\n", _tests(out / "tests.xml")]
    if stages is not None:
        rows = [
            [of["name"], of["result"], f"{of['seconds']:.0f}", of["last"].replace("|", "/")] for of in stages["stages"]
        ]
        parts += ["## Stages\n", f"{markdown([['stage', 'result', 'seconds', 'its last line'], *rows])}\n"]
    return "\n".join(parts)
