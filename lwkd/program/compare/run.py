"""``lwkd compare``: a recipe's grid from its teachers to its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lwkd.program.checkpoint import write_aside
from lwkd.program.compare import report
from lwkd.program.compare.engines import Engine
from lwkd.program.compare.grid import Grid
from lwkd.program.compare.recipe import UNIFORM, Recipe, read_recipe
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
    recipe = only(read_recipe(source, made), arms, methods)
    console.say(f"{recipe.title}: {len(recipe.arms)} arms, methods {', '.join(recipe.methods)}")
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
            found = [grid.figures(method) for method in recipe.methods]
    except Stopped:
        console.say(f"stopped; what has ended lies in {out}. The same command goes on")
        return 130
    write_aside(out / "recipe.yaml", lambda file: file.write(source.read_bytes()))
    tested = report.write(out, recipe, source, found, grid.teachers())
    for figures in found:
        rows = [
            (row.arm, f"{figures.chosen[row.arm].lr:g}", *report.tested_cells(row))
            for row in tested
            if row.figures is figures and row.against == UNIFORM
        ]
        console.out.print(
            table(
                f"{recipe.title}; {figures.method}",
                ("arm", "base rate", "minus uniform", "95 %", "p (Holm)", "better"),
                rows,
            )
        )
    console.say(f"saved: {out / 'report.md'}")
    return 0
