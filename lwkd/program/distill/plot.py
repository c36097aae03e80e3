"""``layers.png``: what each layer's divergence and rate did over a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwkd.program.checkpoint import write_aside
from lwkd.program.distill.history import History
from lwkd.program.distill.report import TITLES
from lwkd.program.errors import require

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "0.4",
    "ytick.color": "0.4",
    "xtick.labelcolor": "0.15",
    "ytick.labelcolor": "0.15",
    "legend.frameon": False,
}


def write_picture(folder: Path, histories: Mapping[str, History], unit: str) -> Path | None:
    """Draw ``layers.png``: divergence above, rate below, a column a student, a line a layer.

    Layers are coloured from input (dark) to output (light); a band shows one standard error either way, where it is
    known.

    Args:
        folder: of the run.
        histories: of the stages.
        unit: what the divergence is, see :func:`lwkd.program.distill.signals.unit_of`.

    Returns:
        The file, or None where no student has measured anything yet.
    """
    shown = {stage: history for stage, history in histories.items() if history.steps}
    if not shown:
        return None
    with require("matplotlib").rc_context(STYLE):
        figure = require("matplotlib.figure").Figure(figsize=(2.5 + 4.5 * len(shown), 6.4), layout="constrained")
        axes = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey="row")
        for column, (stage, history) in enumerate(shown.items()):
            axes[0][column].set_title(TITLES[stage], loc="left")
            _draw(axes[0][column], axes[1][column], history)
        axes[0][0].set_ylabel(unit)
        axes[1][0].set_ylabel("multiplier of the learning rate")
        axes[0][0].set_ylim(bottom=max(0.0, axes[0][0].get_ylim()[0]))  # no divergence is negative; its band can be
        figure.align_ylabels()
        lines, layers = axes[0][0].get_legend_handles_labels()
        figure.legend(lines, layers, title="student layer", loc="outside right upper", ncols=1 + len(layers) // 25)
        known = any(error is not None for h in shown.values() for row in h.standard_errors for error in row)
        bands = " (bands: ± one standard error of the divergence)" if known else ""
        figure.supxlabel(f"epoch{bands}", fontsize=10)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    write_aside(folder / "layers.png", lambda file: file.write(image.getvalue()))
    return folder / "layers.png"


def _draw(above: Any, below: Any, history: History) -> None:
    """One student: divergences with their bands above, rates below."""
    epochs = [step / history.steps_per_epoch for step in history.steps]
    below.axhline(1, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    for number, layer in enumerate(history.layers):
        colour, width = _colour(number, len(history.layers)), _width(number, len(history.layers))
        divergences, rates = ([row[number] for row in series] for series in (history.divergences, history.rates))
        errors = [math.nan if error is None else error for error in (row[number] for row in history.standard_errors)]
        above.plot(epochs, divergences, label=layer, color=colour, linewidth=width)
        # NaN leaves a gap.
        low = [divergence - error for divergence, error in zip(divergences, errors, strict=True)]
        high = [divergence + error for divergence, error in zip(divergences, errors, strict=True)]
        above.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        below.plot(epochs, rates, color=colour, linewidth=width)
    below.xaxis.get_major_locator().set_params(integer=True)


def _colour(number: int, count: int) -> Any:
    """Viridis without its yellow end, which white paper swallows; told apart by colour-blind eyes and in grey."""
    return require("matplotlib").colormaps["viridis"](0.8 * number / max(count - 1, 1))


def _width(number: int, count: int) -> float:
    """Later lines are drawn over the earlier ones, and are thinner: rates that are equal can all be seen."""
    return 2.6 - 1.0 * number / max(count - 1, 1)
