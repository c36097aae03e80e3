"""What is kept of benchmarks and how it is shown; a check against it fails for slower code and for nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
TIMES = {"lwkd": 1.0, "eager": 6.0, "read": 0.8}
ORIGIN = {
    "machine": {"processor": "Abacus", "cores": 2, "system": "Linux"},
    "load_average_at_the_end": 0.5,
    "threads": 2,
    "rounds": 3,
    "versions": {"python": "3.11", "torch": "2.11", "lwkd": "1", "backend": "C++ kernels on the CPU (v4 vectors, 2 t)"},
    "commit": "abc",
    "command": "make bench",
}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules in benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import check
    import kept
    import tables

    yield SimpleNamespace(check=check, kept=kept, tables=tables)
    for name in ("check", "kept", "tables"):
        del sys.modules[name]


class Busy:
    """A machine with a clock of its own, on which every turn takes its quiet time and what noise adds.

    Most turns meet a little noise, some a lot (a Pareto tail); a burst slows everything for many turns in a row, each
    by an amount of its own.
    """

    def __init__(self, seed: int, bursts: float = 0.01):
        self.random, self.now, self.bursts, self.burst = random.Random(seed), 0.0, bursts, 0

    def turn(self, milliseconds: float) -> Callable[[], float]:
        """Seconds of one turn."""

        def run() -> float:
            if self.burst == 0 and self.random.random() < self.bursts:
                self.burst = self.random.randint(10, 200)
            added = abs(self.random.gauss(0, 0.03)) + 0.02 * (self.random.paretovariate(1.5) - 1)
            if self.burst:
                self.burst -= 1
                added += self.random.uniform(0.3, 3)
            seconds = 1e-3 * milliseconds * (1 + added)
            self.now += seconds
            return seconds

        return run

    def contenders(self, **slower: float) -> dict[str, Callable[[], float]]:
        return {name: self.turn(milliseconds * slower.get(name, 1)) for name, milliseconds in TIMES.items()}


def _kept(benchmarks: SimpleNamespace, machine: Busy) -> dict[str, object]:
    contenders = machine.contenders()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(25):
        for name, turn in contenders.items():
            seconds[name].append(turn())
    return benchmarks.kept.summary(seconds)


def _checked(benchmarks: SimpleNamespace, seed: int, form: str, same: bool = True, **slower: float) -> object:
    """Figures are kept in a burst or without one, where nothing is slower now; without one otherwise."""
    check = benchmarks.check
    before = check.kept_for(_kept(benchmarks, Busy(seed, 0.0 if slower else 0.01)))
    now = Busy(seed + 10**6)
    limits = {"margin": check.MARGINS[form], "seconds": check.SECONDS[form]}
    return check.watch(now.contenders(**slower), before, same=same, clock=lambda: now.now, **limits)


@pytest.mark.parametrize("same", [True, False])
def test_noise_alone_fails_no_short_check(benchmarks, same) -> None:
    verdicts = [_checked(benchmarks, seed, "short", same) for seed in range(2000)]
    assert all(verdict.passed for verdict in verdicts)
    # Most are done at once: patience is for the noisy ones.
    assert sorted(verdict.rounds for verdict in verdicts)[1000] <= 100


def test_a_slower_op_fails_every_short_check(benchmarks) -> None:
    verdicts = [_checked(benchmarks, seed, "short", lwkd=1.5) for seed in range(500)]
    assert not any(verdict.passed for verdict in verdicts)


def test_the_full_check_tells_a_quarter(benchmarks) -> None:
    assert not any(_checked(benchmarks, seed, "full", lwkd=1.3).passed for seed in range(200))
    assert all(_checked(benchmarks, seed, "full").passed for seed in range(500))


def test_on_another_machine_half_of_a_lead_is_enough(benchmarks) -> None:
    # Six times as long as ours when it was kept; 4 and then 2.4 times now. Reading once is no lead.
    assert all(_checked(benchmarks, seed, "short", False, lwkd=1.5).passed for seed in range(200))
    assert not any(_checked(benchmarks, seed, "short", False, lwkd=2.5).passed for seed in range(200))


def test_a_machine_that_is_never_quiet_is_not_blamed_on_the_code(benchmarks) -> None:
    """Ours is slowed for good, the floor as well: something takes one of two cores."""
    verdict = _checked(benchmarks, 0, "short", lwkd=1.7, read=1.7, eager=1.1)
    assert verdict.passed
    assert "never as fast as before" in verdict.how
    # Slowed alone, it is the code.
    assert not _checked(benchmarks, 0, "short", lwkd=1.7).passed


def test_a_contender_that_became_faster_is_not_blamed_on_the_code(benchmarks) -> None:
    assert _checked(benchmarks, 0, "short", eager=0.5, read=0.5).passed


def test_a_failure_says_which_and_by_how_much(benchmarks) -> None:
    verdict = _checked(benchmarks, 1, "short", lwkd=2.0)
    eager = next(line for line in verdict.lines() if line.startswith("eager"))
    assert "worse" in eager
    assert f"{verdict.ratios['eager']:.3g}" in eager
    assert f"quartiles {verdict.kept['eager'].low:.3g} to" in eager


def test_settings_that_change_ratios(benchmarks) -> None:
    other = {**ORIGIN, "versions": {**ORIGIN["versions"], "backend": "C++ kernels on the CPU (v3 vectors, 2 t)"}}
    setting = benchmarks.check.setting
    assert setting(ORIGIN) == setting({**ORIGIN, "commit": "def", "load_average_at_the_end": 2.0})
    assert setting(ORIGIN) != setting(other)
    assert setting(ORIGIN) != setting({**ORIGIN, "threads": 1})


def test_of_several_machines_the_least_lead_counts(benchmarks) -> None:
    cases = [benchmarks.kept.summary({"lwkd": [1.0, 1.0], "eager": [lead, lead]}) for lead in (5.0, 4.0, 6.0)]
    assert benchmarks.check.least_lead(cases)["eager"].ratio == 4.0


def test_stems_are_replaced_whole_and_others_stay(benchmarks, tmp_path) -> None:
    kept = benchmarks.kept
    path = tmp_path / "abacus-2-cores.json"
    kept.write(
        path, {"attention": {"commit": "old", "cases": {"a": {}, "b": {}}}, "rates": {"commit": "old", "cases": {}}}
    )
    kept.write(path, {"attention": {"commit": "new", "cases": {"a": {}}}})
    assert kept.read(path) == {
        "attention": {"commit": "new", "cases": {"a": {}}},
        "rates": {"commit": "old", "cases": {}},
    }
    (tmp_path / "growth-abacus-2-cores.json").write_text('{"commit": "new", "panels": {}}')
    assert list(kept.of_all_machines(tmp_path)) == ["abacus-2-cores"]
    assert kept.is_whole({"a", "b"}, {"a", "b"}, chosen=False)
    assert not kept.is_whole({"a"}, {"a"}, chosen=True)
    assert not kept.is_whole({"a", "b"}, {"a"}, chosen=False)


def test_tables(benchmarks, tmp_path) -> None:
    ours, eager = [0.001, 0.001, 0.002], [0.004, 0.005, 0.006]
    cases = {
        "test_forward[cifar-float32]": benchmarks.kept.summary({"lwkd": ours, "eager": eager}),
        "test_forward[cifar-bfloat16]": benchmarks.kept.summary({"lwkd": ours, "read": ours}),
        "test_whole_step": benchmarks.kept.summary({"lwkd": ours}),
    }
    name = "abacus-2-cores"
    benchmarks.kept.write(tmp_path / f"{name}.json", {"attention": {**ORIGIN, "cases": cases}})
    text = benchmarks.tables.write(tmp_path, name).read_text()
    assert "| forward | lwkd | eager | read |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| cifar float32 | 1.00 ms (1.00 to 1.50) | 4.00 x (3.50 to 4.50) |  |" in text
    assert "| cifar bfloat16 | 1.00 ms (1.00 to 1.50) |  | 1.00 x (1.00 to 1.00) |" in text
    assert "| whole step | lwkd |" in text
    assert "commit abc; `make bench`" in text


BENCH = """
import time
import pytest

