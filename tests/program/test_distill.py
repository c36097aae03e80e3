from __future__ import annotations

import pytest
import torch
import yaml
from program_runs import LOADED, distill, lwkd, rows, same, state, trained

from lwkd.program.models.registry import build


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    result = trained(out, "--compare")
    return out, result


def test_compare_prints_all_four_side_by_side(compared):
    out, result = compared
    for line in (
        "teacher (cnn_4)",
        "student without a teacher (cnn_2)",
        "uniform rates (cnn_2)",
        "layer-wise rates (cnn_2)",
    ):
        assert line in result.stdout
    assert "accuracy after the last epoch" in result.stdout
    assert "seed 0" in result.stdout
    assert "can be chance" in result.stdout
    assert str(out / "layers.png") in result.stdout
    assert "student layer" in result.stdout  # the pairing table


def test_compare_leaves_every_file(compared):
    out, _ = compared
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    epochs = rows(out / "epochs.csv")
    assert [(r["net"], r["epoch"]) for r in epochs] == [
        ("teacher", "1"),
        *((net, epoch) for net in ("alone", "uniform", "layerwise") for epoch in ("1", "2")),
    ]
    layers = rows(out / "layers.csv")
    assert {r["layer"] for r in layers} == {"layer1", "layer2", "layer3"}
    assert {float(r["rate"]) for r in layers if r["net"] == "uniform"} == {1.0}
    assert len({float(r["rate"]) for r in layers if r["net"] == "layerwise"}) > 3
    assert all(float(r["divergence"]) > 0 for r in layers)
    assert [r["stage"] for r in rows(out / "summary.csv")] == ["teacher", "alone", "uniform", "layerwise"]


def test_reported_accuracy_is_that_of_the_last_epoch(compared):
    out, _ = compared
    last = {r["net"]: r["test_accuracy"] for r in rows(out / "epochs.csv")}
    assert {r["stage"]: r["accuracy"] for r in rows(out / "summary.csv")} == last


def test_tensorboard_has_divergence_and_rate_of_each_layer(compared):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = compared
    log = EventAccumulator(str(out / "tensorboard" / "layerwise"))
    log.Reload()
    logged = {e.step: e.value for e in log.Scalars("rate/layer1")}
    written = [r for r in rows(out / "layers.csv") if r["net"] == "layerwise" and r["layer"] == "layer1"]
    assert logged == {int(r["step"]): pytest.approx(float(r["rate"])) for r in written}
    assert len(log.Scalars("test_accuracy")) == 2


