"""What is said at the end: tables, one line a signal, and the file that holds all figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from lwkd.program.checkpoint import write_aside
from lwkd.program.profile.timed_step import PHASES


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write ``profile.json``."""
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_aside(folder / "profile.json", lambda file: file.write(text.encode()))


def spread(values: dict[str, float], scale: float = 1.0, digits: int = 1) -> str:
    """Median and quartiles.

    >>> spread({"median": 0.0123, "low": 0.012, "high": 0.013}, 100, 2)
    '1.23 (1.20 to 1.30)'
    """
    low, median, high = (f"{scale * values[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """What is added and where the time goes, for each baseline; and what is added at other intervals."""
    for baseline, contenders in found["baselines"].items():
        yield _added(found, baseline, contenders)
        yield _phases(found, contenders)
    yield _intervals(found)


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    return table


def contender_title(name: str, of: dict[str, Any]) -> str:
    """A contender, with its interval if it has one."""
    return f"{name}, every {of['every']}" if "every" in of else name


def _added(found: dict[str, Any], baseline: str, contenders: dict[str, Any]) -> Table:
    nets = f"{found['teacher']} → {found['student']}, batch {found['batch']}"
    table = _table(
        f"{nets}: {baseline} distillation, {found['rounds']} rounds",
        ["step with", "milliseconds", "adds, %", "target", "steps in turns, %"],
    )
    for name, of in contenders.items():
        overhead = of.get("overhead")
        # A second bare optimizer adds nothing by definition; its steps show the machine's noise.
        direct = None if overhead is None or name == "bare again" else overhead["direct"]
        table.add_row(
            contender_title(name, of),
            spread(of["step_milliseconds"]),
            "" if direct is None else spread(direct, 100, 2),
            _verdict(of, direct),
            "" if overhead is None else spread(overhead["in_turns"], 100),
        )
    return table


def _phases(found: dict[str, Any], contenders: dict[str, Any]) -> Table:
    gpu = found["device"]["type"] != "cpu"
    heads = ["milliseconds of", *(phase.replace(" ", "\n") for phase in PHASES), "peak,\nMiB"]
    table = _table("where the time goes", [*heads, *(["launches", "host"] if gpu else ["ATen\ncalls"])])
    for name, of in contenders.items():
        cells = [f"{of['phases_milliseconds'][phase]['median']:.2f}" for phase in PHASES]
        cells += [f"{of['peak_bytes'] / 2**20:.1f}", f"{of['calls']:,}"]
        cells += [f"{of['host_milliseconds']:.2f}"] if gpu else []
        table.add_row(contender_title(name, of), *cells)
    return table


def _verdict(of: dict[str, Any], direct: dict[str, float] | None) -> str:
    if "target" not in of or direct is None:
        return ""
    kept = direct["median"] <= of["target"]
    return f"[green]≤ {100 * of['target']:g} %[/green]" if kept else f"[red]> {100 * of['target']:g} %[/red]"


def _intervals(found: dict[str, Any]) -> Table:
    signals = found["signals"]
    table = _table(
        "added on average, %, by updates from one measurement to the next",
        ["every", *(f"{name}, {of['rows']} rows" for name, of in signals.items())],
    )
    for every in sorted({every for of in signals.values() for every in of["overhead_by_interval"]}, key=int):
        shares = [of["overhead_by_interval"].get(every) for of in signals.values()]
        table.add_row(every, *("" if share is None else f"{100 * share:.2f}" for share in shares))
    return table


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What each signal adds, and what is recommended."""
    contenders = next(iter(found["baselines"].values()))
    for name, signal in found["signals"].items():
        of, best = contenders[name], signal["recommendation"]
        when = "at every update" if of["every"] == 1 else f"every {of['every']} updates"
        said = f"{name}: adds {spread(of['overhead']['direct'], 100, 2)} % to a step, measured {when} on "
        said += f"{of['samples']} rows"
        if "overhead_until_the_teacher_is_known" in signal:
            early = signal["overhead_until_the_teacher_is_known"]
            said += f" ({100 * early:.2f} % until the teacher's curvature is known)"
        share = f"{100 * best['budget']:g} %"
        if "every" not in best:
            yield f"{said}; no interval keeps it within {share}: even at rest it adds more"
            continue
        whole = " (all)" if best["samples"] == found["batch"] else ""
        yield (
            f"{said}; for {share}: every={best['every']}, samples={best['samples']}{whole}, which adds "
            f"{100 * best['overhead']:.2f} %"
        )
