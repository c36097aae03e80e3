r"""What a measurement costs beside a distillation step, and what that makes of the default intervals.

Random pictures at 32×32, batch 128, SGD. Plain steps and measurements of every kind take turns; a ratio is formed
within each round. The mean overhead of a signal is its measurement's share of a step over its default interval. Beside
it stands what ``optimizer.overhead()`` said after a real run with that signal, and what 500 updates of a smaller pair
said under a budget of 2 %.

    python benchmarks/study_overhead.py

writes ``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lwkd
from lwkd.program.models import build
from lwkd.program.origin import origin, quartiles
from lwkd.rates import SIGNALS
from lwkd.signals import Hessian, Jacobian

RESULTS = Path(__file__).parent / "results"
PAIRS = (("resnet18", "resnet10"), ("resnet56", "resnet20"))
SMALL = ("cnn_16", "cnn_8")
BATCH, ROUNDS, BUDGET = 128, 9, 0.02
VARIANTS: dict[str, Any] = {
    "jacobian jvp": Jacobian(),
    "jacobian difference": Jacobian(estimator="difference"),
    "jacobian output": Jacobian(estimator="output"),
    "hessian ggn": Hessian(),
    "hessian hessian": Hessian(curvature="hessian"),
}


def distilled(student: nn.Module, teacher: nn.Module, optimizer: Any = None) -> Callable[[Tensor, Tensor], None]:
    """One step of baseline distillation; without an optimizer, SGD at uniform rates."""
    if optimizer is None:
        optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step(x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            target = teacher(x)
        loss = lwkd.losses.distillation(student(x), target, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def costs(
    student: nn.Module,
    teacher: nn.Module,
    pairing: lwkd.Pairing,
    x: Tensor,
    y: Tensor,
    variants: dict[str, Any],
    sizes: tuple[int, ...],
) -> dict[str, Any]:
    """Milliseconds of a plain step, and each measurement's share of it: quartiles over rounds, taking turns.

    The teacher's curvature is taken for known, as it is after the first measurements.
    """
    step = distilled(student, teacher)
    known = torch.ones(len(pairing))

    def measurement(signal: Any, rows: int) -> Callable[[], Any]:
        options = {"known": known} if isinstance(signal, Hessian) else {}
        return lambda: signal.measure(student, teacher, pairing, x[:rows], seed=1, **options)

    calls: dict[str, Callable[[], Any]] = {"step": lambda: step(x, y)}
    for name, signal in variants.items():
        calls.update({f"{name} {rows}": measurement(signal, rows) for rows in dict.fromkeys(sizes)})
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    steps = seconds.pop("step")[1:]
    shares = {
        name: quartiles([t / s for t, s in zip(times[1:], steps, strict=True)]) for name, times in seconds.items()
    }
    return {"step_milliseconds": quartiles([1e3 * s for s in steps]), "share_of_a_step": shares}


def nets(teacher: str, student: str, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    built = [build(name, classes=10, channels=channels, size=size) for name in (student, teacher)]
    return built[0], built[1].eval()


def achieved(names: tuple[str, str], updates: int, x: Tensor, y: Tensor, **options: Any) -> dict[str, Any]:
    """What the wrapper itself reports after a real run."""
    student, teacher = nets(*names, *x.shape[1:3])
    base = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, lwkd.pair(student, teacher, x[:2]), **options)
    step = distilled(student, teacher, optimizer)
    for _ in range(updates):
        step(x, y)
    return {"updates": updates, "every": optimizer.every, "overhead": round(optimizer.overhead(), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=81, help="of the runs with defaults")
    options = parser.parse_args()
    torch.set_num_threads(2)
    result: dict[str, Any] = {}
    for names in PAIRS:
        student, teacher = nets(*names, 3, 32)
        x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
        pairing = lwkd.pair(student, teacher, x[:2])
        found = costs(student, teacher, pairing, x, y, VARIANTS, (Jacobian().samples, Hessian().samples))
        for name, signal in (("jacobian jvp", Jacobian()), ("hessian ggn", Hessian())):
            share = found["share_of_a_step"][f"{name} {signal.samples}"]
            found[f"mean overhead of {signal.name}"] = {k: round(v / signal.every, 5) for k, v in share.items()}
        found["achieved"] = {s: achieved(names, options.updates, x, y, signal=s) for s in SIGNALS}
        result["→".join(names)] = found
        print(names, json.dumps(found, indent=1), flush=True)
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    budgeted = {s: achieved(SMALL, 500, x, y, signal=s, budget=BUDGET) for s in ("jacobian", "hessian")}
    print("budget", json.dumps(budgeted), flush=True)
    (RESULTS / "overhead.json").write_text(
        json.dumps(
            {**origin(), "batch": BATCH, "pairs": result, "budget": {"of": BUDGET, "pair": SMALL, **budgeted}}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
