from __future__ import annotations

import sys

import pytest
from program_runs import distill, lwkd
from python_runs import python

from lwkd.program import cli, doctor
from lwkd.program.distill.settings import Settings, read_run, render_run


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
        (("--no-teacher", "--compare"), "--compare is nothing that a run with --no-teacher looks at"),
        (("--no-teacher", "--rates", "both"), "--rates is nothing that a run with --no-teacher"),
        (("--no-teacher", "--teacher-checkpoint", "nosuch.pt"), "--teacher-checkpoint is nothing"),
        (("--no-teacher", "--pair", "layer1=layer1"), "--pair is nothing"),
        (("--no-teacher", "--gamma", 3), "--gamma is nothing that a run with --no-teacher looks at"),
        (("--no-teacher", "--every", 3), "--every is nothing"),
        (("--compare", "--rates", "both"), "--rates is nothing that a run with --compare"),
        (("--teacher-checkpoint", "nosuch.pt"), "--teacher-epochs is nothing that a run with --teacher-checkpoint"),
        (("--policy", "freeze", "--gamma", 3), "--gamma is nothing that a run with --policy freeze looks at"),
        (("--policy", "freeze", "--normalize"), "--normalize is nothing"),
        (("--policy", "freeze", "--clamp", 0.5, 2), "--clamp is nothing"),
        (("--policy", "freeze", "--policy-momentum", 0.5), "--policy-momentum is nothing"),
        (("--policy", "constant", "--gamma", 5), "--gamma is nothing that a run with --policy constant looks at"),
        (("--multiplier", 7), "--multiplier is nothing that a run with --policy relative looks at"),
        (("--window", 7), "--window is nothing"),
        (("--rates", "uniform", "--gamma", 3), "--gamma is nothing that a run with --rates uniform looks at"),
        (("--pair", "layer1=layer1", "--pair", "layer1=layer3"), "layer1 twice: with layer1 and with layer3"),
        (("--lr", "nan"), "--lr is nan, expected a finite number"),
        (("--lr", "inf"), "--lr is inf"),
        (("--weight-decay", "nan"), "--weight-decay is nan"),
        (("--temperature", "inf"), "--temperature is inf"),
        (("--attention-transfer", "nan"), "--attention-transfer is nan"),
        (("--resume", "--overwrite"), "leave out one of the two"),
        (("--threads", 1_000_000), "--threads is 1000000"),
        (("--out", ""), "--out is empty"),
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
        ("epochs: many\n", "epochs is 'many'"),
        ("epochs: 1.9\n", "epochs is 1.9: expected a whole number"),
        ("epochs: true\n", "epochs is True"),
        ("epochs: {a: 1}\n", "epochs is {'a': 1}"),
        ("clamp: 3\n", "clamp is 3: expected a list"),
        ("clamp: [1]\n", "clamp is [1]: "),
        ("pair: layer1=layer1\n", "pair is 'layer1=layer1': expected a list"),
        ("milestones: [0.5, [1]]\n", "milestones is [0.5, [1]]"),
        ("no_teacher: 3\n", "no_teacher is 3: expected true or false"),
        ("lr: -1\n", "lr is -1"),
        ("data: svhn\n", "svhn"),
        ("temperature: 0\n", "--temperature is 0.0"),
        ("policy: freeze\ngamma: 3\n", "--gamma is nothing"),
    ],
)
def test_wrong_run_yaml(tmp_path, content, says):
    (tmp_path / "run.yaml").write_text(content)
    result = lwkd("distill", "--config", tmp_path / "run.yaml", "--out", tmp_path)
    assert result.exit_code == 2
    assert says in result.stderr
    assert str(tmp_path / "run.yaml") in result.stderr


def test_run_yaml_is_read_as_it_is_written(tmp_path):
    settings = Settings(data_dir="bücher/éléments")
    (tmp_path / "run.yaml").write_bytes(render_run(settings).encode())
    code = "import sys; from pathlib import Path; from lwkd.program.distill.settings import read_run\n"
    code += "print(ascii(read_run(Path(sys.argv[1]))['data_dir']))"
    # A locale of another encoding than UTF-8, where Python does not take it for UTF-8 all the same.
    done = python("-X", "utf8=0", "-c", code, tmp_path / "run.yaml", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert done.stdout.strip() == ascii(settings.data_dir), done.stderr
    assert read_run(tmp_path / "run.yaml") == settings.as_plain()


def test_values_of_a_file_that_are_whole_or_not_given(tmp_path):
    (tmp_path / "run.yaml").write_text("epochs: 1.0\nclamp: null\nsamples: null\nno_teacher: true\n")
    result = distill(tmp_path / "out", "--config", tmp_path / "run.yaml", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert read_run(tmp_path / "out" / "run.yaml")["epochs"] == 1


@pytest.mark.parametrize("command", ["pair", "profile"])
def test_two_channels_are_refused(tmp_path, command):
    out = ("--out", tmp_path) if command == "profile" else ()
    result = lwkd(command, "--teacher", "cnn_8", "--student", "cnn_4", "--channels", 2, *out)
    assert result.exit_code == 2
    assert "--channels is 2, expected 1 (grey) or 3 (colours)" in result.stderr


def test_profile_is_told_of_its_run_as_distill_is(tmp_path):
    nets = ("--teacher", "cnn_8", "--student", "cnn_4")
    for options, says in ((("--out", ""), "--out is empty"), (("--threads", 10**6), "--threads is 1000000")):
        result = lwkd("profile", *nets, "--out", tmp_path, *options)
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
    stopped = distill(tmp_path)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    monkeypatch.setattr(cli, "build", interrupted)
    stopped = lwkd("pair", "--teacher", "cnn_8", "--student", "cnn_4")
    assert stopped.exit_code == 130
    assert "--resume" not in stopped.stderr


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
