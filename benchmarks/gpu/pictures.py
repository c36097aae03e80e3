"""The two pictures: bandwidth by op and size, and what the signals cost beside a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {"lwkd": "#1b6ca8", "torch.compile": "#e0a030", "eager": "#9a9a9a"}
SIGNAL_COLOURS = {"attention": "#1b6ca8", "jacobian": "#c4473a", "hessian": "#4d9a4d", "bare again": "#bbbbbb"}


def caption(result: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    versions = result["versions"]
    return (
        f"{result['machine']['accelerator']['name']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {result['commit'][:24]}"
    )


def gigabytes_a_second(case: dict[str, Any], name: str, quartile: str = "median") -> float | None:
    """Bytes that had to be moved over the device's time; None where the implementation did not run."""
    found = case.get("implementations", {}).get(name, {}).get("on_device_microseconds")
    return None if found is None else case["bytes"] / found[quartile] / 1e3


def bandwidth(result: dict[str, Any], path: Path) -> None:
    """A row of bars for every case that moves enough bytes to speak of, and the copy bandwidth as a line."""
    measured = {name: case for name, case in result["cases"].items() if "error" not in case}
    shown = {name: case for name, case in measured.items() if case["op"] not in ("launch", "rate update")}
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.42 * max(1, len(shown))), layout="constrained")
    height = 0.27
    for row, case in enumerate(shown.values()):
        for offset, (name, colour) in enumerate(COLOURS.items()):
            median = gigabytes_a_second(case, name)
            if median is None:
                continue
            low, high = (gigabytes_a_second(case, name, quartile) or 0.0 for quartile in ("high", "low"))
            error = [[max(0.0, median - low)], [max(0.0, high - median)]]
            label = name if row == 0 else None
            place = row + (offset - 1) * height
            axes.barh(place, median, height, xerr=error, color=colour, label=label, error_kw={"lw": 0.8})
    copied = result["copy_gigabytes_a_second"]["median"]
    axes.axvline(copied, color="black", lw=1, label="copy, read + write")
    axes.axvline(0.85 * copied, color="black", lw=1, ls=":", label="85 % of it")
    axes.set_yticks(range(len(shown)), list(shown), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("gigabytes a second on the device, bytes read and written once (median, quartiles)")
    axes.set_title(caption(result), fontsize=8)
    if shown:
        axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def overhead(result: dict[str, Any], path: Path) -> None:
    """A group of bars for every pair; whiskers are quartiles over rounds, lines the targets."""
    shown = {title: found for title, found in result["pairs"].items() if "error" not in found}
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.2
    for place, found in enumerate(shown.values()):
        for offset, (signal, colour) in enumerate(SIGNAL_COLOURS.items()):
            of = found["overhead"].get(signal)
            if of is None:  # it failed
                continue
            median = 100 * of["median"]
            error = [[max(0.0, median - 100 * of["low"])], [max(0.0, 100 * of["high"] - median)]]
            label = signal if place == 0 else None
            axes.bar(place + (offset - 1.5) * width, median, width, yerr=error, color=colour, label=label, capsize=2)
    for target in sorted(set(result["targets"].values())):
        axes.axhline(100 * target, color="black", lw=0.8, ls=":")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(shown)), [title.replace(", ", "\n", 1) for title in shown], fontsize=7)
    axes.set_ylabel("added to a training step, % (median, quartiles)")
    axes.set_title(caption(result), fontsize=8)
    if shown:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
