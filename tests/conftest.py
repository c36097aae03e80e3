"""What all tests share: one thread, which tests are for this process, and the fixture ``backend``.

One thread: the shapes are tiny, and threads that wait for each other on a busy machine cost more than they bring. Tests
that are about threads set their own number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, DEVICE, INTERPRETED, INTERPRETING, MARKS, SEED, Backend

torch.set_num_threads(1)

TESTS = Path(__file__).parent
READY = DEVICE.type != "cuda" or torch.cuda.is_available()


PROGRAM = "matplotlib", "rich", "sklearn", "tensorboard", "typer", "yaml"
NEEDS = {
    "benchmarks": PROGRAM,
    "cuda": ("triton", "torchvision"),
    "interpreted": ("triton",),
    "kernels": ("triton",),
    "pairing/test_pairs.py": ("torchvision",),
    "pairing/test_shares.py": ("torchvision",),
    "program": PROGRAM,
    "program/test_data.py": ("torchvision",),
    "program/test_models.py": ("torchvision", "timm"),
    "signals/test_jacobian_nets.py": ("torchvision",),
}
"""What files and folders of tests cannot do without, beside torch and the tools for tests; without it they skip."""


@cache
def _absent(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError):  # a torchvision made for another torch raises the latter
        return True
    return False


class _Absent(pytest.Module):
    """A file of tests that is not imported, since it would fail."""

    missing: str

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(f"not installed: {self.missing}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """In place of a file that needs what is not there, one that skips and says what that is."""
    needed = [
        m for at, modules in NEEDS.items() if (TESTS / at) in (module_path, *module_path.parents) for m in modules
    ]
    missing = [module for module in needed if _absent(module)]
    if not missing:
        return None
    absent = _Absent.from_parent(parent, path=module_path)
    absent.missing = ", ".join(dict.fromkeys(missing))
    return absent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A process either interprets kernels or does not, and tests of the other kind are not for it."""
    absent = pytest.mark.skip(reason="no CUDA device; `make gpu` runs these tests where there is one")
    chosen, others = [], []
    for item in items:
        for folder in ("interpreted", "cuda"):
            if TESTS / folder in item.path.parents:
                item.add_marker(MARKS[folder])
        if not READY and item.get_closest_marker("cuda"):
            item.add_marker(absent)
        (chosen if (item.get_closest_marker("interpreted") is not None) == INTERPRETING else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seed, to repeat a failure with."""
    if READY and not INTERPRETING:
        terminalreporter.write_line(f"random inputs of tests on a GPU: LWKD_TEST_SEED={SEED}")


@pytest.fixture(params=[pytest.param(name, marks=mark) for name, mark in MARKS.items()])
def backend(request: pytest.FixtureRequest, poisoned: None) -> Iterator[Backend]:
    """Each of the three, one after the other: ``lwkd.ops`` called with what its ``given`` returns computes there."""
    chosen = BACKENDS[request.param]
    if chosen is not INTERPRETED:
        yield chosen
        return
    from standin import OPS, as_on_cuda

    request.getfixturevalue("driver")
    with as_on_cuda(*OPS):
        yield chosen


@pytest.fixture(scope="session")
def _driver(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("triton")
    from standin import Driver, patch_language_once  # it imports Triton, which most tests do without

    patch_language_once()
    return Driver(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def driver(_driver):
    """The stand-in for the driver; launches are interpreted, and what goes wrong in one fails the test."""
    _driver.clear()
    _driver.interpreting(True)
    yield _driver
    assert not _driver.problems, _driver.problems[0]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, which is one again after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (whole numbers: their largest), in PyTorch and in C++, so that what nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
