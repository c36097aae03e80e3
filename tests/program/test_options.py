from __future__ import annotations

import sys

import pytest
from program_runs import distill, lwkd
from python_runs import python

from lwkd.program import cli, doctor


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--data", "svhn"), "svhn"),
        (("--optimizer", "lion"), "lion"),
        (("--schedule", "linear"), "linear"),
        (("--rates", "all"), "all"),
        (("--signal", "entropy"), "entropy"),
        (("--policy", "magic"), "magic"),
        (("--amp", "fp8"), "fp8"),
        (("--augment", "mixup"), "mixup"),
        (("--epochs", 0), "--epochs"),
        (("--epochs", "many"), "--epochs"),
        (("--batch-size", 1), "--batch-size"),
        (("--alpha", 2), "--alpha"),
        (("--clamp", 2, 1), "clamp is (2.0, 1.0)"),
        (("--gamma", "nan"), "gamma is nan"),
        (("--temperature", 0), "--temperature"),
        (("--policy-momentum", 1), "policy-momentum"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "abacus"), "abacus"),
        (("--pair", "layer1"), "STUDENT=TEACHER"),
        (("--pair", "layer9=layer1"), "layer9"),
        (("--policy", "constant", "--multiplier", 1, "--multiplier", 2), "2 multipliers"),
        (("--policy", "constant", "--multiplier", -1), "multipliers are"),
        (("--no-teacher", "--compare"), "--no-teacher"),
        (("--teacher", "resnet7"), "did you mean"),
        (("--student", "nothing:here"), "nothing"),
        (("--no-such-option",), "--no-such-option"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_wrong_option_exits_with_2_before_any_training(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("lwkd.program.distill.train.Training.run", lambda _: pytest.fail("began to train"))
    if "resnet7" in options:
        pytest.importorskip("torchvision")  # whose names are proposed
    result = distill(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("epochz: 3\n", "unknown settings: epochz"),
        ("- 1\n", "holds no settings"),
        ("a: [", "is not YAML"),
        ("epochs: many\n", "--epochs"),
        ("data: svhn\n", "svhn"),
    ],
)
def test_wrong_run_yaml(tmp_path, content, says):
    (tmp_path / "run.yaml").write_text(content)
    result = lwkd("distill", "--config", tmp_path / "run.yaml", "--out", tmp_path)
    assert result.exit_code == 2
    assert says in result.stderr


def test_missing_run_yaml(tmp_path):
    result = lwkd("distill", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml cannot be read" in result.stderr


def test_unexpected_error_is_one_line_and_debug_shows_where(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise LookupError("who knows")

    monkeypatch.setattr("lwkd.program.distill.run.load", broken)
    result = distill(tmp_path)
    assert result.exit_code == 1
    assert "LookupError: who knows" in result.stderr
    assert "--debug" in result.stderr
    assert isinstance(distill(tmp_path, "--debug").exception, LookupError)
    monkeypatch.setenv("LWKD_DEBUG", "1")
    assert isinstance(distill(tmp_path).exception, LookupError)


def test_keyboard_interrupt_outside_training(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lwkd.program.distill.run.load", interrupted)
    assert distill(tmp_path).exit_code == 130


def test_missing_part_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = distill(tmp_path)
    assert result.exit_code == 1
    assert "pip install 'lwkd[program]'" in result.stderr


def test_missing_typer_names_the_extra():
    code = "import sys; sys.modules['typer'] = None; import lwkd.program.cli"
    done = python("-c", code)
    assert done.returncode == 1
    assert "pip install 'lwkd[program]'" in done.stderr


def test_pair_prints_the_table():
    pytest.importorskip("torchvision")
    result = lwkd("pair", "--teacher", "resnet18", "--student", "resnet10")
    assert result.exit_code == 0, result.output
    for name in ("layer1", "layer2", "layer3", "layer4", "tail"):
        assert name in result.stdout


def test_pair_by_hand():
    arguments = ("pair", "--teacher", "cnn_8", "--student", "cnn_4", "--channels", 1, "--image-size", 28)
    result = lwkd(*arguments, "--pair", "layer1=layer2")
    assert result.exit_code == 0, result.output
    assert "layer3" not in result.stdout
    wrong = lwkd(*arguments, "--pair", "layer1=layer7")
    assert wrong.exit_code == 2
    assert "layer7" in wrong.stderr


def test_doctor_lists_versions_backend_and_data(tmp_path):
    result = lwkd("doctor", "--data-dir", tmp_path)
    assert result.exit_code == 0, result.output
    for part in ("python", "torch", "lwkd", "C++", "torchvision", "torchmetrics", "fashion-mnist", "cifar10", "coco"):
        assert part in result.stdout


def test_doctor_says_what_is_missing_but_fails_only_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    monkeypatch.setattr("lwkd.program.doctor.shutil.which", lambda _: None)
    result = lwkd("doctor", "--data-dir", tmp_path)
    assert result.exit_code == 0
    assert "apt install g++" in result.stdout
    assert "missing" in result.stdout

    def broken():
        raise ImportError("lwkd._C was not built")

    monkeypatch.setattr("lwkd.backend", broken)
    result = lwkd("doctor", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "was not built" in result.stdout


def test_help_of_every_command():
    for command in ("distill", "profile", "pair", "doctor"):
        assert lwkd(command, "--help").exit_code == 0
    assert cli.DEFAULT.stages == ("teacher", "layerwise")
