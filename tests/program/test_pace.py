from __future__ import annotations

import io
import time
from itertools import pairwise

import pytest
from rich.console import Console

from lwkd.program.console import UNKNOWN, Screen
from lwkd.program.pace import Pace


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def estimates(updates: int, every: int, slow: float):
    """(seconds left as shown, in truth) after every update; a measured one takes ``slow`` times as long."""
    clock = Clock()
    pace = Pace(clock)
    took = [0.1 * (slow if update % every == 0 else 1) for update in range(updates)]
    for update, seconds in enumerate(took):
        clock.now += seconds
        pace.lap("measured" if update % every == 0 else "plain")
        yield pace.left(updates - update - 1, 0, every), sum(took[update + 1 :])


@pytest.mark.parametrize(("every", "slow"), [(20, 5), (20, 2), (7, 30), (300, 100), (1, 1)])
def test_remaining_time_does_not_jump_with_a_slow_measurement(every, slow):
    # The first update alone says nothing of the plain ones; near the end one update is a large part of what is left.
    found = list(estimates(1000, every, slow))[1:-50]
    for (before, _), (after, _) in pairwise(found):
        assert after == pytest.approx(before, rel=0.1)
    for shown, true in found:
        assert shown == pytest.approx(true, rel=0.1, abs=0.1 * slow)


def test_a_first_update_that_is_slow_for_other_reasons_is_forgotten():
    clock = Clock()
    pace = Pace(clock)
    for update in range(41):
        clock.now += 9.0 if update == 0 else 3.0 if update % 20 == 0 else 1.0
        pace.lap("measured" if update % 20 == 0 else "plain")
    assert pace.left(100, 0, 20) == pytest.approx(100 + 5 * 2)


def test_ends_of_epochs_count_once_each():
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(10, 2, 1) is None
    for _ in range(10):
        clock.now += 1
        pace.lap("plain")
    clock.now += 30
    pace.lap("epoch")
    clock.now += 1
    pace.lap("plain")
    assert pace.left(9, 1, 1) == 9 + 30
    assert pace.left(109, 11, 1) == 109 + 330


def test_pace_follows_a_machine_that_becomes_slower():
    clock = Clock()
    pace = Pace(clock)
    for update in range(300):
        clock.now += 1 if update < 200 else 3
        pace.lap("plain")
    assert pace.left(10, 0, 1) == 30


def test_bar_shows_the_estimate_and_refreshes_while_an_update_lasts(monkeypatch):
    screen, shown = Screen(), io.StringIO()
    screen.out = Console(file=shown, force_terminal=True, width=100)
    with screen.progress("student", epochs=2, batches=50) as bar:
        assert bar._bar.tasks[0].fields["left"] == UNKNOWN
        clock = Clock()
        bar._pace = Pace(clock)
        for batch in range(1, 51):
            clock.now += 10.0 if batch % 20 == 1 else 2.0
            bar.move(0, batch, every=20, measured=batch % 20 == 1)
        clock.now += 60
        bar.epoch_done()
        clock.now += 2
        bar.move(1, 1, every=20)
        assert bar._bar.tasks[0].fields["left"] == "0:02:58"  # 49 · 2 + 49 / 20 · 8, and 60 for the test
        before = len(shown.getvalue())
        time.sleep(0.5)  # an update that takes long
        assert len(shown.getvalue()) > before
        assert "0:02:58" in shown.getvalue()
        assert "student, epoch 2 of 2" in shown.getvalue()
