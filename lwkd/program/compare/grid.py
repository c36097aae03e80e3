"""Which trials a comparison needs: base rates are tuned on development seeds, figures come from fresh ones.

Everything that has ended is in the folder; a grid that was broken off goes on with what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lwkd.program import checkpoint
from lwkd.program.compare.engines import Engine, results
from lwkd.program.compare.recipe import UNIFORM, Arm, Method, Recipe
from lwkd.program.compare.statistics import paired, seeds_for
from lwkd.program.compare.trial import DEVELOPMENT, TeacherTrial, Trial
from lwkd.program.distill.train import Stopped
from lwkd.program.provenance import commit

FURTHER = 4
"""Rates beyond the ends of those given that may be tried for an arm."""


@dataclass(frozen=True)
class Chosen:
    """The base rate of an arm: ``tried`` holds the mean score over the development seeds by rate.

    ``inside`` says that lower and higher rates than the chosen one were tried.
    """

    lr: float
    tried: dict[float, float]
    inside: bool


@dataclass(frozen=True)
class Figures:
    """All that was found for one method: by arm, the chosen rate and the results of the fresh seeds, in their order."""

    method: Method
    chosen: dict[str, Chosen]
    trials: dict[str, list[Trial]]
    results: dict[str, list[dict[str, Any]]]
    wanted: dict[str, int]
    """Seeds that the smallest interesting difference asks for, by layer-wise arm."""

    @property
    def commits(self) -> list[str]:
        """Those that the results come from: results stay in the folder when the code moves on."""
        return sorted({result["commit"] for some in self.results.values() for result in some})

    def scores(self, arm: str) -> list[float]:
        """Scores in points (0 to 100), one a seed."""
        return [100 * result["score"] for result in self.results[arm]]


class Grid:
    """Runs trials that are not in the folder yet.

    Args:
        recipe: what is compared.
        folder: where results lie.
        engine: who runs trials.
        workers: how many at a time.
        tell: called with (trials done, trials known of).
        stop_wanted: asked after every trial.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        engine: Engine,
        workers: int,
        tell: Callable[[int, int], None],
        stop_wanted: Callable[[], bool],
    ):
        self.recipe, self.folder, self.engine, self.workers = recipe, folder, engine, workers
        self._tell, self._stop_wanted = tell, stop_wanted
        self._found: dict[str, dict[str, Any]] = {}
        self._done = self._known = 0
        self._commit = commit()
        checkpoint.check_output(folder / "trials", 0)

    def figures(self, method: Method, names: Collection[str] | None = None) -> Figures:
        """Tune and run arms with a method: those with these names, or all.

        Raises:
            Stopped: the user asked to stop; what has ended is kept.
        """
        arms = [arm for name, arm in self.recipe.arms.items() if names is None or name in names]
        chosen: dict[str, Chosen] = {}
        fewest, most = self.recipe.seeds
        # An arm alone has the seeds that it has among all: how many may follow from the spread of another one.
        deciding = [a for a in self.recipe.arms.values() if a in arms or (a.rates == "layerwise" and fewest < most)]
        self._tune(method, [arm for arm in deciding if arm.of is None], chosen)
        wanted = self._wanted(method, chosen, deciding)
        count = min(max([fewest, *wanted.values()]), most)
        # All arms of a seed one after the other, so that times are compared under the same load.
        self._run([self._trial(method, chosen, arm, seed) for seed in range(count) for arm in arms if arm.of is None])
        self._tune(method, [arm for arm in arms if arm.of is not None], chosen)
        trials = {arm.name: [self._trial(method, chosen, arm, seed) for seed in range(count)] for arm in arms}
        self._run([trial for some in zip(*trials.values(), strict=True) for trial in some])
        found = {name: [self._found[trial.key] for trial in some] for name, some in trials.items()}
        return Figures(method, {name: chosen[name] for name in trials}, trials, found, wanted)

    def _development(self) -> range:
        return range(DEVELOPMENT, DEVELOPMENT + self.recipe.development)

    def _trial(self, method: Method, chosen: dict[str, Chosen], arm: Arm, seed: int, lr: float | None = None) -> Trial:
        """A trial at the chosen rate, or at another; a control's source is the run that it repeats."""
        lr = chosen[arm.name].lr if lr is None else lr
        if arm.of is None:
            return Trial(self.recipe, method, arm, lr, seed)
        seeds = self._development() if seed >= DEVELOPMENT else range(self.recipe.seeds[0])
        other = seeds[(seed - seeds[0] + 1) % len(seeds)] if arm.rates == "other-profile" else seed
        source = self._trial(method, chosen, self.recipe.arms[arm.of], other)
        rates = self._found[source.key].get("rates") if source.key in self._found else None
        return Trial(self.recipe, method, arm, lr, seed, source, rates)

    def _tune(self, method: Method, arms: Sequence[Arm], chosen: dict[str, Chosen]) -> None:
        """Choose the base rate of each arm; the search goes on past an end while the best rate stands there."""
        tried = {arm.name: dict.fromkeys(self.recipe.base_rates, 0.0) for arm in arms}
        factor = self.recipe.base_rates[1] / self.recipe.base_rates[0]
        open_arms = list(arms)
        for further in range(FURTHER + 1):
            trials = {
                (arm.name, lr): [self._trial(method, chosen, arm, seed, lr) for seed in self._development()]
                for arm in open_arms
                for lr in tried[arm.name]
            }
            self._run([trial for some in trials.values() for trial in some])
            for (name, lr), some in trials.items():
                tried[name][lr] = statistics.fmean(self._found[trial.key]["score"] for trial in some)
            still = []
            for arm in open_arms:
                rates = tried[arm.name]
                best = max(sorted(rates), key=lambda lr: rates[lr])
                inside = min(rates) < best < max(rates)
                chosen[arm.name] = Chosen(best, dict(sorted(rates.items())), inside)
                if not inside and further < FURTHER:
                    beyond = best * factor if best == max(rates) else best / factor
                    rates[float(f"{beyond:.6g}")] = 0.0
                    still.append(arm)
            open_arms = still
            if not open_arms:
                return

    def _wanted(self, method: Method, chosen: dict[str, Chosen], arms: Sequence[Arm]) -> dict[str, int]:
        scores = {
            arm.name: [100 * self._found[self._trial(method, chosen, arm, s).key]["score"] for s in self._development()]
            for arm in arms
            if arm.rates == "layerwise" or arm.name == UNIFORM
        }
        return {
            name: seeds_for(paired(found, scores[UNIFORM]).sd, self.recipe.difference)
            for name, found in scores.items()
            if name != UNIFORM
        }

    def _path(self, key: str) -> Path:
        return self.folder / "trials" / f"{key}.pt"

    def _run(self, trials: Sequence[Trial]) -> None:
        """See to it that all these trials have ended, and their teachers before them."""
        self._have({trial.teacher.key: trial.teacher for trial in trials}, lambda teacher: teacher.run)
        weights = {key: found["weights"] for key, found in self._found.items() if "weights" in found}
        self._have({trial.key: trial for trial in trials}, lambda trial: partial(trial.run, weights[trial.teacher.key]))

    def _have(self, wanted: dict[str, Any], job_of: Callable[[Any], Callable[[], Any]]) -> None:
        for key in wanted:
            if key not in self._found and self._path(key).exists():
                self._found[key] = checkpoint.load(self._path(key))
        missing = [key for key in wanted if key not in self._found]
        self._known += len(missing)
        ended = results([job_of(wanted[key]) for key in missing], self.engine, self.workers)
        for number, found in ended:
            key = missing[number]
            found["commit"] = self._commit
            checkpoint.save(self._path(key), found)
            self._found[key] = found
            self._done += 1
            self._tell(self._done, self._known)
            if self._stop_wanted():
                ended.close()  # type: ignore[attr-defined]
                raise Stopped

    def teachers(self) -> list[dict[str, float]]:
        """Scores of the recipe's teachers."""
        trials = [TeacherTrial(self.recipe, number) for number in range(self.recipe.teachers)]
        return [self._found[trial.key]["scores"] for trial in trials if trial.key in self._found]
