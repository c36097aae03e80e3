"""Every docstring example and every README example runs, and prints what stands there."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import lwkd

ROOT = Path(__file__).parent.parent
MODULES = sorted(["lwkd", *(module.name for module in pkgutil.walk_packages(lwkd.__path__, "lwkd."))])
EXAMPLES = re.findall(r"```python\n(.*?)```\n+(?:```text\n(.*?)```)?", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith(("._C", "__main__")) and "kernels" not in m])
def test_docstring_examples(name: str) -> None:
    if name.startswith("lwkd.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


def test_readme_has_examples() -> None:
    assert any(printed for _, printed in EXAMPLES)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_readme_example(index: int) -> None:
    code, expected = EXAMPLES[index]
    if "torchvision" in code:
        pytest.importorskip("torchvision")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README.md, example {index + 1}", "exec"), {"__name__": "readme"})
    if expected:
        assert printed.getvalue().split() == expected.split()


def test_guarantees_name_tests_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", (ROOT / "docs/guarantees.md").read_text(), re.MULTILINE)
    assert len(rows) >= 36
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, row in rows:
        parts = re.split(r"\[[^\]]+\]\(\.\./(tests/[^)]+)\)", row)
        named = [
            (file, test)
            for file, text in zip(parts[1::2], parts[2::2], strict=True)
            for test in re.findall(r"`(test_\w+)`", text)
        ]
        assert named or f"as {int(number) - 1}" in row, f"line {number} names no test"
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"line {number}: no {test} in {file}"


DIFFERENCE = re.compile(r"[+-]\d+\.\d\d ± \d+\.\d\d")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_differences_between_arms_stand_in_a_report(page: str) -> None:
    reports = "".join(path.read_text() for path in (ROOT / "benchmarks/results/compare").glob("*/report.md"))
    shown = DIFFERENCE.findall((ROOT / page).read_text())
    assert shown
    assert set(shown) <= set(DIFFERENCE.findall(reports))
