"""What is kept of benchmarks and how it is shown; the check fails for slower code and for nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from python_runs import ROOT, python

from benchmarks import floors, report
from benchmarks.harness import summary
from lwkd.program.turns import take_turns

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

    def implementations(self, **slower: float) -> dict[str, Callable[[], float]]:
        return {name: self.turn(milliseconds * slower.get(name, 1)) for name, milliseconds in TIMES.items()}


def _checked(seed: int, **slower: float) -> tuple[list[str], float]:
    """What is worse than its floor, and seconds; floors are from a burst or not where nothing is slower now."""
    kept = summary(take_turns(Busy(seed, 0.0 if slower else 0.01).implementations(), 25))
    limits = {name: floors.SHARE * kept[name]["ratio_of_least"] for name in kept if name != "lwkd"}
    now = Busy(seed + 10**6)
    return floors.worse(floors.ratios(now.implementations(**slower), limits, lambda: now.now), limits), now.now


def test_noise_alone_fails_no_check() -> None:
    checked = [_checked(seed) for seed in range(2000)]
    assert not any(worse for worse, _ in checked)
    # Most are done at once: patience is for the noisy ones.
    assert sorted(seconds for _, seconds in checked)[1000] <= 2 * floors.SECONDS


def test_an_op_of_twice_the_time_fails_every_check() -> None:
    assert all(_checked(seed, lwkd=2.0)[0] for seed in range(500))


def test_a_lead_that_differs_by_a_third_is_enough() -> None:
    # On another processor, say: six times as long as ours where the floor comes from, and four times here.
    assert not any(_checked(seed, lwkd=1.5)[0] for seed in range(200))


def test_a_machine_that_is_never_quiet_is_not_blamed_on_the_code() -> None:
    """Ours is slowed for good, the memory's speed as well: something takes one of two cores."""
    assert not any(_checked(seed, lwkd=1.7, read=1.7, eager=1.1)[0] for seed in range(200))


def test_an_implementation_that_became_faster_is_not_blamed_on_the_code() -> None:
    assert not any(_checked(seed, eager=0.67, read=0.67)[0] for seed in range(200))


def test_a_failure_says_which_and_by_how_much() -> None:
    (eager, read), _ = _checked(1, lwkd=2.5)
    assert eager.startswith("eager takes 2.")
    assert read.startswith("read takes 0.3")
    assert "x as long as lwkd, expected at least 3." in eager


def test_the_short_check_is_about_cases_that_are_kept() -> None:
    cases = floors.short()
    assert {stem for stem, _ in cases} >= {"attention", "jacobian", "hutchinson", "rates", "launch"}
    assert {"machine", "versions", "commit", "command"} <= report.read(floors.PATH).keys()
    for (stem, case), limits in cases.items():
        kept = report.read(ROOT / "benchmarks/results/amd-epyc-2-cores.json")[stem]["cases"][case]
        assert limits
        for name, floor in limits.items():
            assert 0.2 * kept[name]["ratio_of_least"] < floor < 0.61 * kept[name]["ratio_of_least"]


