"""The picture of ``growth.py``: a panel for what grows with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lwkd.program.distill.plot import STYLE

LABELS = {
    "layers": "layers",
    "batch": "batch",
    "channels": "channels",
    "side": "map side",
    "elements": "elements a tensor",
    "depth": "depth",
    "width": "width",
}
LOOKS: dict[str, dict[str, Any]] = {
    "lwkd": {"color": "#440154", "linewidth": 2.2, "zorder": 4},
    "eager": {"color": "#35b779", "linewidth": 1.6, "zorder": 3},
    "read": {"color": "0.35", "linewidth": 1.2, "linestyle": (0, (5, 2)), "zorder": 2},
    "noop": {"color": "0.6", "linewidth": 1.2, "linestyle": (0, (1, 1.5)), "zorder": 2},
}
MEANINGS = {
    "lwkd": "lwkd",
    "eager": "plain PyTorch",
    "read": "read the same bytes once",
    "noop": "a call that does nothing",
}
SIGNAL_COLOURS = {"jacobian": "#31688e", "hessian": "#35b779"}


def title(panel: dict[str, Any]) -> str:
    """The op, and against what.

    >>> title({"op": "attention_maps", "axis": "side"})
    'maps with tangents against map side'
    """
    names = {"attention_maps": "maps with tangents", "hutchinson_trace": "traces"}
    name = names.get(panel["op"], panel["op"].replace("_", " "))
    return f"{name} against {LABELS[panel['axis']]}"


def fixed(of: dict[str, Any]) -> str:
    """What does not change in a panel."""
    return ", ".join(f"{name} {value}" for name, value in of.get("fixed", {}).items())


def draw(found: dict[str, Any], path: Path) -> None:
    """A grid of panels: an op a row and a size a column, then traces and memory."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 14.5), layout="constrained")
        axes = figure.subplots(4, 4).flat
        for panel in found["panels"]:
            _times(next(axes), panel, found["last_level_cache"])
        for panel in found["memory of the op"]:
            _op_memory(next(axes), panel)
        for panel in found["memory of a measurement"]:
            _measurement_memory(next(axes), panel)
        legend, rest = axes
        for off in (legend, rest):
            off.set_axis_off()
        for name, look in LOOKS.items():
            legend.plot([], [], label=MEANINGS[name], **look)
        legend.plot([], [], color="0.2", linestyle="", marker="o", fillstyle="none", label="channels last")
        handles, labels = legend.get_legend_handles_labels()
        handles.append(Patch(color="#fde725", alpha=0.15))
        labels.append("more bytes than the last-level cache holds")
        legend.legend(handles, labels, loc="upper left", fontsize=11, title="bands: quartiles", alignment="left")
        figure.savefig(path, dpi=110)


def _logarithmic(axes: Any, panel: dict[str, Any], label: str, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = sizes if len(sizes) < 6 else sizes[:: (len(sizes) + 4) // 5]
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.minorticks_off()
    axes.set_xlabel(
        f"{LABELS[panel['axis']]}   ({fixed(panel)})" if fixed(panel) else LABELS[panel["axis"]], fontsize=8.5
    )
    axes.set_title(label, loc="left", fontsize=9.5)


def _times(axes: Any, panel: dict[str, Any], cache: int | None) -> None:
    for memory, points in panel["series"].items():
        sizes = [point["size"] for point in points]
        for name, look in LOOKS.items():
            plain = memory == "contiguous"
            if not plain and name not in ("lwkd", "eager"):
                continue
            low, median, high = (
                [1e3 * point["milliseconds"][name][which] for point in points] for which in ("low", "median", "high")
            )
            marks = {} if plain else {"marker": "o", "fillstyle": "none", "markersize": 5, "linewidth": 0.8}
            axes.plot(sizes, median, **(look | marks))
            if plain:
                axes.fill_between(sizes, low, high, color=look["color"], alpha=0.2, linewidth=0)
    first = panel["series"]["contiguous"]
    larger = [point["size"] for point in first if cache and point["bytes"] > cache]
    if larger:
        before = [point["size"] for point in first if point["size"] < larger[0]]
        axes.axvspan((larger[0] * before[-1]) ** 0.5 if before else larger[0], larger[-1], color="#fde725", alpha=0.15)
    axes.set_yscale("log")
    axes.set_ylabel("µs a call")
    _logarithmic(axes, panel, title(panel), [point["size"] for point in first])


def _op_memory(axes: Any, panel: dict[str, Any]) -> None:
    for name, points in panel["series"].items():
        who, _, what = name.partition(", ")
        look = {"color": "0.35", "linestyle": (0, (5, 2))} if who == "inputs" else {"color": LOOKS[who]["color"]}
        dotted = {"linestyle": (0, (1, 1.2))} if what == "forward" else {}
        sizes, most = zip(*points, strict=True)
        axes.plot(sizes, [max(each, 1) / 2**10 for each in most], label=name, **(look | dotted))
    axes.set_yscale("log")
    axes.set_ylabel("KiB beyond the inputs, at most")
    axes.legend(fontsize=7.5)
    _logarithmic(axes, panel, f"memory of the divergence against {LABELS[panel['axis']]}", list(sizes))


def _measurement_memory(axes: Any, panel: dict[str, Any]) -> None:
    for name, points in panel["series"].items():
        if name != "step bytes":
            sizes, shares = zip(*points, strict=True)
            colour = SIGNAL_COLOURS[name.partition(",")[0]]
            axes.plot(sizes, shares, color=colour, label=name, linewidth=2, marker="o", markersize=4)
    axes.axhline(1, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("peak, in those of a training step")
    axes.legend(fontsize=8)
    _logarithmic(axes, panel, f"memory of a measurement against {LABELS[panel['axis']]}", list(sizes))
