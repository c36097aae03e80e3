"""``lwkd compare``: a recipe's grid from its teachers to its report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lwkd.program.checkpoint import check_output, write_aside
from lwkd.program.compare import report
from lwkd.program.compare.engines import Engine
from lwkd.program.compare.grid import Grid
from lwkd.program.compare.recipe import UNIFORM, Recipe, read_recipe
from lwkd.program.compare.trial import digest
from lwkd.program.console import Console, Stopping, table
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.train import Stopped
from lwkd.program.errors import ProgramError


def only(recipe: Recipe, arms: Sequence[str], methods: Sequence[str]) -> Recipe:
    """The recipe with these arms (and those that they need) and methods; all where none are named.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) for a name that the recipe does not have.
    """
    for kind, names, known in (("arm", arms, [*recipe.arms]), ("method", methods, [*recipe.methods])):
        if strange := [name for name in names if name not in known]:
            raise ProgramError(f"--{kind} {strange[0]!r} is not in the recipe", f"it has {', '.join(known)}", code=2)
    needed = {UNIFORM, *arms, *(recipe.arms[arm].of for arm in arms)}
    kept = {name: arm for name, arm in recipe.arms.items() if not arms or name in needed}
    return replace(recipe, arms=kept, methods=tuple(m for m in recipe.methods if not methods or m in methods))


def _place(out: Path, recipe: Recipe, kept: Recipe) -> Path:
    """Where the report goes. That of some arms or methods has a folder of its own: the report of all stays as it is."""
    if (kept.arms, kept.methods) == (recipe.arms, recipe.methods):
        return out
    names = [*kept.methods, *kept.arms]
    words = re.sub(r"[^a-z0-9.+]+", "-", " ".join(name for name in names if name != UNIFORM).lower()).strip("-")
    return out / "only" / f"{words[:60]}-{digest(*names)}"


def compare(
    source: Path,
    out: Path,
    made: Callable[[Mapping[str, Any]], Settings],
    console: Console,
    *,
    arms: Sequence[str] = (),
    methods: Sequence[str] = (),
    engine: Engine = "joblib",
    workers: int | None = None,
) -> int:
    """Run ``lwkd compare``.

    Returns:
        Exit status: 0, or 130 where the user stopped it; the same command goes on.

    Errors: :class:`~lwkd.program.errors.ProgramError`.
    """
    recipe = read_recipe(source, made)
    kept = only(recipe, arms, methods)
    place = _place(out, recipe, kept)
    check_output(place, 0)
    console.say(f"{recipe.title}: {len(kept.arms)} arms, methods {', '.join(kept.methods)}")
    try:
        with Stopping() as stopping, console.counting("trials") as tell:
            grid = Grid(
                recipe,
                out,
                engine=engine,
                workers=workers or os.cpu_count() or 1,
                tell=tell,
                stop_wanted=lambda: stopping.wanted,
            )
            found = [grid.figures(method, kept.arms) for method in kept.methods]
    except Stopped:
        console.say(f"stopped; what has ended lies in {out}. The same command goes on")
        return 130
    except ProgramError as error:
        if error.code == 2:
            raise ProgramError(f"{source}: {error.problem}", error.remedy, code=2) from error
        raise
    write_aside(place / "recipe.yaml", lambda file: file.write(source.read_bytes()))
    again = partial(report.command, recipe.settings, source, out)
    tested = report.write(place, kept, again, found, grid.teachers())
    for figures in found:
        lr = {arm: f"{chosen.lr:g}" for arm, chosen in figures.chosen.items()}
        rows = [
            (row.arm, lr[row.arm], *report.tested_cells(row))
            for row in tested
            if row.figures is figures and row.against == UNIFORM
        ]
        if rows:
            heads = ("arm", "base rate", "minus uniform", "95 %", "p (Holm)", "better")
            console.out.print(table(f"{recipe.title}; {figures.method}", heads, rows))
        mean = report.mean_sd(figures.scores(UNIFORM))
        console.say(f"{figures.method}, uniform: {mean} at base rate {lr[UNIFORM]}")
    console.say(f"saved: {place / 'report.md'}")
    return 0
