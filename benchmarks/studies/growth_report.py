"""The picture and the tables of ``growth.py``, from its JSON.

    python -m benchmarks.studies.growth_report [benchmarks/results/growth-MACHINE.json]

writes the ``.png`` and the ``.md`` beside it anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.studies.growth_picture import LABELS, draw, fixed, title


def median(point: dict[str, Any], name: str) -> float:
    """Microseconds."""
    return 1e3 * point["milliseconds"][name]["median"]


def one_more(points: list[dict[str, Any]], name: str) -> str:
    """Microseconds that one more costs, between the last two sizes."""
    before, last = points[-2:]
    return f"{(median(last, name) - median(before, name)) / (last['size'] - before['size']):.3g}"


def leaving(points: list[dict[str, Any]]) -> int | None:
    """The first size at which ours takes twice as long as at the smallest one."""
    return next((p["size"] for p in points if median(p, "lwkd") > 2 * median(points[0], "lwkd")), None)


def rate(point: dict[str, Any]) -> float:
    """GB/s of the bytes read once."""
    return point["bytes"] / median(point, "lwkd") / 1e3


def position(point: dict[str, Any], name: str) -> str:
    """Nanoseconds a map position of a sample; traces have none."""
    return f"{1e3 * median(point, name) / point['positions']:.3g}" if "positions" in point else ""


def calls(found: dict[str, Any]) -> Iterator[list[str]]:
    """A row a series: how its calls grow."""
    yield ["", "smallest", "over noop", "twice that at", "largest", "of it reading", "bytes", "plain PyTorch"]
    for name, points in _series(found):
        first, last, left = points[0], points[-1], leaving(points)
        yield [
            name,
            f"{median(first, 'lwkd'):.3g} µs at {first['size']:,}",
            f"{median(first, 'lwkd') / median(first, 'noop'):.1f} x",
            "never" if left is None else f"{left:,}",
            f"{median(last, 'lwkd') / 1e3:.3g} ms at {last['size']:,}",
            f"{100 * median(last, 'read') / median(last, 'lwkd'):.0f} %",
            f"{rate(last):.1f} GB/s",
            f"{median(last, 'eager') / median(last, 'lwkd'):.1f} x",
        ]


def limits(found: dict[str, Any]) -> Iterator[list[str]]:
    """A row a series: what one more costs, what a map position costs, and the most bytes a second within the cache."""
    names = {"lwkd": "lwkd", "eager": "plain PyTorch", "noop": "no-op", "read": "reading"}
    some_positions = [f"ns a position, {ends}" for ends in ("smallest", "largest", "largest, reading")]
    yield ["", *(f"one more, µs: {shown}" for shown in names.values()), *some_positions, "most bytes in the cache"]
    cache = found["last_level_cache"]
    for name, points in _series(found):
        best = max([point for point in points if cache and point["bytes"] <= cache] or points, key=rate)
        yield [
            name,
            *(one_more(points, each) for each in names),
            position(points[0], "lwkd"),
            position(points[-1], "lwkd"),
            position(points[-1], "read"),
            f"{rate(best):.1f} GB/s at {best['bytes'] / 2**20:.3g} MiB",
        ]


def _series(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for panel in found["panels"]:
        for memory, points in panel["series"].items():
            yield title(panel) + ("" if memory == "contiguous" else f", {memory}"), points


def smallest(found: dict[str, Any]) -> Iterator[list[str]]:
    """What the smallest call consists of: each row has more around it than the one before."""
    names = {
        "noop": "a call that does nothing",
        "below autograd": "the kernel and torch's way to it",
        "op": "with the autograd function around it",
        "public": "with the checks of the public function",
    }
    yield ["attention divergence, one layer, four positions", "µs"]
    for name, shown in names.items():
        yield [shown, f"{1e3 * found['smallest call'][name]['median']:.1f}"]


def memory_of_the_op(found: dict[str, Any]) -> Iterator[list[str]]:
    """At the largest size, beyond the inputs and in multiples of them."""
    names = [name for name in found["memory of the op"][0]["series"] if name != "inputs"]
    yield ["attention divergence", *names]
    for panel in found["memory of the op"]:
        size, inputs = panel["series"]["inputs"][-1]
        shares = [f"{panel['series'][name][-1][1] / inputs:.2g}" for name in names]
        yield [f"{size:,} {LABELS[panel['axis']]}", *shares]


def memory_of_a_measurement(found: dict[str, Any]) -> Iterator[list[str]]:
    """Peaks of a training step, and of measurements in multiples of it, at the smallest and the largest size."""
    names = [name for name in found["memory of a measurement"][0]["series"] if name != "step bytes"]
    yield ["net", "training step", *names]
    for panel in found["memory of a measurement"]:
        for end in (0, -1):
            size, step = panel["series"]["step bytes"][end]
            shares = [f"{panel['series'][name][end][1]:.2f}" for name in names]
            yield [f"{LABELS[panel['axis']]} {size} ({fixed(panel)})", f"{step / 2**20:.0f} MiB", *shares]


def document(found: dict[str, Any], picture: str) -> str:
    """What stands beside the picture."""
    cache = found["last_level_cache"]
    return "\n\n".join(
        [
            f"# How cost grows\n\n![cost against size]({picture})",
            "Medians, in turns. *Over noop*: times as long as a call that takes the same lists and does nothing. "
            "*Of it reading*: the time to read the same bytes once, as a share of ours.",
            report.markdown(calls(found), right=True),
            "*One more*: what one further layer, channel or other unit costs, between the last two sizes. The "
            f"last-level cache holds {'an unknown number of' if cache is None else round(cache / 2**20)} MiB.",
            report.markdown(limits(found), right=True),
            report.markdown(smallest(found), right=True),
            "Memory beyond the inputs, in multiples of them; the gradients themselves are 0.5.",
            report.markdown(memory_of_the_op(found), right=True),
            "Peaks of memory, every ReLU paired; those of measurements in multiples of a training step's.",
            report.markdown(memory_of_a_measurement(found), right=True),
            f"{report.origin_line(found)}\n",
        ]
    )


def write(path: Path) -> list[Path]:
    """Write the picture and the text beside a JSON."""
    found = json.loads(path.read_text())
    picture, text = path.with_suffix(".png"), path.with_suffix(".md")
    draw(found, picture)
    text.write_text(document(found, picture.name))
    return [picture, text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = report.folder() / f"growth-{report.machine()}.json"
    parser.add_argument("path", type=Path, nargs="?", default=default)
    for written in write(parser.parse_args().path):
        print(f"written to {written}")


if __name__ == "__main__":
    main()
