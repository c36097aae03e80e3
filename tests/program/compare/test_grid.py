from __future__ import annotations

import csv

import pytest
import torch
import yaml
from compare_runs import TINY, recipe
from program_runs import lwkd

from lwkd.program.compare import grid as grids
from lwkd.program.compare.engines import results
from lwkd.program.compare.grid import Grid
from lwkd.program.compare.trial import TeacherTrial
from lwkd.program.distill.train import Stopped


def grid(folder, of, stop_wanted=lambda: False):
    return Grid(of, folder, engine="joblib", workers=1, tell=lambda done, known: None, stop_wanted=stop_wanted)


@pytest.fixture
def played(monkeypatch):
    """No net is trained: a trial's score is best at the rate 0.032, and grows with the mean of its arm's rates."""
    calls = []

    def run(jobs, engine, workers):
        for number, job in enumerate(jobs):
            of = getattr(job, "func", job).__self__
            calls.append(of.key)
            if isinstance(of, TeacherTrial):
                yield number, {"weights": {}, "scores": {"test": 0.9}}
                continue
            gain = 0.1 if of.arm.rates == "layerwise" else 0.0
            found = {
                "score": 0.5 - 0.01 * abs(of.lr - 0.032) / 0.032 + gain + of.seed % 7 / 1000,
                "seconds": 1.0,
                "finite": True,
            }
            if of.arm.rates == "layerwise":
                found["rates"] = torch.full((8, 3), float(of.seed))
            if of.rates is not None:
                found["score"] += float(of.rates.mean()) / 1e6
            yield number, found

    monkeypatch.setattr(grids, "results", run)
    return calls


def test_the_search_for_a_base_rate_goes_on_past_the_end(tmp_path, played):
    found = grid(tmp_path, recipe()).figures("kd")
    for chosen in found.chosen.values():
        assert chosen.lr == 0.032
        assert chosen.inside
        assert list(chosen.tried) == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064]


def test_a_search_that_never_ends_says_so(tmp_path, played):
    found = grid(tmp_path, recipe(base_rates=[1e-6, 2e-6])).figures("kd")
    assert not found.chosen["uniform"].inside
    assert len(found.chosen["uniform"].tried) == 2 + grids.FURTHER


def test_controls_repeat_the_run_of_their_seed_or_of_another_at_the_rate_that_was_chosen(tmp_path, played):
    found = grid(tmp_path, recipe()).figures("kd")
    for name, trials in found.trials.items():
        for trial in trials:
            if trial.arm.of is None:
                assert trial.source is None
                continue
            other = (trial.seed + 1) % 2 if trial.arm.rates == "other-profile" else trial.seed
            assert (trial.source.arm.name, trial.source.seed, trial.source.lr) == ("attention", other, 0.032), name
            assert trial.rates.mean() == other


def test_what_is_there_is_not_run_again(tmp_path, played):
    first = grid(tmp_path, recipe()).figures("kd")
    ran = len(played)
    assert ran == len(set(played))
    again = grid(tmp_path, recipe()).figures("kd")
    assert len(played) == ran
    assert again.scores("attention") == first.scores("attention")


def test_a_grid_that_was_stopped_goes_on(tmp_path, played):
    with pytest.raises(Stopped):
        grid(tmp_path, recipe(), stop_wanted=lambda: len(played) == 5).figures("kd")
    assert len(list((tmp_path / "trials").glob("*.pt"))) == 5
    found = grid(tmp_path, recipe()).figures("kd")
    assert len(played) == len(set(played))
    assert len(found.results["uniform"]) == 2


def test_the_spread_decides_how_many_seeds_there_are(tmp_path, played):
    found = grid(tmp_path, recipe(seeds=[2, 9], difference=1e-6)).figures("kd")
    assert found.wanted == {"attention": 0} or found.wanted["attention"] > 9
    assert {len(of) for of in found.results.values()} == {min(max(2, found.wanted["attention"]), 9)}


def test_results_say_which_code_they_come_from(tmp_path, played, monkeypatch):
    monkeypatch.setattr(grids, "commit", lambda: "one")
    assert grid(tmp_path, recipe(seeds=[2, 2])).figures("kd").commits == ["one"]
    monkeypatch.setattr(grids, "commit", lambda: "two")
    assert grid(tmp_path, recipe(seeds=[3, 3])).figures("kd").commits == ["one", "two"]


def test_joblib_gives_every_result_with_its_number():
    jobs = [lambda value=value: value**2 for value in range(4)]
    assert sorted(results(jobs, "joblib", 1)) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_the_command_leaves_a_report_and_goes_on_from_what_is_there(tmp_path, monkeypatch):
    arms = {"attention": {"rates": "layerwise", "controls": ["mean"]}, "auto-rgn": {"rates": "auto-rgn"}}
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**TINY, "arms": arms, "epochs": 1, "seeds": 2}))
    monkeypatch.setattr(grids, "FURTHER", 0)
    result = lwkd("compare", path, "--out", out, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "auto-rgn" in result.stdout
    text = (out / "report.md").read_text()
    for line in ("# Digits", "## kd", "minus uniform", "Layer-wise minus its controls", f"lwkd compare {path}"):
        assert line in text
    assert (out / "differences.png").read_bytes().startswith(b"\x89PNG")
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert [row["arm"] for row in summary] == ["attention", "attention: its mean, all layers", "auto-rgn"]
    with (out / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 4 * 2
    scores = {(run["arm"], run["seed"]): 100 * float(run["score"]) for run in runs}
    difference = sum(scores["attention", s] - scores["uniform", s] for s in "01") / 2
    assert float(summary[0]["minus_uniform"]) == pytest.approx(difference)
    monkeypatch.setattr(
        grids, "results", lambda jobs, engine, workers: iter(()) if not jobs else pytest.fail("ran again")
    )
    assert lwkd("compare", path, "--out", out, "--arm", "auto-rgn").exit_code == 0
    assert "mean, all layers" not in (out / "report.md").read_text()


def test_an_arm_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))
    result = lwkd("compare", path, "--out", tmp_path / "out", "--arm", "jacobian")
    assert result.exit_code == 2
    assert "'jacobian' is not in the recipe" in result.stderr


def test_a_comparison_that_the_user_stops_says_how_it_goes_on(tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped

    monkeypatch.setattr(Grid, "figures", stop)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))
    found = lwkd("compare", path, "--out", tmp_path / "out")
    assert found.exit_code == 130
    assert "The same command goes on" in " ".join(found.stdout.split())
