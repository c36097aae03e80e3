"""What runs the trials: processes here, or Ray's tasks where it is installed."""

from __future__ import annotations

import importlib.util
import os
import time
from functools import partial
from pathlib import Path

import pytest

from lwkd.program.compare.engines import Engine, results
from lwkd.program.errors import ProgramError

RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install ray")
ENGINES = ["joblib", pytest.param("ray", marks=RAY)]


def job(folder: Path, number: int, seconds: float = 0.0) -> tuple[int, int]:
    time.sleep(seconds)
    (folder / str(number)).touch()
    return number**2, os.getpid()


def failing() -> None:
    raise ValueError("of a trial")


@pytest.mark.parametrize("engine", ENGINES)
def test_results_come_as_they_end_with_the_number_of_their_job(engine: Engine, tmp_path: Path) -> None:
    found = dict(results([partial(job, tmp_path, number) for number in range(7)], engine, workers=2))
    assert {number: value for number, (value, _) in found.items()} == {n: n**2 for n in range(7)}
    assert os.getpid() not in {process for _, process in found.values()}
    slow_first = [partial(job, tmp_path, 0, 20.0), *(partial(job, tmp_path, number) for number in range(1, 4))]
    ended = results(slow_first, engine, workers=2)
    assert [next(ended)[0] for _ in range(3)] == [1, 2, 3]
    ended.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_not_asked_for_is_given_up(engine: Engine, tmp_path: Path) -> None:
    ended = results([partial(job, tmp_path, number, 0.2) for number in range(40)], engine, workers=2)
    next(ended)
    ended.close()  # type: ignore[attr-defined]
    there = len(list(tmp_path.iterdir()))
    time.sleep(1.5)
    assert len(list(tmp_path.iterdir())) <= there + 4
    assert there < 20


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_that_fails_ends_the_grid_with_its_error(engine: Engine) -> None:
    with pytest.raises(ValueError, match="of a trial"):
        list(results([failing, failing], engine, workers=2))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_said() -> None:
    with pytest.raises(ProgramError, match=r"(?s)ray cannot be imported.*pip install ray$"):
        list(results([failing], "ray", workers=2))
