"""What a comparison found: Markdown to read, CSV to compute with, a picture of the differences."""

from __future__ import annotations

import io
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwkd.program.checkpoint import write_aside
from lwkd.program.compare.grid import Figures
from lwkd.program.compare.recipe import UNIFORM, Recipe
from lwkd.program.compare.statistics import Difference, holm, paired
from lwkd.program.distill.plot import STYLE
from lwkd.program.distill.report import write_csv
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import require
from lwkd.program.provenance import origin

RUNS = ("method", "arm", "seed", "lr", "split", "score", "seconds", "finite", "key")
TESTED = ("standard_error", "low", "high", "p", "p_holm", "wins")
SUMMARY = (
    *("method", "arm", "lr", "seeds", "mean", "sd", "minus_uniform", *TESTED),
    *("seconds_ratio", "mean_multiplier", "command"),
)
CONTROLS = ("method", "arm", "control", "minus_control", *TESTED, "seeds")


@dataclass(frozen=True)
class Row:
    """One difference of the family that is tested: an arm minus uniform, or a layer-wise arm minus its control."""

    figures: Figures
    arm: str
    against: str
    difference: Difference
    p_holm: float


def rows(recipe: Recipe, found: Sequence[Figures]) -> list[Row]:
    """All differences, with p-values adjusted over all of them together."""
    pairs = [(figures, arm, UNIFORM) for figures in found for arm in recipe.arms if arm != UNIFORM]
    pairs += [(figures, arm.of, arm.name) for figures in found for arm in recipe.arms.values() if arm.of is not None]
    differences = [paired(figures.scores(arm), figures.scores(against)) for figures, arm, against in pairs]
    adjusted = holm([difference.p for difference in differences])
    return [Row(*pair, difference, p) for pair, difference, p in zip(pairs, differences, adjusted, strict=True)]


def write(
    folder: Path, recipe: Recipe, again: Again, found: Sequence[Figures], teachers: Sequence[Mapping[str, float]]
) -> list[Row]:
    """Write ``report.md``, ``runs.csv``, ``summary.csv``, ``controls.csv``, and ``differences.png`` if there are any.

    Returns:
        The differences.
    """
    tested = rows(recipe, found)
    write_csv(folder / "runs.csv", RUNS, [run for figures in found for run in _runs(figures)])
    write_csv(folder / "summary.csv", SUMMARY, [_summary(row, again) for row in tested if row.against == UNIFORM])
    write_csv(
        folder / "controls.csv",
        CONTROLS,
        [[r.figures.method, r.arm, r.against, *_tested(r), r.difference.n] for r in tested if r.against != UNIFORM],
    )
    text = "\n".join(_markdown(recipe, again, found, tested, teachers))
    write_aside(folder / "report.md", lambda file: file.write(text.encode()))
    if tested:
        picture = _picture(tested)
        write_aside(folder / "differences.png", lambda file: file.write(picture))
    return tested


def _runs(figures: Figures) -> Iterable[Sequence[Any]]:
    for arm, trials in figures.trials.items():
        for trial, result in zip(trials, figures.results[arm], strict=True):
            values = [result[name] for name in ("score", "seconds", "finite")]
            yield [figures.method, arm, trial.seed, trial.lr, "test", *values, trial.key]


def _tested(row: Row) -> list[Any]:
    """The difference, and the columns :data:`TESTED` of it."""
    d = row.difference
    return [d.mean, d.error, d.low, d.high, d.p, row.p_holm, d.wins]


def _seconds_ratio(figures: Figures, arm: str) -> float:
    """Median over seeds of the arm's training time by uniform's."""
    times = zip(figures.results[arm], figures.results[UNIFORM], strict=True)
    return statistics.median(mine["seconds"] / theirs["seconds"] for mine, theirs in times)


def _mean_multiplier(figures: Figures, arm: str) -> float:
    """Over segments, updates and seeds; NaN where it was not recorded."""
    means = [float(result["rates"].mean()) for result in figures.results[arm] if "rates" in result]
    return statistics.fmean(means) if means else math.nan


Again = Callable[[str, str], str]
"""The command line that repeats the row of a method and an arm."""


def command(settings: Settings, source: Path, out: Path, method: str, arm: str) -> str:
    """See :data:`Again`; the options of the command line that the settings hold are in it."""
    words = ["lwkd", "compare", str(source), "--out", str(out)]
    for option, value, default in (
        ("--data-dir", settings.data_dir, Settings.data_dir),
        ("--device", settings.device, Settings.device),
    ):
        words += [option, value] if value != default else []
    return shlex.join([*words, "--method", method, "--arm", arm])