def test_of_several_machines_the_least_lead_counts(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LWKD_BENCHMARK_RESULTS", str(tmp_path))
    for name, lead in (("abacus-2-cores", 5.0), ("babbage-2-cores", 4.0), ("colossus-2-cores", 6.0)):
        cases = {"a": summary({"lwkd": [1.0, 1.0], "eager": [lead, lead]})}
        report.write(tmp_path / f"{name}.json", {"attention": {"commit": "abc", "cases": cases}})
    assert floors.kept("attention", "a") == {"eager": 4.0}
    assert floors.kept("attention", "b") == floors.kept("rates", "a") == {}


def test_results_are_found_by_machine_and_whole(tmp_path) -> None:
    report.write(tmp_path / "abacus-2-cores.json", {"attention": {"commit": "new", "cases": {"a": {}}}})
    (tmp_path / "growth-abacus-2-cores.json").write_text('{"commit": "new", "panels": {}}')
    assert list(report.of_all_machines(tmp_path)) == ["abacus-2-cores"]
    assert report.is_whole({"a", "b"}, {"a", "b"}, chosen=False)
    assert not report.is_whole({"a"}, {"a"}, chosen=True)
    assert not report.is_whole({"a", "b"}, {"a"}, chosen=False)


def test_tables(tmp_path) -> None:
    ours, eager = [0.001, 0.001, 0.002], [0.004, 0.005, 0.006]
    cases = {
        "test_forward[cifar-float32]": summary({"lwkd": ours, "eager": eager}),
        "test_forward[cifar-bfloat16]": summary({"lwkd": ours, "read": ours}),
        "test_whole_step": summary({"lwkd": ours}),
    }
    name = "abacus-2-cores"
    report.write(tmp_path / f"{name}.json", {"attention": {**ORIGIN, "cases": cases}})
    text = report.write_tables(tmp_path, name).read_text()
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
def test_naps(case, compare):
    compare({"lwkd": lambda: 0.001 * SLOWER, "eager": lambda: 0.005, "torch.compile": sleep(1)})
"""


def _run(
    folder: Path, *options: str, slower: float = 1, case: str = "test_naps[one]"
) -> subprocess.CompletedProcess[str]:
    """The benchmarks' conftest over one small file of benchmarks."""
    (folder / "naps.py").write_text(BENCH.replace("SLOWER", str(slower)))
    (folder / "floors.json").write_text(json.dumps({"floors": {"naps": {case: {"eager": 3.0}}}}))
    (folder / "conftest.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks import floors\n"
        f"floors.PATH, floors.PATIENCE = Path({str(folder / 'floors.json')!r}), 1\n"
        f"exec(compile(open({str(ROOT / 'benchmarks/ops/conftest.py')!r}).read(), 'conftest.py', 'exec'))\n"
    )
    kept = {"LWKD_BENCHMARK_RESULTS": str(folder / "results"), "LWKD_BENCHMARK_ROUNDS": "3"}
    return python("-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, *options, cwd=folder, **kept)


def test_keeping_and_checking(tmp_path) -> None:
    results = tmp_path / "results"

    def kept() -> dict[str, object]:
        (path,) = results.glob("*-cores.json")
        return json.loads(path.read_text())

    part = _run(tmp_path, "naps.py::test_naps[one]")
    assert "not kept" in part.stdout, part.stdout + part.stderr
    assert not results.exists()

    # Stems are replaced whole, and others stay.
    other = {"rates": {**ORIGIN, "commit": "old", "cases": {}}}
    report.write(results / f"{report.machine()}.json", {**other, "naps": {"commit": "old", "cases": {"a": {}}}})
    assert _run(tmp_path, ".").returncode == 0
    before = kept()
    assert before["naps"]["cases"].keys() == {"test_naps[one]", "test_naps[two]"}
    assert before["naps"]["cases"]["test_naps[one]"]["eager"]["ratio_of_least"] == 5.0
    assert before["rates"] == other["rates"]
    assert len(list(results.glob("*-cores.md"))) == 1

    same = _run(tmp_path, "naps.py", "--check-short")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "1 passed, 1 deselected" in same.stdout
    assert "torch.compile" not in same.stdout
    slow = _run(tmp_path, "naps.py", "--check", slower=2)
    assert slow.returncode == 1
    assert "naps: test_naps[one]: eager takes 2.5 x as long as lwkd, expected at least 3 x" in slow.stdout
    assert kept() == before


def test_floors_are_written_from_the_lesser_of_what_is_found_and_kept(tmp_path) -> None:
    found = _run(tmp_path, "naps.py", "--write-floors")
    assert found.returncode == 0, found.stdout + found.stderr
    written = json.loads((tmp_path / "floors.json").read_text())
    assert written["floors"] == {"naps": {"test_naps[one]": {"eager": 3.0}}}
    assert {"machine", "versions", "commit", "command"} <= written.keys()
    kept = {"naps": {"commit": "abc", "cases": {"test_naps[one]": {"eager": {"ratio_of_least": 4.0}}}}}
    report.write(tmp_path / "results" / "abacus-2-cores.json", kept)
    assert _run(tmp_path, "naps.py", "--write-floors").returncode == 0
    assert json.loads((tmp_path / "floors.json").read_text())["floors"]["naps"]["test_naps[one]"] == {"eager": 2.4}


def test_a_case_that_is_gone(tmp_path) -> None:
    gone = _run(tmp_path, "naps.py", "--check-short", case="test_gone")
    assert gone.returncode != 0
    assert "naps: test_gone" in gone.stderr + gone.stdout
