"""``profile.png``: where the time of a step goes, contender by contender."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lwkd.program.checkpoint import write_aside
from lwkd.program.distill.plot import STYLE
from lwkd.program.errors import require
from lwkd.program.profile.report import contender_title
from lwkd.program.profile.timed_step import PHASES

COLOURS = {
    "teacher forward": "#b8c4d6",
    "student forward": "#8fa3bf",
    "loss": "#d9d2c3",
    "backward": "#6d84a3",
    "optimizer": "#c3ccb8",
    "measuring": "#c4473a",
}


def write_picture(folder: Path, found: dict[str, Any]) -> Path:
    """Draw ``profile.png``: a bar a contender, stacked by phase; beside it what layer-wise rates add.

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
        axes.set_yticks(range(len(bars)), [_title(found, *bar) for bar in bars])
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


def _title(found: dict[str, Any], baseline: str, name: str, of: dict[str, Any]) -> str:
    first = next(iter(found["baselines"]))
    return contender_title(name, of) + ("" if baseline == first else f" ({baseline})")
