"""The picture and the sentences of ``study_growth.py``, from its JSON.

    python benchmarks/growth_report.py [benchmarks/results/growth-MACHINE.json]

writes the ``.png`` and the ``.md`` beside it anew; every figure in a sentence is computed here from the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kept
from growth_picture import LABELS, draw, fixed, title
from tables import origin_line


def median(point: dict[str, Any], name: str) -> float:
    """Microseconds."""
    return 1e3 * point["milliseconds"][name]["median"]


def slope(points: list[dict[str, Any]], name: str) -> float:
    """Microseconds that one more costs, between the last two sizes."""
    before, last = points[-2:]
    return (median(last, name) - median(before, name)) / (last["size"] - before["size"])


def leaving(points: list[dict[str, Any]]) -> int | None:
    """The first size at which ours takes twice as long as at the smallest one."""
    return next((p["size"] for p in points if median(p, "lwkd") > 2 * median(points[0], "lwkd")), None)


def rate(point: dict[str, Any], name: str = "lwkd") -> float:
    """GB/s of the bytes read once."""
    return point["bytes"] / median(point, name) / 1e3


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The table: a row a series."""
    for panel in found["panels"]:
        for memory, points in panel["series"].items():
            first, last, left = points[0], points[-1], leaving(points)
            yield [
                title(panel) + ("" if memory == "contiguous" else f", {memory}"),
                f"{median(first, 'lwkd'):.3g} µs at {first['size']:,}",
                f"{median(first, 'lwkd') / median(first, 'nothing'):.1f} x",
                "never" if left is None else f"{left:,}",
                f"{median(last, 'lwkd') / 1e3:.3g} ms at {last['size']:,}",
                f"{100 * median(last, 'read') / median(last, 'lwkd'):.0f} %",
                f"{rate(last):.1f} GB/s",
                f"{median(last, 'eager') / median(last, 'lwkd'):.1f} x",
            ]


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """What limits each op where, with its figures."""
    parts = {name: 1e3 * quartiles["median"] for name, quartiles in found["smallest call"].items()}
    yield (
        f"**The smallest call: dispatch.** Attention divergence of one layer with four positions takes "
        f"{parts['public']:.1f} µs. {parts['below autograd']:.1f} of them are the kernel and torch's way to it "
        f"({parts['nothing']:.1f} for a call that does nothing), {parts['op'] - parts['below autograd']:.1f} the "
        f"autograd function around it, which is Python, and {parts['public'] - parts['op']:.1f} the checks of the "
        "public function."
    )
    panels = {(panel["op"], panel["axis"]): panel["series"] for panel in found["panels"]}
    for op, what in (("attention_divergence", "Attention divergence"), ("attention_maps", "Maps with tangents")):
        layers = panels[op, "layers"]["contiguous"]
        kib = layers[0]["bytes"] / 2**10
        yield (
            f"**{what}, layers: dispatch, then work a layer.** One small layer ({kib:.3g} KiB) takes "
            f"{median(layers[0], 'lwkd'):.1f} µs, of which a call that does nothing would take "
            f"{median(layers[0], 'nothing'):.1f}. Each further one adds {slope(layers, 'lwkd'):.2f} µs at the large "
            f"end, where plain PyTorch adds {slope(layers, 'eager'):.0f}, handing over two more tensors "
            f"{slope(layers, 'nothing'):.2f} and reading them {slope(layers, 'read'):.2f}."
        )
        yield _channels(what, panels[op, "channels"], median(layers[0], "lwkd"))
        side = panels[op, "side"]["contiguous"]
        yield (
            f"**{what}, map size: {'memory bandwidth' if _share(side[-1]) > 0.75 else 'work a map position'}.** At "
            f"{side[-1]['size']} by {side[-1]['size']} positions and 16 channels, a position of a sample costs "
            f"{_position(side[-1], 'lwkd'):.2f} ns; reading its channels costs {_position(side[-1], 'read'):.2f} ns, "
            f"{100 * _share(side[-1]):.0f} % of that."
        )
        yield _cache(what, panels[op, "batch"]["contiguous"], found["last_level_cache"])
    traces, elements = (panels["hutchinson_trace", axis]["contiguous"] for axis in ("layers", "elements"))
    yield (
        f"**Traces, tensors: dispatch, then work a tensor.** One takes {median(traces[0], 'lwkd'):.1f} µs "
        f"(nothing: {median(traces[0], 'nothing'):.1f}); a further one of {traces[0]['bytes'] / 2**10:.3g} KiB adds "
        f"{slope(traces, 'lwkd'):.2f} µs at the large end (plain PyTorch, with the signs at hand: "
        f"{slope(traces, 'eager'):.2f}; reading it: {slope(traces, 'read'):.2f}; handing two over: "
        f"{slope(traces, 'nothing'):.2f})."
    )
    yield _cache("Traces", elements, found["last_level_cache"])
    yield from _memory(found)


