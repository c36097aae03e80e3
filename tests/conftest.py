"""What all tests share: one thread, which tests are for this process, and the fixture ``backend``.

One thread: the shapes are tiny, and threads that wait for each other on a busy machine cost more than they bring. Tests
that are about threads set their own number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, DEVICE, INTERPRETED, INTERPRETING, MARKS, SEED, Backend

torch.set_num_threads(1)

TESTS = Path(__file__).parent
READY = DEVICE.type != "cuda" or torch.cuda.is_available()


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
