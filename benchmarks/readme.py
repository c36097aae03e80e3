"""The README's figures: one picture and one table of what layer-wise rates add to a distillation step.

    python benchmarks/readme.py

reads every ``results/profile-*.json`` that ``lwkd profile`` has left, on a CPU or on a GPU, draws
``results/overhead.png`` and puts the table between the two marks in ``README.md``. A test compares what stands there
with what this file would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lwkd.program.profile import TARGETS as OF_SIGNALS
from lwkd.program.provenance import spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- written by benchmarks/readme.py: begin -->", "<!-- end -->"
BASELINE = "hinton"
TARGETS = {"nothing due": 0.003, **OF_SIGNALS}
"""Share of a distillation step that each may add."""

COLOURS = {"nothing due": "0.55", "attention": "#440154", "jacobian": "#31688e", "hessian": "#35b779"}


@dataclass(frozen=True)
class Profile:
    """One run of ``lwkd profile``."""

    path: Path
    found: dict[str, Any]

    @property
    def machine(self) -> str:
        """What the steps ran on."""
        device = self.found["device"]
        if device["type"] != "cpu":
            return device["name"]
        return f"{self.found['machine']['processor']}, {self.found['threads']} threads"

    @property
    def title(self) -> str:
        """The pair and its batch."""
        batch, *shape = self.found["input"]
        return f"{self.found['teacher']}→{self.found['student']}, {shape[-1]}², B {batch}"

    @property
    def steps(self) -> dict[str, Any]:
        """By implementation, what was measured beside Hinton's distillation."""
        return self.found["baselines"][BASELINE]


def profiles(folder: Path) -> list[Profile]:
    """Those in the folder: the CPU's first, short steps before long ones."""
    read = [Profile(path, json.loads(path.read_text())) for path in sorted(folder.glob("profile-*.json"))]
    return sorted(
        read, key=lambda p: (p.found["device"]["type"] != "cpu", p.steps["bare"]["step_milliseconds"]["median"])
    )


def percent(share: dict[str, float]) -> str:
    """Median and quartiles in percent."""
    return spread(share, 100, 1 if abs(share["median"]) >= 0.01 else 2, "%")


def rows(profile: Profile) -> Iterator[list[str]]:
    """A row for each signal of a pair, and one for the noise."""
    bare = profile.steps["bare"]["step_milliseconds"]
    noise = profile.steps["bare again"]["overhead"]["in_turns"]
    first = f"{profile.title}: {bare['median']:.0f} ms a step"
    for name, target in TARGETS.items():
        if name not in profile.steps:
            continue
        of = profile.steps[name]
        every = of.get("every")
        how = name if every is None else f"{name}, every update" if every == 1 else f"{name}, every {every} updates"
        yield [
            first,
            how,
            percent(of["overhead"]["direct"]),
            f"{100 * target:.1f} %",
            percent(of["overhead"]["in_turns"]),
        ]
        first = ""
    yield [first, "the bare optimizer again", "", "", percent(noise)]


def table(found: list[Profile]) -> str:
    """The README's table, with where it comes from."""
    head = ["teacher→student", "layer-wise rates", "adds", "target", "whole steps in turns"]
    lines = []
    for machine in dict.fromkeys(profile.machine for profile in found):
        here = [profile for profile in found if profile.machine == machine]
        lines += [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for profile in here for row in rows(profile)]
        versions = here[0].found["versions"]
        commits = ", ".join(dict.fromkeys(profile.found["commit"][:12] for profile in here))
        lines += ["", f"{machine}; python {versions['python']}, torch {versions['torch']}; commit {commits}.", ""]
        lines += [f"- `{profile.found['command']}`" for profile in here] + [""]
    if all(profile.found["device"]["type"] == "cpu" for profile in found):
        lines += ["On a GPU: [first figures of an NVIDIA H200](benchmarks/results/nvidia-h200/summary.md).", ""]
    return "\n".join(lines)


def text(found: list[Profile]) -> str:
    """All that stands between the marks."""
    picture = "![what layer-wise rates add to a distillation step](benchmarks/results/overhead.png)"
    return f"{BEGIN}\n{picture}\n\n{table(found)}{END}"


def replaced(readme: str, found: list[Profile]) -> str:
    """The README with what stands between the marks written anew.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN!r} and {END!r}; put them where the table belongs")
    return before + text(found) + after


def draw(found: list[Profile], path: Path) -> None:
    """A dot for what each signal adds, with its quartiles, and a line for what it may add."""
    wanted = [(profile, name) for profile in found for name in TARGETS if name in profile.steps]
    figure = Figure(figsize=(8.5, 1.2 + 0.32 * len(wanted)), layout="constrained")
    axes = figure.subplots()
    for row, (profile, name) in enumerate(wanted):
        share = profile.steps[name]["overhead"]["direct"]
        low, median, high = (100 * max(share[key], 1e-6) for key in ("low", "median", "high"))
        axes.plot([low, high], [row, row], color=COLOURS[name], linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(median, row, "o", color=COLOURS[name], markersize=7)
        axes.plot(100 * TARGETS[name], row, "|", color="0.2", markersize=16, markeredgewidth=2)
        axes.annotate(f"{median:.2g} %", (median, row), (8, 5), textcoords="offset points", fontsize=8, color="0.25")
    labels = [f"{profile.title}   {name}" for profile, name in wanted]
    axes.set_yticks(range(len(wanted)), labels, fontsize=8)
    axes.set_ylim(len(wanted) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("added to a distillation step, % (dot: median, bar: quartiles, line: target)", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    found = profiles(RESULTS)
    if not found:
        raise SystemExit(f"no profile-*.json in {RESULTS}; `lwkd profile` writes them")
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), found))
    draw(found, RESULTS / "overhead.png")


if __name__ == "__main__":
    main()
