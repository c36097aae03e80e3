from __future__ import annotations

import io
import re
import time

from rich.console import Console as RichConsole

from lwkd.program.console import Console


def test_bar_shows_the_time_left_and_refreshes_while_an_update_lasts():
    console, shown = Console(), io.StringIO()
    console.out = RichConsole(file=shown, force_terminal=True, width=100)
    with console.progress("student", epochs=2, batches=50) as move:
        time.sleep(0.3)
        assert "-:--:--" in shown.getvalue()  # nothing is known before the first updates
        for batch in range(1, 51):
            move(0, batch)
            time.sleep(0.01)
        move(1, 1)
        before = len(shown.getvalue())
        time.sleep(1)  # an update that takes long
        later = shown.getvalue()[before:]
        assert re.search(r"51/100.*0:00:0\d.*0:00:0\d", later)  # done, elapsed, left
        assert "student, epoch 2 of 2" in later
