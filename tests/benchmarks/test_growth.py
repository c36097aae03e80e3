"""The study of growth, small: it measures every panel, and what it writes can be read."""

from __future__ import annotations

import json

from python_runs import python


def test_small_run(tmp_path) -> None:
    done = python("-m", "benchmarks.studies.growth", "--small", "--rounds", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(paths) == {".json", ".md", ".png"}
    found = json.loads(paths[".json"].read_text())
    assert {"machine", "versions", "commit", "command", "rounds", "threads"} <= found.keys()
    panels = {(panel["op"], panel["axis"]): panel["series"] for panel in found["panels"]}
    assert len(panels) == 10
    assert set(panels["attention_maps", "channels"]) == {"contiguous", "channels last"}
    for series in panels.values():
        for point in series["contiguous"]:
            assert {"lwkd", "eager", "read", "noop"} == point["milliseconds"].keys()
    text = paths[".md"].read_text()
    assert "nan" not in text
    assert found["commit"] in text
    assert f"({paths['.png'].name})" in text


def test_peaks_of_memory() -> None:
    import torch

    from benchmarks.studies.growth import peak

    def call() -> torch.Tensor:
        kept = torch.empty(1000)
        torch.empty(5000)  # freed at once
        torch.empty(2000)
        return kept

    assert [peak(call) for _ in range(3)] == [4 * 6000] * 3
