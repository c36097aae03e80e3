"""How the benchmarks of the ops are run: figures are kept, or with ``--check`` compared with their floors.

    python -m pytest benchmarks/ops                     keeps figures, as `make bench` does
    python -m pytest benchmarks/ops --check-short       a handful of cases, as CI does
    python -m pytest benchmarks/ops/rates.py            one file

At the end of a run ``results/MACHINE.json`` holds, for every file that ran whole, the times of every implementation,
its ratio to lwkd, and beside them machine, versions, commit and command; ``results/MACHINE.md`` shows them.
``LWKD_BENCHMARK_ROUNDS`` sets the number of rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import floors, harness, report
from benchmarks.harness import SMALL, Timed, summary
from lwkd.program.provenance import origin
from lwkd.program.turns import take_turns

ROUNDS = int(os.environ.get("LWKD_BENCHMARK_ROUNDS", "25"))
THREADS = 2
CASES = pytest.StashKey[dict[str, dict[str, Any]]]()
WANTED = pytest.StashKey[dict[str, set[str]]]()
CHOSEN = pytest.StashKey[set[str]]()
RATIOS = pytest.StashKey[floors.Cases]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lwkd")
    group.addoption("--check", action="store_true", help="compare with the kept figures, and keep nothing")
    group.addoption("--check-short", action="store_true", help="compare a handful of cases with benchmarks/floors.json")
    group.addoption("--write-floors", action="store_true", help="write benchmarks/floors.json anew, for the same cases")


def _is_short(config: pytest.Config) -> bool:
    return config.getoption("--check-short") or config.getoption("--write-floors")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES], config.stash[WANTED], config.stash[RATIOS] = {}, {}, {}
    config.stash[CHOSEN] = {Path(argument.partition("::")[0]).stem for argument in config.args if "::" in argument}


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect every file of this folder, whatever its name; those on the command line pytest collects itself."""
    benchmark = file_path.suffix == ".py" and file_path.name != "conftest.py"
    if not benchmark or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _is_short(config):
        return
    found = {(item.path.stem, item.name): item for item in items}
    wanted = floors.short()
    if missing := [f"{stem}: {name}" for stem, name in wanted if (stem, name) not in found]:
        raise pytest.UsageError(
            f"{floors.PATH} names cases that are not there: {'; '.join(missing)}. The short check runs on all of "
            "benchmarks/ops; where a case was renamed, rename it in that file too."
        )
    config.hook.pytest_deselected(items=[item for key, item in found.items() if key not in wanted])
    items[:] = [found[key] for key in wanted]


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[CHOSEN].add(item.path.stem)


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        session.config.stash[WANTED].setdefault(item.path.stem, set()).add(item.name)


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[[Timed], None]:
    """Let implementations take turns; each returns the seconds that count. ``lwkd`` must be among them."""
    config, stem, case = request.config, request.path.stem, request.node.name

    def keep(implementations: Timed) -> None:
        config.stash[CASES].setdefault(stem, {})[case] = summary(take_turns(implementations, ROUNDS, warm_up=3))

    def check(implementations: Timed) -> None:
        if _is_short(config):
            wanted = floors.short()[stem, case]
        else:
            wanted = {name: floors.SHARE * ratio for name, ratio in floors.kept(stem, case).items()}
        if not wanted:
            pytest.fail(f"{stem}: {case}: no figures are kept of it in {report.folder()}; run `make bench`")
        found = config.stash[RATIOS][stem, case] = floors.ratios(implementations, wanted)
        if not config.getoption("--write-floors"):
            assert not floors.worse(found, wanted), f"{stem}: {case}: {'; '.join(floors.worse(found, wanted))}"

    return check if _is_short(config) or config.getoption("--check") else keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    say = terminalreporter.write_line
    if ratios := config.stash[RATIOS]:
        terminalreporter.section("ratios: least time of the others to that of lwkd")
        for (stem, case), found in ratios.items():
            say(f"{stem}: {case}: {', '.join(f'{name} {ratio:.3g}' for name, ratio in found.items())}")
    if config.getoption("--write-floors"):
        floors.write(ratios, origin(threads=1))
        say(f"written to {floors.PATH}")
    whole = {}
    for stem, found in config.stash[CASES].items():
        terminalreporter.section(f"{stem}: times of the others to that of lwkd, median and quartiles")
        say("\n\n".join(report.tables(found)))
        if report.is_whole(config.stash[WANTED][stem], found, stem in config.stash[CHOSEN]):
            whole[stem] = {**origin(rounds=ROUNDS, threads=THREADS), "cases": found}
        else:
            say(f"not kept: only a run of all of {stem}.py is")
    if whole and SMALL and "LWKD_BENCHMARK_RESULTS" not in os.environ:
        say("not kept: figures of tiny sizes, with nowhere of their own to go")
    elif whole:
        results, name = report.folder(), report.machine()
        path = results / f"{name}.json"
        report.write(path, report.read(path) | whole)
        say(f"written to {path} and {report.write_tables(results, name)}")


@pytest.fixture(autouse=True)
def threads_and_clock(request, monkeypatch):
    """Two threads by the wall clock; the short check counts the processor's time with one (``floors.py`` says why)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if _is_short(request.config) else THREADS)
    if _is_short(request.config):
        monkeypatch.setattr(harness, "CLOCK", time.process_time)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Compiled code is kept for eight variants of a function only, and then silently replaced by eager code."""
    torch._dynamo.reset()