def _share(point: dict[str, Any]) -> float:
    return median(point, "read") / median(point, "lwkd")


def _position(point: dict[str, Any], name: str) -> float:
    return 1e3 * median(point, name) / point["positions"]


def _channels(what: str, series: dict[str, list[dict[str, Any]]], smallest: float) -> str:
    def beyond(point: dict[str, Any]) -> float:
        return 1e3 * (median(point, "lwkd") - smallest) / point["positions"]

    parts = [
        f"{memory}, {points[0]['size']} channels take {beyond(points[0]):.1f} ns a position of a sample beyond the "
        f"{smallest:.0f} µs of the smallest call (reading them: {_position(points[0], 'read'):.1f}), and "
        f"{points[-1]['size']:,} take {beyond(points[-1]):.0f} (reading: {_position(points[-1], 'read'):.0f}; "
        f"{100 * _share(points[-1]):.0f} % of the call)"
        for memory, points in series.items()
    ]
    return (
        f"**{what}, channels: dispatch and work a map position where they are few, bytes where they are many.** What "
        f"is done once a position, whatever the channels (logarithms, divisions), is the flat part on the left: "
        f"{'; '.join(parts)}."
    )


def _cache(what: str, points: list[dict[str, Any]], cache: int | None) -> str:
    inside = [point for point in points if cache and point["bytes"] <= cache]
    best, last = max(inside or points, key=rate), points[-1]
    held = f"a last-level cache of {cache / 2**20:.0f} MiB" if cache else "the cache (whose size is not known)"
    return (
        f"**{what}, bytes: {'the last-level cache, then ' if rate(best) > 1.15 * rate(last) else ''}"
        f"{'memory bandwidth' if _share(last) > 0.75 else 'arithmetic'}.** Within {held} ours reads at most "
        f"{rate(best):.1f} GB/s (at {best['bytes'] / 2**20:.3g} MiB; reading alone {rate(best, 'read'):.1f}), and "
        f"{rate(last):.1f} at {last['bytes'] / 2**20:.0f} MiB (reading alone {rate(last, 'read'):.1f})."
    )


def _memory(found: dict[str, Any]) -> Iterator[str]:
    for panel in found["memory of the op"]:
        size, inputs = panel["series"]["inputs"][-1]
        shares = [
            f"{name} {points[-1][1] / inputs:.2g}" for name, points in panel["series"].items() if name != "inputs"
        ]
        yield (
            f"**Memory of attention divergence against {LABELS[panel['axis']]}.** At {size:,}, beyond the inputs and "
            f"in multiples of them: {', '.join(shares)}. The gradients themselves are 0.5."
        )
    for panel in found["memory of a measurement"]:
        steps = panel["series"]["step bytes"]
        shares = [
            f"{name}: {points[0][1]:.2f} at {points[0][0]} and {points[-1][1]:.2f} at {points[-1][0]}"
            for name, points in panel["series"].items()
            if name != "step bytes"
        ]
        yield (
            f"**Memory of a measurement against {LABELS[panel['axis']]}** ({fixed(panel)}, every ReLU paired). In "
            f"peaks of a training step, which is {steps[0][1] / 2**20:.0f} MiB at {steps[0][0]} and "
            f"{steps[-1][1] / 2**20:.0f} MiB at {steps[-1][0]}: {'; '.join(shares)}."
        )


def document(found: dict[str, Any], picture: str) -> str:
    """What stands beside the picture."""
    head = ["", "smallest", "over nothing", "twice that at", "largest", "of it reading", "bytes", "plain PyTorch"]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows(found))]
    return "\n\n".join(
        [
            f"# How cost grows\n\n![cost against size]({picture})",
            *sentences(found),
            "\n".join(lines),
            "Medians of calls in turns. *Over nothing*: times as long as a call that takes the same lists and does "
            "nothing. *Of it reading*: the time to read the same bytes once, as a share of ours.",
            f"{origin_line(found)}\n",
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
    parser.add_argument("path", type=Path, nargs="?", default=kept.folder() / f"growth-{kept.machine()}.json")
    for written in write(parser.parse_args().path):
        print(f"written to {written}")


if __name__ == "__main__":
    main()
