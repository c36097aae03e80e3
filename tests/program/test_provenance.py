"""What stands beside every figure: the commit, the command, the machine."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lwkd.program import provenance


@pytest.fixture
def git(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers of programs that are run, by their first or second word; an exception is raised."""
    answers: dict[str, Any] = {}

    def run(words: list[str], **_: Any) -> Any:
        answer = answers[words[1] if words[0] == "git" else words[0]]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("LWKD_COMMIT", raising=False)
    return answers


def test_the_commit_and_whether_code_differs_from_it(git: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    git |= {"ls-files": "__init__.py\n", "status": "", "rev-parse": "0123abc\n"}
    assert provenance.commit() == "0123abc"
    git["status"] = " M lwkd/losses.py\n"
    assert provenance.commit() == "0123abc with changes"
    git["ls-files"] = ""
    assert provenance.commit().endswith("not a git checkout")
    git["ls-files"] = FileNotFoundError("git")
    assert provenance.commit().endswith("git is not installed, and LWKD_COMMIT is not set")
    monkeypatch.setenv("LWKD_COMMIT", "4567def")
    assert provenance.commit() == "4567def"


@pytest.mark.parametrize(
    ("module", "script", "expected"),
    [
        ("benchmarks.growth", "/x/growth.py", "python -m benchmarks.growth --out 'a b'"),
        ("lwkd.program.__main__", "/x/__main__.py", "python -m lwkd.program --out 'a b'"),
        (None, "/home/me/benchmarks/readme.py", "python benchmarks/readme.py --out 'a b'"),
        (None, "/usr/bin/lwkd", "lwkd --out 'a b'"),
    ],
)
def test_the_command_as_it_is_from_the_root(
    module: str | None, script: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--out", "a b"])
    assert provenance.command() == expected


def test_a_gpu_and_its_driver(git: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="G", major=9, minor=0, multi_processor_count=132, total_memory=8, L2_cache_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    git["nvidia-smi"] = "580.1\n580.1\n"
    shown = provenance.accelerator(torch.device("cuda"))
    assert (shown["name"], shown["capability"], shown["driver"]) == ("G", "9.0", "580.1")
    git["nvidia-smi"] = ""
    assert provenance.accelerator(torch.device("cuda"))["driver"] == "unknown"
    git["nvidia-smi"] = FileNotFoundError("nvidia-smi")
    assert provenance.accelerator(torch.device("cuda"))["driver"] == "unknown"
    assert provenance.accelerator(torch.device("cpu")) == {"name": "none, a dry run"}


def test_no_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert provenance._triton_version() == "none"
