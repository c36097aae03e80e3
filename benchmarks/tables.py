"""Tables of the kept figures, to be read: ``results/MACHINE.md`` beside ``results/MACHINE.json``.

    python benchmarks/tables.py

writes them anew from the JSON of every machine; ``make bench`` writes this machine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kept

HEAD = """\
Milliseconds of lwkd, and how many times as long the others took in the same round: median (first to third quartile).
Below 1 they are faster. Contenders take turns, round by round. `make bench` repeats it, `make bench-check` compares.
"""


def spread(values: Mapping[str, float], unit: str) -> str:
    """Median and quartiles in three digits.

    >>> spread({"median": 13.26, "low": 12.63, "high": 13.5}, "x")
    '13.3 x (12.6 to 13.5)'
    """
    median, low, high = (_three_digits(values[name]) for name in ("median", "low", "high"))
    return f"{median} {unit} ({low} to {high})"


def _three_digits(value: float) -> str:
    """Without an exponent.

    >>> _three_digits(0.00123456), _three_digits(4091.0), _three_digits(1.0)
    ('0.00123', '4091', '1.00')
    """
    if abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:#.3g}"
    return (f"{value:.6f}".rstrip("0") if "e" in text else text).rstrip(".")


def by_function(cases: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Test function → its parameters → contenders.

    >>> by_function({"test_forward[a-b]": 1, "test_forward[c]": 2, "test_alone": 3})
    {'forward': {'a-b': 1, 'c': 2}, 'alone': {'': 3}}
    """
    grouped: dict[str, dict[str, Any]] = {}
    for case, contenders in cases.items():
        function, _, parameters = case.removesuffix("]").partition("[")
        grouped.setdefault(function.removeprefix("test_"), {})[parameters] = contenders
    return grouped


def table(function: str, cases: Mapping[str, Any]) -> str:
    """One test function: a row a case, a column a contender."""
    others = list(dict.fromkeys(name for case in cases.values() for name in case if name != "lwkd"))
    title = function.replace("_", " ")
    rows = [[title, "lwkd", *others], ["---"] + ["---:"] * (1 + len(others))]
    for parameters, case in cases.items():
        ratios = [spread(case[name]["ratio_to_lwkd"], "x") if name in case else "" for name in others]
        rows.append([parameters.replace("-", " "), spread(case["lwkd"]["milliseconds"], "ms"), *ratios])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def lines(cases: Mapping[str, Any]) -> list[str]:
    """A line a case, for the terminal."""
    return [
        f"{name}: "
        + ", ".join(
            f"{who} {spread(figures['milliseconds'], 'ms')}"
            if who == "lwkd"
            else f"{who} {spread(figures['ratio_to_lwkd'], 'x')}"
            for who, figures in case.items()
        )
        for name, case in cases.items()
    ]


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
        tables = [table(function, cases) for function, cases in by_function(found["cases"]).items()]
        parts += [f"## {stem}\n", *(f"{text}\n" for text in tables), f"{origin_line(found)}\n"]
    return "\n".join(parts)


def write(results: Path, name: str) -> Path:
    """Write a machine's tables from its JSON."""
    path = results / f"{name}.md"
    path.write_text(document(kept.of_all_machines(results)[name], name))
    return path


def main() -> None:
    results = kept.folder()
    names = list(kept.of_all_machines(results))
    if not names:
        raise SystemExit(f"no results of a machine (*-cores.json) in {results}; `make bench` writes them")
    for name in names:
        print(f"written to {write(results, name)}")


if __name__ == "__main__":
    main()