def sleep(milliseconds):
    def run():
        begin = time.perf_counter()
        time.sleep(milliseconds / 1000)
        return time.perf_counter() - begin
    return run

@pytest.mark.parametrize("case", ["one", "two"])
def test_naps(case, contest):
    contest({"lwkd": lambda: 0.001 * SLOWER, "eager": lambda: 0.005, "torch.compile": sleep(1)})
"""


def _run(folder: Path, *options: str, slower: float = 1, plugin: str = "") -> subprocess.CompletedProcess[str]:
    """The benchmarks' conftest over one small file of benchmarks."""
    (folder / "bench_naps.py").write_text(BENCH.replace("SLOWER", str(slower)))
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nimport check\n"
        "check.SHORT, check.MANY, check.AGAIN, check.SECONDS = "
        f"(('naps', 'test_naps[one]'),), 12, 1, {{'full': 0, 'short': 0}}\n{plugin}\n"
        f"exec(compile(open({str(ROOT / 'benchmarks' / 'conftest.py')!r}).read(), 'conftest.py', 'exec'))\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, *options],
        cwd=folder,
        env=os.environ | {"LWKD_BENCHMARK_RESULTS": str(folder / "results"), "LWKD_BENCHMARK_ROUNDS": "3"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_keeping_and_checking(tmp_path) -> None:
    def kept() -> dict[str, object]:
        (path,) = (tmp_path / "results").glob("*-cores.json")
        return json.loads(path.read_text())

    part = _run(tmp_path, "bench_naps.py::test_naps[one]")
    assert "not kept" in part.stdout, part.stdout + part.stderr
    assert not (tmp_path / "results").exists()

    assert _run(tmp_path, "bench_naps.py").returncode == 0
    before = kept()
    assert before["naps"]["cases"].keys() == {"test_naps[one]", "test_naps[two]"}
    assert before["naps"]["cases"]["test_naps[one]"]["eager"]["ratio_of_least"] == 5.0
    assert len(list((tmp_path / "results").glob("*-cores.md"))) == 1

    same = _run(tmp_path, "bench_naps.py", "--check-short")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "1 passed, 1 deselected" in same.stdout
    assert "torch.compile" not in same.stdout
    slow = _run(tmp_path, "bench_naps.py", "--check", slower=2)
    assert slow.returncode == 1
    assert "naps: test_naps[one]" in slow.stdout
    assert "eager: worse: found 2.5 x lwkd" in slow.stdout
    assert "worse in 1 processes of its own too" in slow.stdout
    assert kept() == before


def test_a_case_that_is_gone(tmp_path) -> None:
    gone = _run(tmp_path, "bench_naps.py", "--check-short", plugin="check.SHORT = (('naps', 'test_gone'),)")
    assert gone.returncode != 0
    assert "naps: test_gone" in gone.stderr + gone.stdout
