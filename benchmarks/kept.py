"""What is kept of benchmarks: one JSON a machine, which says for every file of benchmarks where its figures come from.

``results/MACHINE.json`` is ``{stem: {origin…, "cases": {case: {contender: figures}}}}``. A stem is written whole or not
at all: its cases come from one run of one commit, so one origin speaks for all of them. A run of some cases shows its
figures and changes nothing.

The folder is ``benchmarks/results``, or what the environment variable ``LWKD_BENCHMARK_RESULTS`` names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lwkd.program.provenance import processor, quartiles

HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Where results are kept."""
    return Path(os.environ.get("LWKD_BENCHMARK_RESULTS", HERE / "results"))


def machine() -> str:
    """This machine's name, as files carry it.

    >>> import re
    >>> re.fullmatch("[a-z0-9-]+-cores", machine()) is not None
    True
    """
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {os.cpu_count()} cores".lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """The stems in a file of results; none where it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def of_all_machines(results: Path) -> dict[str, dict[str, Any]]:
    """The stems of every machine in the folder, by the machine's name; other results lie beside them."""
    found = {path.stem: read(path) for path in sorted(results.glob("*-cores.json"))}
    return {name: stems for name, stems in found.items() if stems and all(_is_stem(stem) for stem in stems.values())}


def _is_stem(of: Any) -> bool:
    return isinstance(of, dict) and {"cases", "commit"} <= of.keys()


def case_of(stems: Mapping[str, Any], stem: str, case: str) -> dict[str, Any] | None:
    """The contenders of a case, if it is among the stems."""
    return stems[stem]["cases"].get(case) if stem in stems else None


def write(path: Path, stems: Mapping[str, Any]) -> None:
    """Put the stems into the file, in place of what it held of the same ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(read(path) | dict(stems), indent=1) + "\n")


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The figures of one case from the seconds of its contenders, round by round; ``lwkd`` is among them.

    Ratios are formed within each round, which meets all contenders alike. The least times, which noise can only raise,
    are what ``check.py`` compares.

    >>> found = summary({"lwkd": [0.001, 0.002, 0.001], "eager": [0.003, 0.004, 0.003]})
    >>> found["eager"]["ratio_to_lwkd"], found["eager"]["ratio_of_least"]
    ({'median': 3.0, 'low': 2.5, 'high': 3.0}, 3.0)
    """
    least = {name: min(times) for name, times in seconds.items()}
    return {
        name: {
            "milliseconds": quartiles([1e3 * time for time in times]),
            "ratio_to_lwkd": quartiles([time / ours for time, ours in zip(times, seconds["lwkd"], strict=True)]),
            "least_milliseconds": float(f"{1e3 * least[name]:.4g}"),
            "ratio_of_least": float(f"{least[name] / least['lwkd']:.4g}"),
        }
        for name, times in seconds.items()
    }


def is_whole(wanted: Collection[str], found: Collection[str], chosen: bool) -> bool:
    """Whether a stem ran whole: every case of its file has figures, and none had been left out by choice.

    Args:
        wanted: cases that pytest was to run.
        found: those that have figures; a failed one has none.
        chosen: some were named (``file.py::test``) or deselected (``-k``).
    """
    return not chosen and set(wanted) == set(found)
