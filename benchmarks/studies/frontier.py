r"""What sub-batches and intervals cost, and how much of the ranking of the layers they lose.

A student is distilled on Fashion-MNIST at 32×32, batch 128, with uniform rates, so that nothing that is measured
changes its path. After every update each signal is measured on the whole batch and on some of its rows. From these
series the rates of every interval and momentum follow without training again; they are compared, at every update,
with the rates from the whole batch at every update: Spearman's rank correlation over the layers, mean over updates.
Costs are timed apart, beside plain steps, after the run.

    python -m benchmarks.studies.frontier resnet56 resnet20 --updates 200

writes ``benchmarks/results/frontier-resnet56-resnet20.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor, nn

import lwkd
from benchmarks import report
from benchmarks.harness import timed
from benchmarks.training import classify, distil, fashion_mnist
from lwkd.program.models.registry import build
from lwkd.program.provenance import quartiles
from lwkd.program.turns import take_turns
from lwkd.signals import Hessian, Jacobian, rows_of
from lwkd.signals.teacher_curvature import TeacherCurvature

BATCH, ROUNDS = 128, 9
SIZES = (8, 16, 32, 64)
INTERVALS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60)
MOMENTA = (0.5, 0.7, 0.9)
FULL = 0.9  # the momentum of the rates that are aimed at
SIGNALS: dict[str, Any] = {"jacobian": Jacobian(), "hessian": Hessian()}
TARGET = 0.03


def distilled(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """One step of baseline distillation with SGD at uniform rates."""
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return partial(distil, student, teacher, optimizer)


def costs(
    student: nn.Module,
    teacher: nn.Module,
    pairing: lwkd.Pairing,
    x: Tensor,
    y: Tensor,
) -> dict[str, Any]:
    """Milliseconds of a plain step, and each measurement's share of it: quartiles over rounds, taking turns.

    The teacher's curvature is taken for known, as it is after the first measurements.
    """
    step = distilled(student, teacher)
    known = torch.ones(len(pairing))

    def measurement(signal: Any, rows: int) -> Callable[[], float]:
        options = {} if signal.memory(len(pairing)) is None else {"known": known}
        return timed(lambda: signal.measure(student, teacher, pairing, x[:rows], seed=1, **options))

    calls = {"step": timed(step, x, y)}
    for name, signal in SIGNALS.items():
        calls |= {f"{name} {rows}": measurement(signal, rows) for rows in SIZES}
    seconds = take_turns(calls, ROUNDS, warm_up=1)
    steps = seconds.pop("step")
    shares = {name: quartiles([t / s for t, s in zip(times, steps, strict=True)]) for name, times in seconds.items()}
    return {"step_milliseconds": quartiles([1e3 * s for s in steps]), "share_of_a_step": shares}


def measured(signal: Any, memory: TeacherCurvature | None, *nets_and_rows: Any, seed: int) -> Tensor:
    """Statistics (L, S) as a training run takes them: with what the signal's memory has at hand of the teacher."""
    if memory is None:
        return signal.measure(*nets_and_rows, seed=seed)
    return memory.fold(signal.measure(*nets_and_rows, seed=seed, known=memory.at_hand))


def series(
    student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, updates: int, source: Iterator[tuple[Tensor, Tensor]]
) -> dict[str, dict[int, Tensor]]:
    """Statistics (updates, L, S) by signal and number of rows, along one uniform run."""
    found: dict[str, dict[int, list[Tensor]]] = {name: {n: [] for n in (*SIZES, BATCH)} for name in SIGNALS}
    memories = {(name, n): SIGNALS[name].memory(len(pairing)) for name in found for n in found[name]}
    step = distilled(student, teacher)
    for update in range(updates):
        x, y = next(source)
        step(x, y)
        for name, signal in SIGNALS.items():
            for rows in (*SIZES, BATCH):
                on = student, teacher, pairing, x[:rows]
                found[name][rows].append(measured(signal, memories[name, rows], *on, seed=update << 20))
        if update % 10 == 9:
            print(f"update {update + 1} of {updates}", flush=True)
    return {name: {n: torch.stack(s) for n, s in by_rows.items()} for name, by_rows in found.items()}


