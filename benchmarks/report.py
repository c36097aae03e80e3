"""Where results are kept, and the tables that show them: ``results/MACHINE.md`` beside ``results/MACHINE.json``.

`make gpu` writes tables before lwkd is built, and where it could not be: nothing here imports lwkd at the top.

``results/MACHINE.json`` is ``{stem: {machine, versions, commit, command, cases: {case: {implementation: figures}}}}``.
A stem, which is a file of ``benchmarks/ops``, is written whole or not at all: its cases are from one run of one commit.

    python -m benchmarks.report

writes the tables of every machine anew; ``make bench`` writes this machine's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HEAD = """\
Milliseconds of lwkd, and how many times as long the others took in the same round: median (first to third quartile).
Below 1 they are faster. Implementations take turns, round by round. `make bench` repeats it, `make bench-check`
compares.
"""


def folder() -> Path:
    """Where results are kept: ``benchmarks/results``, or what ``LWKD_BENCHMARK_RESULTS`` names."""
    return Path(os.environ.get("LWKD_BENCHMARK_RESULTS", HERE / "results"))


def machine() -> str:
    """This machine's name, as files carry it.

    >>> re.fullmatch("[a-z0-9-]+-cores", machine()) is not None
    True
    """
    from lwkd.program.provenance import processor

    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {os.cpu_count()} cores".lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """A file of results; nothing where it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of results, which appears whole or not at all: a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(aside, path)


def keep(study: str, **found: Any) -> Path:
    """Write what a study found to ``STUDY.json``, with its origin; returns the file."""
    from lwkd.program.provenance import origin

    path = folder() / f"{study}.json"
    write(path, {**origin(), **found})
    return path


def of_all_machines(results: Path) -> dict[str, dict[str, Any]]:
    """The stems of every machine in the folder, by the machine's name; other results lie beside them."""
    found = {path.stem: read(path) for path in sorted(results.glob("*-cores.json"))}
    return {name: stems for name, stems in found.items() if stems and all(_is_stem(stem) for stem in stems.values())}


def _is_stem(of: Any) -> bool:
    return isinstance(of, dict) and {"cases", "commit"} <= of.keys()


def is_whole(wanted: Collection[str], found: Collection[str], chosen: bool) -> bool:
    """Whether a stem ran whole: every case of its file has figures, and none had been left out by choice.

    Args:
        wanted: cases that pytest was to run.
        found: those that have figures; a failed one has none.
        chosen: some were named (``file.py::test``) or deselected (``-k``).
    """
    return not chosen and set(wanted) == set(found)


def markdown(rows: Iterable[Sequence[str]], right: bool = False) -> str:
    """A Markdown table; the first row is its head.

    Args:
        rows: of cells.
        right: whether all columns but the first are aligned to the right.

    >>> print(markdown([["op", "ms"], ["traces", "3"]], right=True))
    | op | ms |
    | --- | ---: |
    | traces | 3 |
    """
    head, *rest = rows
    rule = ["---"] + ["---:" if right else "---"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rest))


def spread(values: Mapping[str, float], unit: str = "", scale: float = 1.0) -> str:
    """Median and quartiles in three digits.

    >>> spread({"median": 13.26, "low": 12.63, "high": 13.5}, "x")
    '13.3 x (12.6 to 13.5)'
    """
    median, low, high = (three_digits(scale * values[name]) for name in ("median", "low", "high"))
    return f"{median}{unit and ' '}{unit} ({low} to {high})"


def three_digits(value: float) -> str:
    """Without an exponent.

    >>> three_digits(0.00123456), three_digits(4091.0), three_digits(1.0)
    ('0.00123', '4091', '1.00')
    """
    if abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:#.3g}"
    return (f"{value:.6f}".rstrip("0") if "e" in text else text).rstrip(".")


def by_function(cases: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Test function → its parameters → implementations.

    >>> by_function({"test_forward[a-b]": 1, "test_forward[c]": 2, "test_alone": 3})
    {'forward': {'a-b': 1, 'c': 2}, 'alone': {'': 3}}
    """
    grouped: dict[str, dict[str, Any]] = {}
    for case, implementations in cases.items():
        function, _, parameters = case.removesuffix("]").partition("[")
        grouped.setdefault(function.removeprefix("test_"), {})[parameters] = implementations
    return grouped


def tables(cases: Mapping[str, Any]) -> list[str]:
    """One table a test function: a row a case, a column an implementation."""
    found = []
    for function, of in by_function(cases).items():
        others = list(dict.fromkeys(name for case in of.values() for name in case if name != "lwkd"))
        rows = [[function.replace("_", " "), "lwkd", *others]]
        for parameters, case in of.items():
            ratios = [spread(case[name]["ratio_to_lwkd"], "x") if name in case else "" for name in others]
            rows.append([parameters.replace("-", " "), spread(case["lwkd"]["milliseconds"], "ms"), *ratios])
        found.append(markdown(rows, right=True))
    return found


def origin_line(stem: Mapping[str, Any]) -> str:
    """Where the figures of a stem come from, in one paragraph."""
    machine, versions = stem["machine"], stem["versions"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, {stem['threads']} threads, "
        f"{stem['rounds']} rounds, load {stem['load_average_at_the_end']:.1f} at the end; python {versions['python']}, "
        f"torch {versions['torch']}; {versions['backend']}; commit {stem['commit']}; `{stem['command']}`"
    )


def document(stems: Mapping[str, Any], name: str) -> str:
    """All stems of a machine."""
    parts = [f"# Benchmarks: {name}\n\n{HEAD}"]
    for stem, found in sorted(stems.items()):
        parts += [f"## {stem}\n", *(f"{text}\n" for text in tables(found["cases"])), f"{origin_line(found)}\n"]
    return "\n".join(parts)


def write_tables(results: Path, name: str) -> Path:
    """Write a machine's tables from its JSON."""
    path = results / f"{name}.md"
    path.write_text(document(of_all_machines(results)[name], name))
    return path


def main() -> None:
    results = folder()
    names = list(of_all_machines(results))
    if not names:
        raise SystemExit(f"no results of a machine (*-cores.json) in {results}; `make bench` writes them")
    for name in names:
        print(f"written to {write_tables(results, name)}")


if __name__ == "__main__":
    main()