def _summary(row: Row, again: Again) -> list[Any]:
    figures, arm = row.figures, row.arm
    scores = figures.scores(arm)
    mean_sd = [statistics.fmean(scores), statistics.stdev(scores)]
    of = [_seconds_ratio(figures, arm), _mean_multiplier(figures, arm), again(figures.method, arm)]
    return [figures.method, arm, figures.chosen[arm].lr, len(scores), *mean_sd, *_tested(row), *of]


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> Iterable[str]:
    for cells in (heads, ["---"] * len(heads), *body):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def mean_sd(scores: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"


def tested_cells(row: Row) -> tuple[str, str, str, str]:
    """Difference with its standard error, interval, p-value, and in how many seeds the first was better."""
    d = row.difference
    p = "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"
    return f"{d.mean:+.2f} ± {d.error:.2f}", f"{d.low:+.2f} to {d.high:+.2f}", p, f"{d.wins} of {d.n}"


def _markdown(
    recipe: Recipe,
    again: Again,
    found: Sequence[Figures],
    tested: Sequence[Row],
    teachers: Sequence[Mapping[str, float]],
) -> Iterable[str]:
    settings, counts = recipe.settings, {len(figures.results[UNIFORM]) for figures in found}
    seeds = " or ".join(str(count) for count in sorted(counts))
    what, score = "documents" if settings.text else "pictures", "mAP" if settings.multilabel else "Accuracy"
    shown = ", ".join(f"{100 * scores['test']:.2f}" for scores in teachers)
    yield f"# {recipe.title}\n"
    yield (
        f"{settings.data}, {settings.teacher} → {settings.student}; {settings.student_limit or 'all'} {what}"
        f"{'' if recipe.labels else ' without labels'}, {settings.epochs} epochs, {settings.optimizer}, "
        f"{settings.schedule}. Teachers: {shown}.\n"
    )
    yield (
        f"{score} in points after the last epoch on the test {what}, {seeds} fresh seeds, paired. Base rates were "
        f"tuned for every arm alike on {recipe.development} other seeds and {recipe.validation:,} validation {what}. "
        "± behind a mean is the standard deviation over seeds, behind a difference the standard error of the paired "
        f"difference; intervals are 95 %; p is Holm's, over the {len(tested)} differences of this page; time is that "
        "of training by uniform's, measuring included (on a CPU: its own time, whatever else ran).\n"
    )
    for figures in found:
        mine = [row for row in tested if row.figures is figures]
        yield f"## {figures.method}\n"
        yield from _arms(figures, [row for row in mine if row.against == UNIFORM])
        yield from _controls([row for row in mine if row.against != UNIFORM])
        yield from _tuning(recipe, figures)
    of: dict[str, Any] = origin()
    versions = ", ".join(f"{name} {of['versions'][name]}" for name in ("python", "torch", "lwkd"))
    last = found[-1]
    yield f"A row alone, such as the last one: `{again(last.method, [*last.trials][-1])}`.\n"
    commits = ", ".join(sorted({commit for figures in found for commit in figures.commits}))
    yield f"{of['machine']['processor']}, {versions}; trained at commit {commits}."


def _arms(figures: Figures, tested: Sequence[Row]) -> Iterable[str]:
    heads = ("arm", "base rate", "mean", "minus uniform", "95 %", "p", "better", "time", "mean multiplier")
    body = [(UNIFORM, _lr(figures, UNIFORM), mean_sd(figures.scores(UNIFORM)), "", "", "", "", "1.00", "1.00")]
    for row in tested:
        multiplier = _mean_multiplier(figures, row.arm)
        cost = f"{_seconds_ratio(figures, row.arm):.2f}", "" if math.isnan(multiplier) else f"{multiplier:.2f}"
        mean = mean_sd(figures.scores(row.arm))
        body.append((row.arm, _lr(figures, row.arm), mean, *tested_cells(row), *cost))
    return _table(heads, body)


def _controls(tested: Sequence[Row]) -> Iterable[str]:
    if tested:
        yield "Layer-wise minus its controls:\n"
        body = [(row.arm, row.against.removeprefix(f"{row.arm}: "), *tested_cells(row)) for row in tested]
        yield from _table(("arm", "minus", "difference", "95 %", "p", "better"), body)


def _tuning(recipe: Recipe, figures: Figures) -> Iterable[str]:
    wanted = ", ".join(f"{arm} {n}" for arm, n in figures.wanted.items())
    if wanted:
        yield (
            f"Seeds that a difference of {recipe.difference:g} points asks for, (2.8·sd/Δ)² with the spread over the "
            f"development seeds: {wanted}; {recipe.seeds[0]} to {recipe.seeds[1]} were allowed.\n"
        )
    yield "The mean over the development seeds, by base rate:\n"
    tried = [
        (arm, ", ".join(f"{lr:g}: {100 * score:.2f}" for lr, score in of.tried.items()))
        for arm, of in figures.chosen.items()
    ]
    yield from _table(("arm", "tried"), tried)


def _lr(figures: Figures, arm: str) -> str:
    chosen = figures.chosen[arm]
    return f"{chosen.lr:g}" + ("" if chosen.inside else " (at the end of what was tried)")


def _picture(tested: Sequence[Row]) -> bytes:
    """Differences to uniform with their intervals, a panel a method."""
    shown = [row for row in tested if row.against == UNIFORM]
    methods = list(dict.fromkeys(row.figures.method for row in shown))
    most = max(sum(row.figures.method == method for row in shown) for method in methods)
    with require("matplotlib").rc_context(STYLE):
        figure = require("matplotlib.figure").Figure(
            figsize=(4.5 + 3.5 * len(methods), 1.4 + 0.34 * most), layout="constrained"
        )
        panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
        for panel, method in zip(panels, methods, strict=True):
            mine = [row for row in shown if row.figures.method == method][::-1]
            panel.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
            for y, row in enumerate(mine):
                d = row.difference
                colour = "#31688e" if row.p_holm <= 0.05 else "0.55"
                panel.plot([d.low, d.high], [y, y], color=colour, linewidth=2)
                panel.plot([d.mean], [y], "o", color=colour, markersize=6)
            panel.set_yticks(range(len(mine)), [row.arm for row in mine], parse_math=False)
            panel.set_title(method, loc="left")
        figure.supxlabel("points above uniform rates, 95 % interval (grey: not significant after Holm)", fontsize=10)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
