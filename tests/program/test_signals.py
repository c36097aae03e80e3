from __future__ import annotations

import re

import pytest
import torch
import yaml
from program_runs import distill, lwkd, rows, same, state, trained
from torch import nn

import lwkd as library
from lwkd.program.distill import signals
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.signals import signal_of
from lwkd.program.errors import ProgramError
from lwkd.signals import Attention, Hessian, Jacobian

MEASURED = ("jacobian", "hessian")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with uniform and layer-wise student for each signal that makes passes of its own."""
    found = {}
    for signal in MEASURED:
        out = tmp_path_factory.mktemp(signal)
        result = trained(out, "--rates", "both", "--signal", signal, "--every", 2)
        found[signal] = out, result
    return found


@pytest.mark.parametrize(
    ("settings", "signal"),
    [
        ({}, Attention()),
        ({"kind": "l2"}, Attention(kind="l2")),
        ({"signal": "jacobian"}, Jacobian()),
        ({"signal": "jacobian", "wrt": "parameters", "probes": 3}, Jacobian(wrt="parameters", probes=3)),
        ({"signal": "jacobian", "estimator": "vjp", "kind": "norm"}, Jacobian(estimator="vjp", kind="norm")),
        ({"signal": "hessian"}, Hessian()),
        ({"signal": "hessian", "curvature": "hessian", "probes": 2}, Hessian(curvature="hessian", probes=2)),
        ({"signal": "hessian", "wrt": "input"}, Hessian(wrt="input")),
    ],
)
def test_settings_give_the_signal(settings, signal):
    assert signal_of(Settings(**settings)) == signal


def test_every_option_reaches_the_library(tmp_path, monkeypatch):
    plain, made = library.LayerwiseOptimizer.__init__, []

    def spy(self, *nets, **options):
        made.append(options)
        plain(self, *nets, **options)

    monkeypatch.setattr(library.LayerwiseOptimizer, "__init__", spy)
    options = ("--signal", "jacobian", "--wrt", "input", "--estimator", "difference", "--kind", "relative")
    trained(tmp_path, "--epochs", 1, "--rates", "both", *options, "--probes", 2, "--samples", 4, "--every", 3)
    expected = Jacobian(estimator="difference", kind="relative", probes=2)
    assert [(m["signal"], m["samples"], m["every"], m["budget"]) for m in made] == [(expected, 4, 3, None)] * 2


@pytest.mark.parametrize(
    "options",
    [
        ("attention", "--kind", "l2"),
        ("attention", "--samples", 8),
        ("jacobian", "--estimator", "difference"),
        ("jacobian", "--estimator", "vjp"),
        ("jacobian", "--estimator", "output"),
        ("jacobian", "--wrt", "parameters"),
        ("jacobian", "--kind", "norm", "--samples", 4),
        ("hessian", "--curvature", "hessian", "--samples", 8),
        ("hessian", "--wrt", "input"),
    ],
    ids=lambda options: "_".join(map(str, options)).replace("--", ""),
)
def test_each_choice_measures_something_of_its_own(measured, tmp_path, options):
    trained(tmp_path, "--epochs", 1, "--every", 2, "--signal", *options)
    found = [float(r["divergence"]) for r in rows(tmp_path / "layers.csv")]
    assert min(found) >= 0
    assert max(found) > 0
    others = [rows(out / "layers.csv") for out, _ in measured.values()]
    assert all(found[:3] != [float(r["divergence"]) for r in other[:3]] for other in others)


def test_budget_finds_an_interval(tmp_path):
    trained(tmp_path, "--epochs", 3, "--signal", "jacobian", "--budget", 0.5)
    saved = state(tmp_path, "layerwise")
    assert saved["optimizer"]["lwkd"]["schedule"]["calibrated"]
    assert saved["cost"][0] == saved["optimizer"]["lwkd"]["schedule"]["every"]


@pytest.mark.parametrize(
    ("options", "says", "do"),
    [
        (("--curvature", "ggn"), "--curvature belongs to --signal hessian, and this run has --signal attention", "out"),
        (("--signal", "jacobian", "--curvature", "ggn"), "belongs to --signal hessian", "--signal hessian"),
        (
            ("--signal", "hessian", "--estimator", "jvp"),
            "--estimator belongs to --signal jacobian",
            "--signal jacobian",
        ),
        (("--wrt", "input"), "--wrt belongs to --signal jacobian and --signal hessian", "jacobian or hessian"),
        (("--probes", 2), "--probes belongs to --signal jacobian and --signal hessian", "leave it out"),
        (("--signal", "hessian", "--kind", "relative"), "--kind relative belongs to --signal jacobian", "leave it out"),
        (("--signal", "jacobian", "--kind", "jsd"), "--kind jsd belongs to --signal attention", "--signal attention"),
        (("--kind", "direction"), "--kind direction belongs to --signal jacobian", "--signal jacobian"),
        (("--signal", "jacobian", "--wrt", "parameters", "--kind", "direction"), "only 'vjp' and 'norm'", "--help"),
        (("--signal", "jacobian", "--wrt", "parameters", "--estimator", "jvp"), "only 'vjp' and 'norm'", "--help"),
        (("--every", 3, "--budget", 0.1), "--every 3 and --budget 0.1", "leave out one"),
        (("--budget", 0), "--budget is 0.0", "0.02"),
        (("--budget", 2), "--budget is 2.0", "0.02"),
        (("--budget", "nan"), "--budget is nan", "0.02"),
        (("--every", 0), "--every", ""),
        (("--samples", 0), "--samples", ""),
        (("--signal", "jacobian", "--probes", 0), "--probes", ""),
        (("--signal", "jacobian", "--estimator", "guess"), "guess", ""),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_wrong_option_of_a_signal_exits_with_2_before_any_work(tmp_path, monkeypatch, options, says, do):
    monkeypatch.setattr("lwkd.program.distill.run.load", lambda *_, **__: pytest.fail("began to work"))
    result = distill(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert do in result.stderr
    assert "Traceback" not in result.output


class Opaque(torch.autograd.Function):
    """An op without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Doubling(nn.Module):
    def forward(self, x):
        return Opaque.apply(x)


