"""The README shows the figures that are kept, and no others."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/readme.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme as module

    yield module
    del sys.modules["readme"]


def test_the_readme_is_what_the_kept_figures_make_it(readme: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    found = readme.profiles(readme.RESULTS)
    assert found
    assert readme.replaced(text, found) == text, "run: python benchmarks/readme.py"


def test_a_gpu_has_a_table_of_its_own(readme: ModuleType, tmp_path: Path) -> None:
    cpu = readme.profiles(readme.RESULTS)[0]
    found = copy.deepcopy(cpu.found)
    found["device"] = {"type": "cuda", "name": "A GPU"}
    both = readme.table([cpu, readme.Profile(tmp_path / "profile-gpu.json", found)])
    assert "first figures of an NVIDIA H200" in readme.table([cpu])
    assert "first figures of an NVIDIA H200" not in both
    assert both.count("| teacher→student |") == 2
    assert "A GPU; python" in both


def test_a_readme_without_marks_is_an_error(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        readme.replaced("# a page", [])


def test_the_picture(readme: ModuleType, tmp_path: Path) -> None:
    readme.draw(readme.profiles(readme.RESULTS), tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 10_000