def test_run_yaml_repeats_the_run_bitwise(compared, tmp_path):
    out, _ = compared
    result = lwkd("distill", "--config", out / "run.yaml", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    for name in ("epochs.csv", "layers.csv"):
        assert rows(tmp_path / "again" / name) == rows(out / name)
    for stage in ("teacher", "alone", "uniform", "layerwise"):
        assert same(state(tmp_path / "again", stage)["model"], state(out, stage)["model"])


def test_command_line_goes_before_run_yaml(compared, tmp_path):
    out, _ = compared
    result = lwkd("distill", "--config", out / "run.yaml", "--out", tmp_path, "--epochs", 1, "--seed", 7)
    assert result.exit_code == 0, result.output
    recorded = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (recorded["epochs"], recorded["seed"], recorded["compare"]) == (1, 7, True)


def test_students_start_alike_and_differ_in_rates_only(compared, tmp_path):
    out, _ = compared
    # Constant multipliers of 1 under another name: the same bits as the uniform student.
    trained(tmp_path, "--policy", "constant")
    assert same(state(tmp_path, "layerwise")["model"], state(out, "uniform")["model"])
    assert not same(state(out, "layerwise")["model"], state(out, "uniform")["model"])


def test_no_teacher_equals_the_student_alone_of_compare(compared, tmp_path):
    out, _ = compared
    trained(tmp_path, "--no-teacher")
    assert same(state(tmp_path, "alone")["model"], state(out, "alone")["model"])
    assert not (tmp_path / "layers.png").exists()


def test_teacher_checkpoint_is_used_instead_of_training(compared, tmp_path):
    out, _ = compared
    teacher = out / "checkpoints" / "teacher.pt"
    trained(tmp_path, "--teacher-checkpoint", teacher, *LOADED)
    assert same(state(tmp_path, "layerwise")["model"], state(out, "layerwise")["model"])
    found = {r["stage"]: r for r in rows(tmp_path / "summary.csv")}
    assert found["teacher"]["accuracy"] == {r["stage"]: r for r in rows(out / "summary.csv")}["teacher"]["accuracy"]


def test_students_can_have_fewer_pictures_than_the_teacher(tmp_path):
    result = trained(tmp_path, "--student-limit", 64)
    assert "160 training pictures (64 for the student), 360 test pictures" in result.stdout
    assert state(tmp_path, "teacher")["history"]["steps_per_epoch"] == 5
    assert state(tmp_path, "layerwise")["history"]["steps_per_epoch"] == 2


@pytest.mark.parametrize("limit", [160, 5000])
def test_a_limit_for_students_beyond_the_pictures_is_none(tmp_path, limit):
    result = trained(tmp_path, "--student-limit", limit, "--no-teacher", "--epochs", 1)
    assert "160 training pictures, 360 test pictures" in result.stdout


class Cached:
    """A function of the user that makes its net once."""

    net = None

    def __call__(self, num_classes: int, in_channels: int):
        Cached.net = Cached.net or build("cnn_2", classes=num_classes, channels=in_channels, size=8)
        return Cached.net


cached = Cached()


@pytest.mark.parametrize("options", [("--compare",), ("--teacher", f"{__name__}:cached")])
def test_a_net_that_is_made_once_is_refused(tmp_path, monkeypatch, options):
    monkeypatch.setattr("lwkd.program.distill.train.Training.run", lambda _: pytest.fail("began to train"))
    result = distill(tmp_path, "--student", f"{__name__}:cached", *options)
    assert result.exit_code == 2
    assert "are the same object, or share weights" in result.stderr
    assert "make a new net at every call" in result.stderr


def test_settings_of_torch_are_put_back(tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    trained(tmp_path, "--threads", before[0] + 1, "--no-teacher", "--epochs", 1)
    assert state(tmp_path, "alone")["threads"] == before[0] + 1
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_another_seed_is_another_run(compared, tmp_path):
    out, _ = compared
    trained(tmp_path, "--no-teacher", "--seed", 1)
    assert not same(state(tmp_path, "alone")["model"], state(out, "alone")["model"])


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "adamw", "--lr", 0.01, "--schedule", "step", "--rates", "both"),
        ("--optimizer", "adam", "--lr", 0.01, "--schedule", "constant", "--policy", "decay", "--gamma", 0.5),
        ("--attention-transfer", 100, "--normalize", "--clamp", 0.8, 1.2, "--every", 2, "--policy-momentum", 0.5),
        ("--amp", "bf16", "--augment", "crop-flip", "--image-size", 12, "--pair", "layer2=layer2"),
        ("--policy", "constant", "--multiplier", 0.5, "--multiplier", 1, "--multiplier", 2, "--alpha", 0.5),
    ],
    ids=["adamw_step", "adam_decay", "transfer", "bf16_resized", "multipliers"],
)
def test_options_reach_the_training(compared, tmp_path, options):
    out, _ = compared
    trained(tmp_path, "--epochs", 1, *options)
    assert not same(state(tmp_path, "layerwise")["model"], state(out, "layerwise")["model"])
    recorded = rows(tmp_path / "layers.csv")
    if "--multiplier" in options:
        assert {(r["layer"], float(r["rate"])) for r in recorded} == {("layer1", 0.5), ("layer2", 1.0), ("layer3", 2.0)}
    if "--pair" in options:
        assert {r["layer"] for r in recorded} == {"layer2"}
    if "--clamp" in options:
        assert all(0.6 <= float(r["rate"]) <= 1.5 for r in recorded)  # clamped, then brought to a mean of 1
    if "both" in options:
        assert {r["net"] for r in recorded} == {"uniform", "layerwise"}


def test_divergence_that_is_not_finite_loss_is_an_error_and_keeps_the_checkpoint(tmp_path):
    result = distill(tmp_path, "--no-teacher", "--lr", 1e30, "--epochs", 3)
    assert result.exit_code == 1
    assert "no longer a finite number" in result.stderr
    assert "--lr" in result.stderr
    assert ("of the epoch before is kept" in result.stderr) == ("epoch 1\n" not in result.stderr)


def test_a_loss_that_is_not_finite_in_the_first_epoch_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("lwkd.program.distill.train.Training._totals", lambda _: (float("nan"), 0, 1))
    result = distill(tmp_path, "--no-teacher")
    assert result.exit_code == 1
    assert "no longer a finite number in epoch 1" in result.stderr
    assert "is kept" not in result.stderr
