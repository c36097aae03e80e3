"""Builds, tests and measures on the GPU of this machine, in under ten minutes, and leaves the results in one folder.

    python -m benchmarks.gpu.run --out runs/gpu

No network, no virtual environment, nothing installed: the package is put together under ``build/gpu`` by
``setup.py build``, with ``kernels/`` where ``lwkd.kernels`` belongs, and every stage finds it there through PYTHONPATH.
A Python that belongs to the system is thus left as it is, which no form of ``pip install`` would do. Stages start in
``build/gpu``, because a folder ``lwkd`` in the current folder would come before PYTHONPATH. Images of kernels and
compiled baselines are kept there as well.

By hand, for a single test, where ``$LIB`` is ``$PWD/build/gpu/lib``:

    cd build/gpu && PYTHONPATH=$LIB python -m pytest -c ../../pyproject.toml ../../tests/ops/test_rates.py -m cuda -x
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import report as results
from benchmarks.gpu import report
from benchmarks.gpu.stages import Outcome, Stage, execute

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STAGES = ("build", "images", "first", "baselines", "tests", "sanitizer", "ops", "steps")
BUDGET = 575.0
"""Seconds for everything: under ten minutes, with something left for the start of the machine's Python."""

ENDS = {"build": 0.26, "images": 0.34, "first": 0.46, "tests": 0.64, "ops": 0.84, "steps": 0.985}
"""When each phase has ended at the latest, as a share of the budget."""

FIRST = (
    "ops/test_attention.py",
    *(f"cuda/test_gpu_{what}.py" for what in ("streams", "graphs", "compiled", "precision")),
)
"""Tests that are run before all others: if these fail, nothing else has to be looked at."""

NEEDED = ("hypothesis", "matplotlib", "ninja", "numpy", "pytest", "pytest_timeout", "setuptools", "torch", "triton")
"""What stages import besides lwkd, and what builds it."""

MOST_JOBS = 16
"""Compilers at once: each takes a gigabyte, and machines show more processors than a container may use."""

SHARDS = 5
"""Processes that compile baselines while the tests run; the rest of the cores is the tests'."""

WORKERS = 5
"""Processes that run tests, where pytest-xdist is installed: most of a test's time is the host's."""


def environment(build: Path, data: Path | None, small: bool) -> dict[str, str]:
    """What all stages see beside the variables of this process."""
    tools = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    found = {
        "PATH": os.pathsep.join(tools),  # ninja lies beside the Python that it was installed with
        "PYTHONPATH": f"{build / 'lib'}{os.pathsep}{ROOT}",  # lwkd as it was built, and benchmarks
        "LWKD_BENCHMARK_SMALL": str(int(small)),
        "PYTHONUNBUFFERED": "1",
        "MAX_JOBS": str(min(MOST_JOBS, len(os.sched_getaffinity(0)))),
        # Of inductor, in each of the processes that compile baselines.
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(MOST_JOBS, len(os.sched_getaffinity(0))) // SHARDS)),
        "LWKD_CACHE_DIR": str(build / "images"),
        "TORCHINDUCTOR_CACHE_DIR": str(build / "inductor"),
        "MPLBACKEND": "Agg",
    }
    return found | ({"LWKD_DATA": str(data)} if data is not None else {})


def phases(options: argparse.Namespace, build: Path) -> list[tuple[float, list[Stage]]]:
    """The stages that were asked for, and until when each may take."""
    python, out, shared = sys.executable, options.out, environment(build, options.data, options.small)

    sanitizer = ROOT / "tests" / "cuda" / "test_gpu_sanitizer.py"

    def pytest(*arguments: str) -> list[str]:
        return [python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", *arguments]

    def module(name: str, *arguments: str) -> list[str]:
        return [python, "-m", f"benchmarks.gpu.{name}", "--device", options.device, *arguments]

    shards = 1 if options.small else SHARDS  # a dry run's baselines take less time than the start of a process
    beside = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    first = [str(ROOT / "tests" / file) for file in FIRST]
    tests = [str(ROOT / "tests" / folder) for folder in ("ops", "cuda")]
    others = [f"--ignore={test}" for test in (*first, str(sanitizer))]
    report_file = ["--junitxml", str(out / "tests.xml")]
    building = [python, str(HERE / "package.py"), str(build)]
    every = {
        "build": [Stage("build", building, shared)],
        "images": [Stage("images", module("warm"), shared)],
        "first": [Stage("first", pytest(*first, *beside, "-m", "cuda", "--tb=short"), shared)],
        "tests": [
            Stage("tests", pytest(*tests, *others, *beside, "-m", "cuda", "--tb=short", *report_file), shared),
            Stage("sanitizer", pytest(str(sanitizer), "-rs", "--tb=short"), shared),
            Stage("baselines", module("baselines", "--shards", str(shards), "--seconds", "{seconds}"), shared),
        ],
        "ops": [Stage("ops", module("ops", "--out", str(out), "--seconds", "{seconds}"), shared)],
        "steps": [Stage("steps", module("steps", "--out", str(out), "--seconds", "{seconds}"), shared)],
    }
    wanted = options.stages.split(",")
    unknown = set(wanted) - set(STAGES)
    if unknown:
        raise SystemExit(f"--stages: {', '.join(sorted(unknown))} not known; known are {', '.join(STAGES)}")
    found = []
    for phase, stages in every.items():
        chosen = [stage for stage in stages if stage.name in wanted]
        if chosen:
            found.append((ENDS[phase] * options.budget, chosen))
    return found


def missing() -> list[str]:
    """What this machine lacks for ``make gpu``: Python packages, and a C++ compiler with Python's headers."""
    found = [f"the Python package {name}" for name in NEEDED if importlib.util.find_spec(name) is None]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        found.append("a C++ compiler (c++, or CXX)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(f"Python.h in {sysconfig.get_path('include')} (python3-dev)")
    return found


def summarise(out: Path, outcomes: list[Outcome], command: str) -> str:
    """Write ``stages.json`` and ``summary.md``; returns the latter's text."""
    results.write(out / "stages.json", {"command": command, "stages": [asdict(outcome) for outcome in outcomes]})
    text = report.summary(out)
    (out / "summary.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Exit status: how many stages did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--data", type=Path, help="folder in which Fashion-MNIST may lie, for the test of the program")
    parser.add_argument("--device", default="cuda", help="cpu: a dry run of the benchmarks")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a dry run")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    options = parser.parse_args(arguments)
    if found := missing():
        raise SystemExit(f"make gpu needs {', '.join(found)} for {sys.executable}")
    options.out = options.out.resolve()
    options.data = None if options.data is None else options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    build = ROOT / "build" / "gpu"
    build.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] {line}", flush=True)

    outcomes = execute(phases(options, build), build, options.out / "log.txt", say)
    print(summarise(options.out, outcomes, "make gpu"), flush=True)
    print(f"{time.monotonic() - begin:.0f} s; everything is in {options.out}", flush=True)
    return sum(outcome.result != "passed" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
