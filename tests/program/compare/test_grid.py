from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys

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
            if of.arm.name == "wild":
                found["score"] += of.seed % 2 / 200
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


WILD = {name: {"rates": "layerwise", "controls": ["mean"]} for name in ("calm", "wild")}


def test_an_arm_alone_has_the_seeds_that_it_has_among_all(tmp_path, played):
    of = recipe(arms=WILD, seeds=[2, 9])
    whole = grid(tmp_path / "whole", of).figures("kd")
    alone = grid(tmp_path / "alone", of).figures("kd", ["uniform", "calm"])
    assert len(whole.results["calm"]) > 2
    assert list(alone.results) == list(alone.chosen) == ["uniform", "calm"]
    for name in alone.results:
        assert alone.scores(name) == whole.scores(name)
        assert alone.chosen[name] == whole.chosen[name]


def test_where_the_number_of_seeds_is_given_no_other_arm_is_run(tmp_path, played):
    grid(tmp_path, recipe(arms=WILD, seeds=3)).figures("kd", ["uniform", "calm"])
    assert [key for key in played if "calm" in key]
    assert not [key for key in played if "wild" in key]


def written(folder, **changes):
    path = folder / "a recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, allow_unicode=True), encoding="utf-8")
    return path


def read(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_of_a_row_repeats_it_and_leaves_the_report_of_all(tmp_path, played):
    path, out = written(tmp_path, arms=WILD, seeds=[2, 9], methods=["kd", "kd+attention"]), tmp_path / "an out"
    assert lwkd("compare", path, "--out", out, "--data-dir", "my data").exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert before.keys() == {
        *("report.md", "runs.csv", "summary.csv", "controls.csv", "differences.png", "recipe.yaml")
    }
    ran = len(played)
    row = next(row for row in read(out / "summary.csv") if (row["method"], row["arm"]) == ("kd", "calm"))
    shown = next(line for line in before["report.md"].decode().splitlines() if line.startswith("A row alone"))
    for command in (row["command"], shown.split("`")[1]):
        program, *arguments = shlex.split(command)
        assert program == "lwkd"
        assert arguments[arguments.index("--data-dir") + 1] == "my data"
        result = lwkd(*arguments)
        assert result.exit_code == 0, result.output
    assert len(played) == ran
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert len(list((out / "only").iterdir())) == 2
    (place,) = (out / "only").glob("kd-calm-*")
    (again,) = read(place / "summary.csv")
    for name in ("seeds", "mean", "minus_uniform", "lr", "command"):
        assert again[name] == row[name]
    assert [run for run in read(out / "runs.csv") if (run["method"], run["arm"]) == ("kd", "calm")] == [
        run for run in read(place / "runs.csv") if run["arm"] == "calm"
    ]


def test_uniform_alone_is_reported(tmp_path, played):
    result = lwkd("compare", written(tmp_path), "--out", tmp_path, "--arm", "uniform")
    assert result.exit_code == 0, result.output
    (place,) = (tmp_path / "only").iterdir()
    assert "| uniform |" in (place / "report.md").read_text()
    assert {run["arm"] for run in read(place / "runs.csv")} == {"uniform"}
    assert "kd, uniform: 50" in result.stdout


def test_names_are_shown_as_they_are(tmp_path, played):
    arm = "[/red] | $x^$ [bold]"
    path = written(tmp_path, title="Test [bold] of [/red]", arms={arm: {"rates": "auto-rgn"}})
    result = lwkd("compare", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Test [bold] of [/red]; kd" in result.stdout
    assert "[/red]" in result.stdout.partition("; kd")[2]
    assert r"[/red] \| $x^$ [bold] |" in (tmp_path / "out" / "report.md").read_text()


def test_a_locale_without_the_characters_ends_well(tmp_path, played):
    path = written(tmp_path, title="Überwachung → 1", arms={"ä": {"rates": "auto-rgn"}})
    arguments = ["compare", path, "--out", tmp_path / "out"]
    assert lwkd(*arguments).exit_code == 0
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "lwkd.program", *arguments], env={**os.environ, **bare}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert b"?berwachung ? 1; kd" in result.stdout
    assert "# Überwachung → 1" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"a": {"rates": "frozen-prefix", "layers": 99}}}, "arm 'a': layers is 99 of 3 segments"),
        ({"start": {"kind": "replaced", "segment": 7}}, "start: segment is 7"),
        ({"start": {"kind": "copy", "layers": {"layer9": "layer1"}}}, "start: layer9"),
    ],
)
def test_what_the_nets_say_of_a_recipe_is_said_before_a_teacher_is_trained(changes, says, tmp_path):
    path = written(tmp_path, **changes)
    result = lwkd("compare", path, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 2, result.output
    assert f"{path}: {says}" in " ".join(result.stderr.split())
    assert not list((tmp_path / "out" / "trials").iterdir())


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
    (place,) = (out / "only").iterdir()
    assert "mean, all layers" not in (place / "report.md").read_text()
    assert (out / "report.md").read_text() == text


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