def opaque(num_classes: int, in_channels: int):
    return nn.Sequential(
        *(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), Doubling(), nn.ReLU()),
        *(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def test_net_that_cannot_be_measured_is_found_before_any_training(tmp_path, monkeypatch):
    options = ("--student", f"{__name__}:opaque", "--signal", "jacobian", "--every", 2, "--epochs", 1)
    with monkeypatch.context() as patched:
        patched.setattr("lwkd.program.distill.train.Training.run", lambda _: pytest.fail("began to train"))
        result = distill(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert "layer '2' of the student has no forward mode" in result.stderr
    assert "--estimator difference" in result.stderr
    trained(tmp_path, *options, "--estimator", "difference")


def test_other_errors_of_the_first_measurement_are_not_hidden(monkeypatch):
    monkeypatch.setattr(Hessian, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        signals.try_out(Settings(signal="hessian"), nn.ReLU(), nn.ReLU(), None, torch.zeros(1))
    signals.try_out(Settings(), nn.ReLU(), nn.ReLU(), None, torch.zeros(1))


@pytest.mark.parametrize("signal", MEASURED)
def test_measuring_does_not_change_training(measured, tmp_path, signal):
    out, _ = measured[signal]
    trained(tmp_path, "--rates", "uniform")
    assert same(state(tmp_path, "uniform")["model"], state(out, "uniform")["model"])
    assert not same(state(out, "layerwise")["model"], state(out, "uniform")["model"])


@pytest.mark.parametrize("signal", MEASURED)
def test_standard_error_is_logged_where_it_is_known(measured, signal):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = measured[signal]
    header = (out / "layers.csv").read_text().splitlines()[0]
    assert header == "net,epoch,step,layer,divergence,standard_error,rate"
    for net in ("uniform", "layerwise"):
        written = [r for r in rows(out / "layers.csv") if r["net"] == net and r["layer"] == "layer2"]
        # Measured before the updates 1, 3, 5 …, and known from the third measurement on.
        assert [r["standard_error"] != "" for r in written] == [int(r["step"]) >= 5 for r in written]
        log = EventAccumulator(str(out / "tensorboard" / net))
        log.Reload()
        logged = {e.step: e.value for e in log.Scalars("standard_error/layer2")}
        known = {int(r["step"]): float(r["standard_error"]) for r in written if r["standard_error"]}
        assert logged == {step: pytest.approx(error) for step, error in known.items()}
        assert all(error > 0 for error in known.values())


def test_standard_error_is_empty_for_attention(tmp_path):
    trained(tmp_path, "--epochs", 1)
    assert {r["standard_error"] for r in rows(tmp_path / "layers.csv")} == {""}


@pytest.mark.parametrize("signal", MEASURED)
def test_closing_table_says_what_measuring_costs(measured, signal):
    out, result = measured[signal]
    for net, stage in (("uniform rates", "uniform"), ("layer-wise rates", "layerwise")):
        pattern = rf"│ student, {net} +│ +{signal} │ +2 │ +(\d+\.\d) % │"
        found = re.search(pattern, result.stdout)
        assert found, result.stdout
        line = next(r for r in rows(out / "summary.csv") if r["stage"] == stage)
        assert (line["every"], f"{100 * float(line['overhead']):.1f}") == ("2", found[1])
    again = lwkd("distill", "--resume", "--out", out)  # finished: nothing is measured, and the row still there
    assert re.search(pattern, again.stdout), again.stdout
    assert "│ teacher " not in result.stdout.partition("what measuring cost")[2]


def test_attention_is_measured_at_every_update_and_says_so(tmp_path):
    result = distill(tmp_path, "--epochs", 1, "--policy", "constant")
    assert re.search(r"│ +attention │ +1 │ +\d+\.\d % │", result.stdout), result.stdout
    assert "measuring" not in distill(tmp_path / "alone", "--epochs", 1, "--no-teacher").stdout


def test_run_yaml_from_before_the_signals_had_options(tmp_path):
    trained(tmp_path / "then", "--epochs", 1)
    old = yaml.safe_load((tmp_path / "then" / "run.yaml").read_text())
    for name in (*signals.OPTIONS, "samples", "budget"):
        assert old.pop(name) is None
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    result = lwkd("distill", "--config", tmp_path / "old.yaml", "--out", tmp_path / "now")
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "now" / "layers.csv") == rows(tmp_path / "then" / "layers.csv")
    (tmp_path / "then" / "run.yaml").write_text(yaml.safe_dump(old))
    assert lwkd("distill", "--resume", "--out", tmp_path / "then").exit_code == 0


def test_run_yaml_repeats_a_measuring_run_bitwise(measured, tmp_path):
    out, _ = measured["hessian"]
    result = lwkd("distill", "--config", out / "run.yaml", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / "layers.csv") == rows(out / "layers.csv")


def test_option_of_another_signal_in_a_run_yaml_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("signal: hessian\ncurvature: ggn\n")
    result = lwkd("distill", "--config", tmp_path / "run.yaml", "--signal", "attention", "--out", tmp_path)
    assert result.exit_code == 2
    assert "of the run.yaml, too" in result.stderr


def test_help_groups_the_signal_options():
    shown = lwkd("distill", "--help").stdout
    panel = shown[shown.index("─ Signal ─") :]
    panel = panel[: panel.index("╰")]
    for option in ("signal", *signals.OPTIONS, "samples", "every", "budget"):
        assert f"--{option} " in panel
        assert shown.count(f"--{option} ") - panel.count(f"--{option} ") == 0


def test_library_error_names_the_option(monkeypatch):
    with pytest.raises(ProgramError, match="--signal jacobian: probes is 0"):
        signal_of(Settings(signal="jacobian", probes=0))
