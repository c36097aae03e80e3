r"""What a share of the rows loses: attention on part of batches of 16 to 128, Jacobian and Hessian of a small one.

A student (cnn_8 of cnn_16, or cnn_4 of cnn_8) is distilled on Fashion-MNIST with uniform rates, so that nothing that is
measured changes its path. At every update the signals are measured on all rows and on the first ones. The rates that
follow are compared with those of all rows: Spearman's rank correlation over the layers, and how far a multiplier
(clamped to 0.5 to 1.5) is off, means over updates. Jacobian and Hessian, at their default intervals, are compared at
batch 32 with all rows at every update, over the first 48 updates and over the later ones; the Hessian with the teacher
in each of the first eight measurements, and as it is by default.

    python -m benchmarks.studies.rows

writes ``benchmarks/results/rows.json``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import lwkd
from benchmarks import report
from benchmarks.studies.frontier import correlation, distilled, measured, rates
from benchmarks.training import with_trained_teacher
from lwkd.signals import Attention, Hessian, Jacobian
from lwkd.signals.teacher_curvature import TeacherCurvature

SMALL, EARLY, TEACHER_UPDATES = 32, 48, 300
ATTENTION_ROWS = {128: (8, 16, 32, 64), 64: (8, 16, 32), 32: (8, 16), 16: (4, 8)}
"""By batch."""
OWN_ROWS = (4, 8, 16)


def compared(found: Tensor, aim: Tensor) -> dict[str, float]:
    off = (found - aim).abs()
    return {
        "rank_correlation": round(correlation(found, aim), 3),
        "multiplier_off_mean": round(float(off.mean()), 4),
        "multiplier_off_most": round(float(off.max()), 4),
    }


def attention(seed: int, updates: int, batch: int) -> dict[str, Any]:
    """By number of rows of a batch of this size: spread of a divergence about that of all rows, and the rates."""
    student, teacher, pairing, source = with_trained_teacher(("cnn_16", "cnn_8"), batch, seed, TEACHER_UPDATES)
    signal, step = Attention(), distilled(student, teacher)
    found: dict[int, list[Tensor]] = {rows: [] for rows in (*ATTENTION_ROWS[batch], batch)}
    for _ in range(updates):
        x, y = next(source)
        with torch.no_grad(), lwkd.Capture(student, teacher, pairing) as capture:
            teacher(x), student(x)
            features = capture.student, capture.teacher
        for rows, series in found.items():
            series.append(signal.measure(*([f[:rows] for f in side] for side in features)))
        step(x, y)
    whole = torch.stack(found[batch])
    aim = rates(found[batch], signal, signal.momentum)
    return {
        f"{rows} of {batch}": {
            "divergence_off_rms": round(float((torch.stack(found[rows]) / whole - 1).square().mean().sqrt()), 4),
            **compared(rates(found[rows], signal, signal.momentum), aim),
        }
        for rows in ATTENTION_ROWS[batch]
    }


def own_passes(seed: int, updates: int) -> dict[str, Any]:
    """By signal, rows of a batch of 32 and, for the Hessian, first measurements of the teacher: the rates."""
    student, teacher, pairing, source = with_trained_teacher(("cnn_8", "cnn_4"), SMALL, seed, TEACHER_UPDATES)
    step = distilled(student, teacher)
    ways: dict[str, Any] = {}
    for rows in OWN_ROWS:
        ways[f"jacobian {rows}"] = (Jacobian(), rows, None)
        for eager in (TeacherCurvature.AT_LEAST, TeacherCurvature.EAGER):
            memory = TeacherCurvature(len(pairing), Hessian().tolerance)
            memory.EAGER = eager  # type: ignore[misc]
            ways[f"hessian {rows}, teacher {eager}"] = (Hessian(), rows, memory)
    aims = {"jacobian": Jacobian(), "hessian": Hessian()}
    whole: dict[str, list[Tensor | None]] = {name: [] for name in aims}
    series: dict[str, list[Tensor | None]] = {way: [] for way in ways}
    exact = TeacherCurvature(len(pairing), 1e-9)
    exact.EAGER = 10**9  # type: ignore[misc]  # measured at every update
    memories = {"jacobian": None, "hessian": exact}
    for update in range(updates):
        x, y = next(source)
        step(x, y)
        for name, signal in aims.items():
            on, seed_of_all = (student, teacher, pairing, x), (1 << 40) + (update << 20)
            whole[name].append(measured(signal, memories[name], *on, seed=seed_of_all))
        for way, (signal, rows, memory) in ways.items():
            if update % signal.every:
                series[way].append(None)
                continue
            on = student, teacher, pairing, x[:rows]
            series[way].append(measured(signal, memory, *on, seed=update << 20))
    result: dict[str, Any] = {}
    for way, (signal, _, _) in ways.items():
        aim = rates(whole[signal.name], signal, 0.9)
        mine = rates(series[way], signal, signal.momentum)
        result[way] = {
            f"updates 0 to {EARLY}": compared(mine[:EARLY], aim[:EARLY]),
            f"updates {EARLY} to {updates}": compared(mine[EARLY:], aim[EARLY:]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=240)
    options = parser.parse_args()
    torch.set_num_threads(2)
    runs = []
    for seed in range(options.seeds):
        found: dict[str, Any] = {}
        for batch in ATTENTION_ROWS:
            found |= attention(seed, options.updates, batch)
        run = {"seed": seed, "attention": found, "own": own_passes(seed, options.updates)}
        runs.append(run)
        for part in ("attention", "own"):
            for way, entry in run[part].items():  # type: ignore[attr-defined]
                print(seed, part, way, entry, flush=True)
    report.keep("rows", updates=options.updates, batches=[*ATTENTION_ROWS], runs=runs)


if __name__ == "__main__":
    main()
