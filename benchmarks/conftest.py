"""How benchmarks are run and kept.

The contenders of a case take turns within one test, round by round, so that whatever else the machine does meets all
of them alike. At the end of a run ``results/MACHINE.json`` holds, per benchmark file, the median time and quartiles of
every contender, its ratio to lwkd (the median and quartiles of the ratios within each round), and beside them machine,
versions, commit and command.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lwkd.program.origin import origin, processor, quartiles

ROUNDS = int(os.environ.get("LWKD_BENCHMARK_ROUNDS", "25"))
RESULTS = Path(__file__).parent / "results"
CASES = pytest.StashKey[dict]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES] = {}


@pytest.fixture
def contest(benchmark, request: pytest.FixtureRequest):
    """Run contenders in turns; each returns the seconds that count. ``lwkd`` must be among them."""

    def run(contenders: dict[str, Callable[[], float]]) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}

        def one_round() -> None:
            for name, contender in contenders.items():
                seconds[name].append(contender())

        benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=3)
        seconds = {name: times[-ROUNDS:] for name, times in seconds.items()}
        case = {name: {"milliseconds": quartiles([1e3 * s for s in times])} for name, times in seconds.items()}
        for name, times in seconds.items():
            ratios = [time / ours for time, ours in zip(times, seconds["lwkd"], strict=True)]
            case[name]["ratio_to_lwkd"] = quartiles(ratios)
        benchmark.extra_info.update(case)
        stem = request.path.stem.removeprefix("bench_")
        request.config.stash[CASES].setdefault(stem, {})[request.node.name] = case

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    cases = config.stash[CASES]
    if not cases:
        return
    name = re.sub(r"[^a-z0-9]+", "-", f"{processor()} {os.cpu_count()} cores".lower()).strip("-")
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for stem, found in cases.items():
        kept[stem] = {**origin(rounds=ROUNDS, threads=2), "cases": found}
        terminalreporter.section(f"{stem}: milliseconds, and times slower than lwkd (quartiles)")
        for case, contenders in found.items():
            parts = [
                f"{who} {c['milliseconds']['median']:.4g} ms"
                + ("" if who == "lwkd" else " {median:.2f} x ({low:.2f}-{high:.2f})".format(**c["ratio_to_lwkd"]))
                for who, c in contenders.items()
            ]
            terminalreporter.write_line(f"{case}: " + ", ".join(parts))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    terminalreporter.write_line(f"written to {path}")


@pytest.fixture(autouse=True)
def two_threads_and_nothing_compiled():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    # Compiled code is kept for eight variants of a function only, and then silently replaced by eager code.
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)