def rates(statistics: Tensor | list[Tensor | None], signal: Any, momentum: float, every: int = 1) -> Tensor:
    """Multipliers (updates, L) in force after each update; what was not measured is None, or left out by ``every``."""
    first = next(s for s in statistics if s is not None)
    policy = lwkd.Relative(momentum=momentum)
    state, found = policy.start(*first.shape), []
    for update, now in enumerate(statistics):
        if now is not None and update % every == 0:
            state = policy.update(state, now.float(), signal.ratio)
        found.append(state.multipliers)
    return torch.stack(found)


def correlation(found: Tensor, aim: Tensor) -> float:
    """Mean over updates of Spearman's rank correlation over the layers; two constant rows agree, one does not."""
    total = 0.0
    for one, other in zip(found, aim, strict=True):
        a, b = (torch.tensor(rankdata(row.numpy())) for row in (one, other))
        a, b = a - a.mean(), b - b.mean()
        size = float(a.norm() * b.norm())
        total += float(a @ b) / size if size else float(not a.any() and not b.any())
    return total / len(found)


def frontier(found: dict[str, dict[int, Tensor]], cost: dict[str, Any]) -> dict[str, Any]:
    """By signal: what every combination of rows, interval and momentum costs, and the correlation it reaches."""
    result: dict[str, Any] = {}
    for name, signal in SIGNALS.items():
        aim = rates(found[name][BATCH], signal, FULL)
        points = [
            {
                "rows": rows,
                "every": every,
                "momentum": momentum,
                "overhead": round(cost["share_of_a_step"][f"{name} {rows}"]["median"] / every, 5),
                "correlation": round(correlation(rates(found[name][rows], signal, momentum, every), aim), 4),
            }
            for rows, every, momentum in itertools.product(SIZES, INTERVALS, MOMENTA)
        ]
        allowed = [point for point in points if point["overhead"] <= TARGET]
        result[name] = {
            "best_at_the_target": max(allowed, key=lambda point: point["correlation"], default=None),
            "points": points,
        }
    return result


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(result), sharey=True), result.items(), strict=True):
        for rows in SIZES:
            best: dict[float, float] = {}
            for point in found["points"]:
                if point["rows"] == rows:
                    best[point["overhead"]] = max(best.get(point["overhead"], -1), point["correlation"])
            axes.plot(*zip(*sorted(best.items()), strict=True), marker=".", label=f"{rows} rows")
        chosen = SIGNALS[name]
        of_default = rows_of(chosen.samples, BATCH)
        for point in found["points"]:
            if (point["rows"], point["every"], point["momentum"]) == (of_default, chosen.every, chosen.momentum):
                axes.plot(point["overhead"], point["correlation"], "k*", markersize=14, label="default")
        axes.axvline(TARGET, color="grey", linestyle="--", linewidth=1)
        axes.set(title=name, xscale="log", xlabel="overhead, share of a distillation step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("rank correlation with the whole batch at every update")
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--teacher-updates", type=int, default=300)
    parser.add_argument("--student-updates", type=int, default=0, help="made before anything is measured")
    parser.add_argument("--series", type=Path, help="keep the measured series here, and read them from here if there")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    source = fashion_mnist(BATCH, size=32)
    teacher, student = (build(name, classes=10, channels=1, size=32) for name in (options.teacher, options.student))
    pairing = lwkd.pair(student, teacher, next(source)[0][:2])
    if options.series and options.series.exists():
        found = torch.load(options.series)
        teacher.eval()
    else:
        optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        classify(teacher, optimizer, source, options.teacher_updates)
        teacher.eval()
        step = distilled(student, teacher)
        for _ in range(options.student_updates):
            step(*next(source))
        found = series(student, teacher, pairing, options.updates, source)
        if options.series:
            torch.save(found, options.series)
    x, y = next(source)
    cost = costs(student, teacher, pairing, x, y)
    result = frontier(found, cost)
    facts = {"updates": len(found["jacobian"][BATCH]), "batch": BATCH, "cost": cost, "signals": result}
    path = report.keep(f"frontier-{options.teacher}-{options.student}", **facts)
    title = f"{options.teacher} → {options.student}, Fashion-MNIST at 32 by 32, batch {BATCH}"
    draw(result, title, path.with_suffix(".png"))
    for signal, one in result.items():
        print(signal, one["best_at_the_target"])


if __name__ == "__main__":
    main()
