"""The benchmarks of ``make gpu``, dry: on the CPU, at tiny sizes, with everything but the CUDA calls."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from python_runs import python

DRY = ("--device", "cpu", "--small")


def _run(*words: str) -> str:
    done = python(*words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_measuring_and_reporting(tmp_path: Path) -> None:
    """Stage by stage as ``make gpu`` does, without the build and the tests, whose turn it is now."""
    pytest.importorskip("triton")
    wanted = ("--stages", "images,baselines,ops,steps", "--out", str(tmp_path), "--budget", "280")
    said = _run("-m", "benchmarks.gpu.run", *DRY, *wanted)
    ops, steps, stages = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ops", "overhead", "stages"))
    assert [stage["result"] for stage in stages["stages"]] == ["passed"] * 4
    for result in (ops, steps):
        assert {"machine", "versions", "commit", "command"} <= result.keys()
        assert result["not_reached"] == []
    cases = ops["cases"].values()
    assert {case["op"] for case in cases} >= {"divergence", "divergence backward", "rademacher", "rate update"}
    for case in cases:
        assert "error" not in case, case
        assert {"lwkd", "eager", "torch.compile"} <= case["implementations"].keys()
        assert all("error" not in implementation for implementation in case["implementations"].values()), case
    for pair in steps["pairs"].values():
        assert set(pair["overhead"]) == {"attention", "jacobian", "jacobian in TF32", "hessian", "bare again"}
        assert pair["failed"] == {}
    files = [path.name for path in tmp_path.iterdir()]
    assert sorted(files) == [
        "bandwidth.png",
        "log.txt",
        "ops.json",
        "overhead.json",
        "overhead.png",
        "stages.json",
        "summary.md",
    ]
    assert "| resnet18→resnet10" not in said
    assert "cnn_8→cnn_4" in said
    assert said.index("## Ops") < said.index("## Training steps") < said.index("## Stages")


def _stage(name: str, code: str) -> object:
    from benchmarks.gpu.stages import Stage

    return Stage(name, [sys.executable, "-c", code], {"WHO": name})


def test_what_a_machine_lacks_is_named_before_anything_is_built(monkeypatch, tmp_path):
    from benchmarks.gpu import run

    pytest.importorskip("triton")
    assert run.missing() == []
    monkeypatch.setattr(run, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"make gpu needs the Python package no_such_package, a C\+\+ compiler"):
        run.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_or_hangs_keeps_no_other_from_running(tmp_path: Path, monkeypatch) -> None:
    from benchmarks.gpu import stages

    monkeypatch.setattr(stages, "GRACE", 1.0)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    phases = [
        (8.0, [_stage("fails", "raise SystemExit('because')")]),
        (5.0, [_stage("hangs", child), _stage("beside", "import os; print(os.environ['WHO'])")]),
        (8.0, [_stage("stubborn", stubborn)]),
        (20.0, [_stage("last", "print('reached')")]),
    ]
    said: list[str] = []
    begin = time.monotonic()
    outcomes = stages.execute(phases, tmp_path, tmp_path / "log.txt", said.append)
    assert time.monotonic() - begin < 20
    assert {o.name: o.result for o in outcomes} == {
        "fails": "failed",
        "hangs": "out of time",
        "beside": "passed",
        "stubborn": "out of time",
        "last": "passed",
    }
    assert "because" in "\n".join(said)
    log = (tmp_path / "log.txt").read_text()
    assert "beside" in log
    assert "reached" in log
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_verdicts() -> None:
    from benchmarks.gpu.report import verdict

    def case(ours: float, eager: float, compiled: float, size: float, **more: object) -> dict[str, object]:
        times = {"lwkd": ours, "eager": eager, "torch.compile": compiled}
        implementations = {
            name: {
                f"{kind}_{what}": {"median": value}
                for kind in ("latency", "on_device")
                for what, value in (("microseconds", t), ("ratio", t / ours))
            }
            | {"host_microseconds": {"median": ours}, "kernels": 2, "copies": 0}
            for name, t in times.items()
        }
        return {"op": "divergence", "layers": 4, "bytes": size, "implementations": implementations, **more}

    copied = 3000.0
    assert verdict(case(100, 400, 120, 300e6), copied) == []
    assert len(verdict(case(100, 250, 90, 300e6), copied)) == 4
    assert verdict(case(100, 400, 120, 200e6), copied) == ["67% of the copy bandwidth (target 85%)"]
    assert verdict(case(30, 100, 40, 1e6, op="launch", layers=16), copied) == ["30.0 µs on the host (target 20)"]
    assert verdict({"error": "wrong"}, copied) == ["wrong"]


def test_a_summary_of_what_little_there_is(tmp_path: Path) -> None:
    from benchmarks.gpu.report import summary

    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase classname="a" name="b"><failure message="off by one"/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "ops.json").write_text("{ cut off")
    text = summary(tmp_path)
    assert "Not measured." in text
    assert "- a.b: off by one" in text


def test_an_implementation_that_raises_takes_no_other_along() -> None:
    import torch

    from benchmarks.gpu.timing import compare

    def broken() -> None:
        raise RuntimeError("out of registers")

    found = compare({"broken": broken, "lwkd": lambda: None, "eager": lambda: None}, torch.device("cpu"), rounds=6)
    assert found["rounds"] == 6
    assert found["implementations"]["broken"] == {"error": "RuntimeError: out of registers"}
    assert {"latency_ratio", "on_device_ratio", "host_microseconds"} <= found["implementations"]["eager"].keys()
    with pytest.raises(RuntimeError, match="out of registers"):
        compare({"lwkd": broken}, torch.device("cpu"))


def test_a_signal_that_raises_takes_no_other_of_its_pair_along(tmp_path: Path, monkeypatch) -> None:
    import torch

    from benchmarks.gpu import pictures, report, steps

    def step_of(pair: object, name: object, nets: object, inputs: object) -> object:
        calls = iter(range(100))

        def step() -> None:
            if name == "jacobian" and next(calls) > 1:
                raise RuntimeError("97 % off")

        if name == "hessian":
            raise RuntimeError("no pairing")
        return step

    for name, value in {"BLOCK": 1, "EARLY": 1, "FEWEST": 2, "MOST": 2, "made": lambda *_: None}.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "batch_of", lambda *_: None)
    monkeypatch.setattr(steps, "step_of", step_of)
    monkeypatch.setattr(steps, "SIGNALS", {name: name for name in ("attention", "jacobian", "hessian")})
    found = steps.profile(object(), torch.device("cpu"), 1.0)
    assert found["failed"] == {"jacobian": "RuntimeError: 97 % off", "hessian": "RuntimeError: no pairing"}
    assert set(found["overhead"]) == {"attention", "bare again"}
    assert found["rounds"] == 2
    result = {
        "targets": steps.TARGETS,
        "signals": ["attention", "jacobian", "hessian"],
        "default_intervals": {"attention": 1, "jacobian": 200, "hessian": 125},
        "not_reached": [],
        "pairs": {"a pair": found},
        "groups": {"error": "RuntimeError: none"},
    }
    said = report._steps(result)
    assert "hessian failed: RuntimeError: no pairing; jacobian failed: RuntimeError: 97 % off" in said
    assert "Groups: **failed**: RuntimeError: none" in said
    monkeypatch.setattr(pictures, "caption", lambda _: "")
    pictures.overhead(result, tmp_path / "overhead.png")
    monkeypatch.setattr(steps, "step_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.profile(object(), torch.device("cpu"), 1.0)
