"""Who runs the trials: joblib's processes on this machine, or the tasks of a Ray cluster."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

from lwkd.program.errors import require

Engine = Literal["joblib", "ray"]

Job = Callable[[], Any]


def results(jobs: Sequence[Job], engine: Engine, workers: int) -> Iterator[tuple[int, Any]]:
    """Run the jobs; the number of a job and what it returned, in the order in which they end.

    What has not been asked for when the iterator is closed is given up.

    Args:
        jobs: can be pickled.
        engine: ``joblib``: processes here. ``ray``: tasks of the cluster that RAY_ADDRESS names, or of this machine.
        workers: jobs at a time; with Ray, cores of the cluster limit them as well.
    """
    if engine == "ray":
        return _by_ray(jobs, workers)
    return _by_joblib(jobs, workers)


def _by_joblib(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Any]]:
    joblib = require("joblib")
    if workers == 1:
        yield from ((number, job()) for number, job in enumerate(jobs))
        return
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")
    with closing(parallel(joblib.delayed(_numbered)(number, job) for number, job in enumerate(jobs))) as ended:
        yield from ended


def _numbered(number: int, job: Job) -> tuple[int, Any]:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    return number, job()


def _by_ray(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Any]]:
    ray = require("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    task = ray.remote(num_cpus=1)(_numbered)
    waiting = list(enumerate(jobs))[::-1]
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(*waiting.pop()))
            ended, running = ray.wait(running)
            yield from ray.get(ended)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
