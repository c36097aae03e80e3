"""The summary: verdicts against the targets, and tables, from the JSON files that the stages have left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

LARGE = 64e6
"""Bytes from which on the copy bandwidth is the measure."""

EAGER, COMPILED, COPY, HOST_MICROSECONDS, KERNELS = 3.0, 1.0, 0.85, 20.0, 2
"""The targets: times faster than eager and ``torch.compile``, share of the copy bandwidth, one call for 16 layers."""

Row = list[str]


def table(head: Row, rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def _spread(of: dict[str, float] | None, scale: float = 1.0, digits: int = 3) -> str:
    if of is None:
        return "-"
    median, low, high = (f"{scale * of[key]:.{digits}g}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def verdict(case: dict[str, Any], copied: float) -> list[str]:
    """The targets that a case misses, in words; none if it reaches all that apply to it."""
    if "error" in case:
        return [case["error"]]
    contenders, missed = case["contenders"], []
    for name, target in (("eager", EAGER), ("torch.compile", COMPILED)):
        other = contenders.get(name, {})
        for kind in ("latency", "on_device"):
            ratio = other.get(f"{kind}_ratio", {}).get("median")
            if ratio is not None and ratio < target:
                missed.append(f"{ratio:.2f} x {name} by {kind.replace('_', ' ')} (target {target:g})")
    ours = contenders["lwkd"]
    if case["bytes"] > LARGE:
        share = case["bytes"] / ours["on_device_microseconds"]["median"] / 1e3 / copied
        if share < COPY:
            missed.append(f"{share:.0%} of the copy bandwidth (target {COPY:.0%})")
    if case["op"] == "launch" and case["layers"] == 16:
        host = contenders.get("lwkd, same addresses", ours)["host_microseconds"]["median"]
        if host > HOST_MICROSECONDS:
            missed.append(f"{host:.1f} µs on the host (target {HOST_MICROSECONDS:g})")
        if ours["kernels"] is not None and ours["kernels"] > KERNELS:
            missed.append(f"{ours['kernels']} kernels (target {KERNELS})")
    return missed


def _ops(result: dict[str, Any]) -> str:
    copied = result["copy_gigabytes_a_second"]["median"]
    rows = []
    for case in result["cases"]:
        missed = verdict(case, copied)
        if "error" in case:
            rows.append([case["name"], *["-"] * 7, f"**failed**: {case['error'][:120]}"])
            continue
        contenders = case["contenders"]
        ours = contenders["lwkd"]
        share = case["bytes"] / ours["on_device_microseconds"]["median"] / 1e3 / copied
        rows.append(
            [
                case["name"],
                f"{case['bytes'] / 1e6:.3g}",
                _spread(ours["on_device_microseconds"]),
                f"{share:.0%}",
                _spread(ours["host_microseconds"]),
                "-" if ours["kernels"] is None else f"{ours['kernels']}+{ours['copies']}",
                *(
                    " / ".join(
                        f"{of[f'{kind}_ratio']['median']:.2f}" if f"{kind}_ratio" in of else "-"
                        for kind in ("on_device", "latency")
                    )
                    + ("*" if of.get("waits_for_the_device") else "")
                    for of in (contenders.get(name, {}) for name in ("eager", "torch.compile"))
                ),
                "ok" if not missed else "**" + "; ".join(missed) + "**",
            ]
        )
    head = ["case", "MB", "device µs", "of copy", "host µs", "kernels+copies", "eager ÷", "compiled ÷", "targets"]
    floors = ", ".join(f"{name} {_spread(of['host_microseconds'])}" for name, of in result["floors"].items())
    text = (
        f"Copy bandwidth {_spread(result['copy_gigabytes_a_second'])} GB/s, read + write. Floors on the host, µs: "
        f"{floors}. Ratios: by the device's time / by latency; * waits for the device within the call.\n\n"
    )
    left = result["not_reached"]
    return text + table(head, rows) + (f"\nNot reached in time: {'; '.join(left)}.\n" if left else "")


def _added(groups: dict[str, Any], name: str, counts: list[str]) -> str:
    return ", ".join(f"{groups['added_share_of_the_small_step'][name][count]:.1%}" for count in counts[1:])


def _steps(result: dict[str, Any]) -> str:
    rows = []
    for title, found in result["pairs"].items():
        if "error" in found:
            rows.append([title, *["-"] * 5, f"**failed**: {found['error'][:120]}"])
            continue
        of, missed = found["overhead"], []
        for signal, target in result["targets"].items():
            if of[signal]["median"] > target:
                missed.append(f"{signal} {of[signal]['median']:.1%} (target {target:.0%})")
        percent = [_spread(of[name], 100, 2) for name in (*result["targets"], "bare again")]
        bare = _spread(found["step_milliseconds"]["bare"])
        rows.append([title, bare, *percent, "ok" if not missed else "**" + "; ".join(missed) + "**"])
    head = ["pair", "step, ms", *(f"{name}, %" for name in result["targets"]), "noise, %", "targets"]
    groups = result["groups"]
    steps = groups["optimizer_step_microseconds_on_the_host"]
    counts = list(next(iter(steps.values())))
    second = [
        [f"{name}, fused", *(_spread(of[count]) for count in counts), _added(groups, name, counts)]
        for name, of in steps.items()
    ]
    small = _spread(groups["small_training_step_microseconds"], digits=5)
    left = result["not_reached"]
    return (
        table(head, rows)
        + (f"\nNot reached in time: {'; '.join(left)}.\n" if left else "")
        + f"\nOne optimizer step on the host, µs, by number of groups ({groups['tensors']} equal tensors), and what "
        f"more groups add to a small training step of {small} µs:\n\n"
        + table(["base", *(f"{count} groups" for count in counts), "added"], second)
    )


def _tests(path: Path) -> str:
    try:
        suites = list(ElementTree.parse(path).iter("testsuite"))
    except (FileNotFoundError, ElementTree.ParseError):
        return "No report of the tests.\n"
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        f"- {case.get('classname')}.{case.get('name')}: {(problem.get('message') or '').splitlines()[0][:160]}"
        for suite in suites
        for case in suite.iter("testcase")
        for problem in (*case.iter("failure"), *case.iter("error"))
    ]
    skipped = sorted({(s.get("message") or "")[:160] for suite in suites for s in suite.iter("skipped")})
    words = ", ".join(f"{count} {key}" for key, count in counts.items())
    return f"{words}.\n" + "".join(f"{line}\n" for line in bad[:40]) + "".join(f"- skipped: {s}\n" for s in skipped)


def summary(out: Path) -> str:
    """The Markdown page of a run."""
    ops, steps, stages = (_read(out / f"{name}.json") for name in ("ops", "overhead", "stages"))
    parts = ["# lwkd on a GPU\n"]
    if origin := ops or steps:
        machine, versions = origin["machine"], origin["versions"]
        parts.append(
            f"{machine['accelerator']['name']} (driver {machine['accelerator'].get('driver', '-')}), "
            f"{machine['processor']}, {machine['cores']} cores; python {versions['python']}, "
            f"torch {versions['torch']}, triton {versions['triton']}; commit {origin['commit']}\n"
        )
    parts += ["## Ops\n", "Not measured.\n" if ops is None else _ops(ops)]
    parts += ["## Training steps\n", "Not measured.\n" if steps is None else _steps(steps)]
    parts += ["## Tests\n", _tests(out / "tests.xml")]
    if stages is not None:
        rows = [
            [of["name"], of["result"], f"{of['seconds']:.0f}", of["last"].replace("|", "/")] for of in stages["stages"]
        ]
        parts += ["## Stages\n", table(["stage", "result", "seconds", "its last words"], rows)]
    return "\n".join(parts)
