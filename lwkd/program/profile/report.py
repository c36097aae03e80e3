"""What a profile shows at the end: tables, ``profile.json`` with all figures, and ``profile.png``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from lwkd.program.checkpoint import write_aside
from lwkd.program.console import table
from lwkd.program.distill.plot import STYLE
from lwkd.program.errors import require
from lwkd.program.profile.timed_step import PHASES
from lwkd.program.provenance import spread

COLOURS = {
    "teacher forward": "#b8c4d6",
    "student forward": "#8fa3bf",
    "loss": "#d9d2c3",
    "backward": "#6d84a3",
    "optimizer": "#c3ccb8",
    "measuring": "#c4473a",
}


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write ``profile.json``."""
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_aside(folder / "profile.json", lambda file: file.write(text.encode()))


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """For each baseline what is added and where the time goes; what is added at other intervals; what to set."""
    for baseline, steps in found["baselines"].items():
        yield _added(found, baseline, steps)
        yield _phases(found, steps)
    yield _intervals(found)
    yield _recommended(found)


def _title(name: str, of: dict[str, Any]) -> str:
    """A timed step, with its interval if it has one."""
    return f"{name}, every {of['every']}" if "every" in of else name


def _added(found: dict[str, Any], baseline: str, steps: dict[str, Any]) -> Table:
    rows = []
    for name, of in steps.items():
        overhead = of.get("overhead")
        # A second bare optimizer adds nothing by definition; its steps show the machine's noise.
        direct = None if overhead is None or name == "bare again" else overhead["direct"]
        rows.append(
            (
                _title(name, of),
                spread(of["step_milliseconds"]),
                "" if direct is None else spread(direct, 100, 2),
                _verdict(of, direct),
                "" if overhead is None else spread(overhead["in_turns"], 100),
            )
        )
    return table(
        f"{found['teacher']} → {found['student']}, batch {found['batch']}: {baseline} distillation, "
        f"{found['rounds']} rounds",
        ("step with", "milliseconds", "adds, %", "target", "steps in turns, %"),
        rows,
    )


def _verdict(of: dict[str, Any], direct: dict[str, float] | None) -> str:
    if "target" not in of or direct is None:
        return ""
    target = f"{100 * of['target']:g} %"
    return f"[green]≤ {target}[/green]" if direct["median"] <= of["target"] else f"[red]> {target}[/red]"


def _phases(found: dict[str, Any], steps: dict[str, Any]) -> Table:
    gpu = found["device"]["type"] != "cpu"
    heads = ["milliseconds of", *(phase.replace(" ", "\n") for phase in PHASES), "peak,\nMiB"]
    rows = [
        (
            _title(name, of),
            *(f"{of['phases_milliseconds'][phase]['median']:.2f}" for phase in PHASES),
            f"{of['peak_bytes'] / 2**20:.1f}",
            f"{of['calls']:,}",
            *([f"{of['host_milliseconds']:.2f}"] if gpu else []),
        )
        for name, of in steps.items()
    ]
    return table("where the time goes", [*heads, *(["launches", "host"] if gpu else ["ATen\ncalls"])], rows)


def _intervals(found: dict[str, Any]) -> Table:
    steps, columns = next(iter(found["baselines"].values())), {}
    for name, of in found["signals"].items():
        columns[f"{name}, {of['rows']} rows"] = of["overhead_by_interval"]
        if (early := of.get("overhead_until_the_teacher_is_known")) is not None:
            columns[f"{name}, until the teacher's\ncurvature is known"] = {str(steps[name]["every"]): early}
    rows = [
        (every, *(f"{100 * column[every]:.2f}" if every in column else "" for column in columns.values()))
        for every in sorted({every for column in columns.values() for every in column}, key=int)
    ]
    return table("added on average, %, by updates from one measurement to the next", ["every", *columns], rows)


def _recommended(found: dict[str, Any]) -> Table:
    """For each signal what keeps to its budget; no interval does where updates without a measurement add more."""
    rows = []
    for name, of in found["signals"].items():
        best = of["recommendation"]
        if "every" in best:
            whole = " (all)" if best["samples"] == found["batch"] else ""
            cells = (str(best["every"]), f"{best['samples']}{whole}", f"{100 * best['overhead']:.2f}")
        else:
            cells = ("none: at rest\nit adds more", "", "")
        rows.append((name, f"{100 * best['budget']:g}", *cells))
    return table("what to set", ("signal", "budget, %", "every", "samples", "adds, %"), rows)


def write_picture(folder: Path, found: dict[str, Any]) -> Path:
    """Draw ``profile.png``: a bar a timed step, stacked by phase; beside it what layer-wise rates add.

    Args:
        folder: where it goes.
        found: what ``profile.json`` holds.

    Returns:
        The file.
    """
    bars = [(baseline, name, of) for baseline, steps in found["baselines"].items() for name, of in steps.items()]
    with require("matplotlib").rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = require("matplotlib.figure").Figure(figsize=(10, 1.8 + 0.42 * len(bars)), layout="constrained")
        axes = figure.subplots()
        longest = max(_ends(of)[-1] for _, _, of in bars)
        for row, (_, name, of) in enumerate(bars):
            ends = _ends(of)
            for phase, begin, end in zip(PHASES, [0.0, *ends[:-1]], ends, strict=True):
                label = phase if row == 0 else None
                axes.barh(row, end - begin, 0.62, left=begin, color=COLOURS[phase], label=label, linewidth=0)
            if "overhead" in of and name != "bare again":
                said = f"+ {100 * of['overhead']['direct']['median']:.2g} %"
                axes.text(ends[-1] + 0.01 * longest, row, said, va="center", fontsize=9, color=COLOURS["measuring"])
        first = bars[0][0]
        labels = [_title(name, of) + ("" if baseline == first else f" ({baseline})") for baseline, name, of in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.16 * longest)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("milliseconds of a step (medians of the phases)")
        figure.legend(loc="outside upper center", ncols=len(PHASES))
        machine = found["device"]["name"] if found["device"]["type"] != "cpu" else found["machine"]["processor"]
        nets, torch = f"{found['teacher']} → {found['student']}", found["versions"]["torch"]
        axes.set_title(f"{nets}, batch {found['batch']}, {machine}, torch {torch}", loc="left")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    write_aside(folder / "profile.png", lambda file: file.write(image.getvalue()))
    return folder / "profile.png"


def _ends(of: dict[str, Any]) -> list[float]:
    """Where each phase ends, in milliseconds; a phase that noise has made negative is empty."""
    ends, total = [], 0.0
    for phase in PHASES:
        total += max(0.0, of["phases_milliseconds"][phase]["median"])
        ends.append(total)
    return ends
