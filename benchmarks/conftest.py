"""How benchmarks are run: kept (``kept.py`` says how), or checked against what was kept (``check.py``).

The contenders of a case take turns within one test, round by round, so that whatever else the machine does meets all
of them alike. At the end of a run ``results/MACHINE.json`` holds, per benchmark file, the times of every contender, its
ratio to lwkd, and beside them machine, versions, commit and command; ``results/MACHINE.md`` shows them.

With ``--check`` nothing is kept; ``--check-short`` runs a handful of cases. A ratio that is worse than the kept one by
more than its spread fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import check
import kept
import pytest
import tables
import torch

from lwkd.program.provenance import origin

ROUNDS = int(os.environ.get("LWKD_BENCHMARK_ROUNDS", "25"))
WARM_UP = 3
THREADS = 2
Contenders = dict[str, Callable[[], float]]
CASES = pytest.StashKey[dict[str, dict[str, Any]]]()
WANTED = pytest.StashKey[dict[str, set[str]]]()
CHOSEN = pytest.StashKey[set[str]]()
VERDICTS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lwkd")
    group.addoption("--check", action="store_true", help="compare with the kept figures, and keep nothing")
    group.addoption("--check-short", action="store_true", help="the same for a handful of cases, for CI")
    group.addoption(
        "--check-again", choices=list(check.MARGINS), help="the same for what is named, by that form's rules"
    )


def _form(config: pytest.Config) -> str | None:
    """Of a check; None where figures are to be kept."""
    if again := config.getoption("--check-again"):
        return again
    return "short" if config.getoption("--check-short") else "full" if config.getoption("--check") else None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES], config.stash[WANTED], config.stash[VERDICTS] = {}, {}, []
    config.stash[CHOSEN] = {_stem(argument.partition("::")[0]) for argument in config.args if "::" in argument}


def _stem(file: str) -> str:
    return os.path.basename(file).removeprefix("bench_").removesuffix(".py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--check-short"):
        return
    found = {(_stem(str(item.path)), item.name): item for item in items}
    if missing := [f"{stem}: {name}" for stem, name in check.SHORT if (stem, name) not in found]:
        raise pytest.UsageError(
            f"check.SHORT names cases that are not there: {'; '.join(missing)}. The short check runs on all files, "
            "benchmarks/bench_*.py; where a case was renamed, rename it in benchmarks/check.py too."
        )
    chosen = [found[key] for key in check.SHORT]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[CHOSEN].add(_stem(str(item.path)))


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if "contest" in getattr(item, "fixturenames", ()):
            session.config.stash[WANTED].setdefault(_stem(str(item.path)), set()).add(item.name)


@pytest.fixture
def contest(request: pytest.FixtureRequest) -> Callable[[Contenders], None]:
    """Run contenders in turns; each returns the seconds that count. ``lwkd`` must be among them."""
    config, stem = request.config, _stem(str(request.path))
    if form := _form(config):
        return lambda contenders: _compare(request, form, contenders)
    benchmark = request.getfixturevalue("benchmark")

    def run(contenders: Contenders) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}

        def one_round() -> None:
            for name, contender in contenders.items():
                seconds[name].append(contender())

        benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=WARM_UP)
        case = kept.summary({name: times[-ROUNDS:] for name, times in seconds.items()})
        benchmark.extra_info.update(case)
        config.stash[CASES].setdefault(stem, {})[request.node.name] = case

    return run


def _compare(request: pytest.FixtureRequest, form: str, contenders: Contenders) -> None:
    """Fail where a ratio is worse than the kept one, here and in processes of its own."""
    config, stem, case = request.config, _stem(str(request.path)), request.node.name
    if form == "short":
        contenders = {n: c for n, c in contenders.items() if not n.startswith(check.SLOW_TO_BUILD)}
    machines = kept.of_all_machines(kept.folder())
    known = {name: found for name, stems in machines.items() if (found := kept.case_of(stems, stem, case))}
    if not known:
        pytest.fail(f"{stem}: {case}: no figures are kept of it in {kept.folder()}; run `make bench`", pytrace=False)
    here = kept.machine()
    same = here in known and check.setting(machines[here][stem]) == check.setting(origin(threads=THREADS))
    before = check.kept_for(known[here]) if same else check.least_lead(list(known.values()))
    for _ in range(WARM_UP):
        for name in ("lwkd", *before):
            if name in contenders:
                contenders[name]()
    verdict = check.watch(contenders, before, same=same, margin=check.MARGINS[form], seconds=check.SECONDS[form])
    lines = [f"{stem}: {case}: {verdict.how}; {verdict.rounds} rounds", *(f"    {line}" for line in verdict.lines())]
    if unknown := sorted(contenders.keys() - before.keys() - {"lwkd"}):
        lines.append(f"    nothing is kept of {', '.join(unknown)}")
    passed = verdict.passed
    if not passed and not config.getoption("--check-again"):
        passed, line = _again(request, form)
        lines.append(f"    {line}")
    config.stash[VERDICTS].extend(lines)
    if not passed:
        pytest.fail("\n".join(lines), pytrace=False)


def _again(request: pytest.FixtureRequest, form: str) -> tuple[bool, str]:
    """The same case in processes of its own, until it passes in one; and what to say of it."""
    node = f"{request.path}::{request.node.name}"
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--check-again={form}", node]
    for number in range(1, check.AGAIN + 1):
        done = subprocess.run(words, cwd=request.config.invocation_params.dir, capture_output=True, check=False)
        if done.returncode == 0:
            return True, f"passed in a process of its own, number {number}: it was this process, not the code"
    return False, f"worse in {check.AGAIN} processes of its own too"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if verdicts := config.stash[VERDICTS]:
        terminalreporter.section("ratios: least time of the others to that of lwkd")
        for line in verdicts:
            terminalreporter.write_line(line)
    cases = config.stash[CASES]
    whole = {}
    for stem, found in cases.items():
        terminalreporter.section(f"{stem}: times of the others to that of lwkd, median and quartiles")
        for line in tables.lines(found):
            terminalreporter.write_line(line)
        if kept.is_whole(config.stash[WANTED][stem], found, stem in config.stash[CHOSEN]):
            whole[stem] = {**origin(rounds=ROUNDS, threads=THREADS), "cases": found}
        else:
            terminalreporter.write_line(f"not kept: only a run of all of bench_{stem}.py is")
    if whole and os.environ.get("LWKD_BENCHMARK_SMALL") == "1" and "LWKD_BENCHMARK_RESULTS" not in os.environ:
        terminalreporter.write_line("not kept: figures of tiny sizes, with nowhere of their own to go")
    elif whole:
        path = kept.folder() / f"{kept.machine()}.json"
        kept.write(path, whole)
        terminalreporter.write_line(f"written to {path} and {tables.write(kept.folder(), kept.machine())}")


@pytest.fixture(autouse=True)
def two_threads_and_nothing_compiled():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    # Compiled code is kept for eight variants of a function only, and then silently replaced by eager code.
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)
