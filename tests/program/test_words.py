"""Documents: where they are found, what becomes of them, the nets that read them, the program on a tiny corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_runs import recipe, trial
from program_runs import lwkd as program
from program_runs import rows, same

import lwkd
from lwkd.program.compare import trial as trials
from lwkd.program.compare.pictures import _loaded
from lwkd.program.data import words
from lwkd.program.data.datasets import Data, load
from lwkd.program.data.loader import Batches
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.signals import signal_of
from lwkd.program.errors import DamagedFileError, ProgramError
from lwkd.program.models.registry import build
from lwkd.program.models.text import TextNet
from lwkd.program.seeds import repeatable
from lwkd.signals import Hessian, Jacobian

CLASSES = ("business", "sport", "tech")
EACH = 20
EXTRA = {"again.txt": "MARKET  common\n\nbusiness0 ", "empty.txt": " . \n"}
RUN = ("--data", "bbc-news", "--image-size", 12, "--batch-size", 8, "--threads", 1, "--epochs", 2)
PAIR = {"embedding": "embedding", "layer1": "layer2", "layer2": "layer4"}


def write_corpus(folder: Path) -> None:
    """Documents of a class share a word, all share another, and each has one of its own."""
    for name, topic in zip(CLASSES, ("market", "match", "chip"), strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(EACH):
            (folder / name / f"{number:03}.txt").write_text(
                f"{topic} common\n{name}{number}" + " common" * (number % 3)
            )
    for name, text in EXTRA.items():
        (folder / "business" / name).write_text(text)
    (folder / "tech" / "old.txt").write_bytes(b"chip \xa3 common old")  # Latin-1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "bbc-news")
    _loaded.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the documents of this machine."""
    monkeypatch.setattr(words, "PACKAGE", "lwkd_test_corpus")


def documents(data: Data) -> list[tuple[int, ...]]:
    return [tuple(ids) for split in (data.train, data.test) for ids in split.images.tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["folder", "package"])
def test_documents_are_found_counted_and_split(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / words.PACKAGE
    write_corpus(tmp_path / "bbc-news" if layout == "folder" else package / "bbcnews" / "data")
    if layout == "package":
        for place in (package, package / "bbcnews"):
            (place / "__init__.py").write_text("raise RuntimeError('its code is not run')")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    said: list[str] = []
    data = load("bbc-news", tmp_path, say=said.append)
    assert "63 documents" in said[0]
    assert "2 of them left out" in said[0]
    assert (len(data.train), len(data.test), data.classes, data.size, data.text) == (48, 13, 3, 128, True)
    assert (data.train.images.dtype, data.train.labels.dtype) == (torch.int64, torch.int64)  # type: ignore[union-attr]
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == [20, 20, 21]
    assert "bbc-news" in program("doctor", "--data-dir", tmp_path).output
    assert same(load("bbc-news", tmp_path, limit=30).train.images, data.train.images[:30])  # type: ignore[union-attr]


def test_a_story_that_occurs_again_is_in_one_split_only(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = documents(load("bbc-news", corpus))
    monkeypatch.setattr(words, "OPENING", 10**6)
    for name in CLASSES:  # in full, and with another end: a longer document begins as a shorter one does
        for path in list((corpus / "bbc-news" / name).glob("0*.txt")):
            path.with_name(f"x{path.name}").write_text(path.read_text())
    assert documents(load("bbc-news", corpus)) == once
    monkeypatch.setattr(words, "OPENING", 3)
    for path in (corpus / "bbc-news").glob("*/x*.txt"):
        path.write_text(path.read_text() + " update")
    assert documents(load("bbc-news", corpus)) == once


def test_ids_are_of_words_of_the_training_split_and_padding_stands_at_the_end(corpus: Path) -> None:
    data = load("bbc-news", corpus, size=4)
    train, test = data.train.images, data.test.images  # type: ignore[union-attr]
    assert (train[:, 1] == 2).all()  # "common" is the most frequent word
    assert (train[:, 0] > words.UNKNOWN).all()
    assert (test[:, 0] > words.UNKNOWN).all()
    assert (train[:, 2] > words.UNKNOWN).all()
    assert (test[:, 2] == words.UNKNOWN).all()  # each document's own word
    assert set(train[:, 3].tolist()) == {words.PADDING, 2}
    longer = load("bbc-news", corpus, size=6)
    assert torch.equal(longer.train.images[:, :4], train)  # type: ignore[union-attr]
    assert torch.equal(longer.train.labels, data.train.labels)
    assert (longer.train.images[:, 5] == words.PADDING).all()  # type: ignore[union-attr]


def test_batches_are_ids(corpus: Path) -> None:
    data = load("bbc-news", corpus, size=5)
    batches = Batches(data, 8, seed=0)
    ids, labels = next(batches.train(0))
    assert (ids.shape, ids.dtype, labels.shape) == ((8, 5), torch.int64, (8,))
    assert torch.equal(torch.cat([x for x, _ in batches.test()]), data.test.images)  # type: ignore[union-attr]


def test_what_cannot_be_read_is_said(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ProgramError, match=r"(?s)lwkd_test_corpus is not installed.*bbc-news/CLASS/\*\.txt"):
        load("bbc-news", tmp_path / "elsewhere")
    (tmp_path / "flat" / "bbc-news").mkdir(parents=True)
    with pytest.raises(DamagedFileError, match="0 folders"):
        load("bbc-news", tmp_path / "flat")
    with pytest.raises(ProgramError, match="--augment crop is of pictures"):
        load("bbc-news", corpus, augment="crop")


def nets() -> tuple[TextNet, TextNet]:
    torch.manual_seed(0)
    return tuple(TextNet(n, 16, classes=3, length=12, words=30) for n in (2, 4))  # type: ignore[return-value]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """The same documents with little padding and with more."""
    ids = torch.randint(1, 30, (8, 8), generator=torch.Generator().manual_seed(1))
    ids[0, 3:], ids[1, 5:] = words.PADDING, words.PADDING
    return ids, torch.cat([ids, torch.full((8, 4), words.PADDING)], 1)


@pytest.mark.parametrize("training", [True, False])
def test_padding_has_no_influence_on_logits(training: bool) -> None:
    net = nets()[1].train(training)
    few, many = padded()
    with torch.set_grad_enabled(training):
        logits = net(many)
        torch.testing.assert_close(logits, net(few))
        torch.testing.assert_close(logits[:1], net(few[:1, :3]))
    assert net(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    "signal", [None, Hessian(), Hessian(curvature="hessian"), Jacobian(estimator="output")], ids=repr
)
def test_measurements_are_the_same_with_any_padding(signal: Any) -> None:
    """lwkd is told of no mask: outputs that are zero at padding are how it knows."""
    student, teacher = nets()
    pairing = lwkd.pair(student, teacher, torch.ones(2, 8, dtype=torch.int64), layers=PAIR)

    def measured(ids: torch.Tensor) -> torch.Tensor:
        if signal is not None:
            return signal.measure(student, teacher.eval(), pairing, ids)
        optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), 0.0), student, teacher, pairing)
        teacher.eval()(ids)
        student(ids).sum().backward()
        optimizer.step()
        optimizer.close()
        return torch.tensor(list(optimizer.divergences.values()))[:, None]

    few, many = (measured(ids) for ids in padded())
    assert (few[:, 0] != 0).all()
    torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-7)


def test_layers_are_paired_every_other_one() -> None:
    student, teacher = nets()
    pairing = lwkd.pair(student, teacher, torch.ones(2, 8, dtype=torch.int64))
    assert list(zip(pairing.student_layers, pairing.teacher_layers, strict=True)) == [
        ("layer1", "layer2"),
        ("layer2", "layer4"),
    ]
    assert {n for n, _ in student.named_parameters()} - set(pairing.owners()) == {
        *("norm.weight", "norm.bias", "head.weight", "head.bias")
    }


@pytest.mark.parametrize(
    ("name", "channels", "says"),
    [
        ("text_4_64", 1, r"text_4_64 reads documents \(--data bbc-news\)"),
        ("cnn_8", 0, "'cnn_8' does not read documents"),
        ("timm:resnet18", 0, "does not read documents"),
        ("text_4_65", 0, "a multiple of 16"),
        ("text_0_16", 0, "does not read documents"),
    ],
)
def test_pictures_and_documents_are_not_confused(name: str, channels: int, says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        build(name, classes=3, channels=channels, size=16)


@pytest.mark.parametrize(
    "options",
    [
        {"signal": "jacobian"},
        {"signal": "jacobian", "estimator": "difference"},
        {"signal": "hessian", "wrt": "input"},
    ],
)
def test_words_have_no_derivative(options: dict[str, Any]) -> None:
    with pytest.raises(ProgramError, match="ids of words, which have no derivative"):
        signal_of(Settings(data="bbc-news", **options))
    of_layers = Settings(data="bbc-news", signal="jacobian", estimator="output", wrt="input")
    assert signal_of(of_layers) == Jacobian(estimator="output")


def test_the_other_signals_are_measured_on_words(corpus: Path, tmp_path: Path) -> None:
    found = {}
    for signal, more in (("attention", ()), ("hessian", ()), ("jacobian", ("--wrt", "parameters"))):
        out = tmp_path / signal
        names = ("--teacher", "text_2_16", "--student", "text_1_16", "--pair", "embedding=embedding")
        options = (*names, "--pair", "layer1=layer2", "--teacher-epochs", 1, "--signal", signal, "--every", 2, *more)
        result = program("distill", *RUN, *options, "--data-dir", corpus, "--out", out)
        assert result.exit_code == 0, result.output
        found[signal] = [float(row["divergence"]) for row in rows(out / "layers.csv")]
        assert max(found[signal]) > 0
    result = program("distill", *RUN, "--signal", "jacobian", "--data-dir", corpus, "--out", tmp_path / "no")
    assert result.exit_code == 2
    assert "which have no derivative" in result.output


TEXT: dict[str, Any] = {
    "data": "bbc-news",
    "image_size": 12,
    "teacher": "text_4_16",
    "student": "text_2_16",
    "start": {"kind": "copy", "layers": {"layer1": "layer2", "layer2": "layer4"}},
    "pair": [f"{student}={teacher}" for student, teacher in PAIR.items()],
    "student_limit": 16,
    "batch_size": 8,
    "validation": 20,
}


def test_a_student_that_takes_every_other_layer_is_compared(corpus: Path) -> None:
    plain = recipe(**TEXT)
    of = replace(
        plain,
        settings=replace(plain.settings, data_dir=str(corpus)),
        teacher_settings=replace(plain.teacher_settings, data_dir=str(corpus)),
        arms={name: replace(a, settings=replace(a.settings, data_dir=str(corpus))) for name, a in plain.arms.items()},
    )
    one = trial(of, "attention")
    weights = one.teacher.run()["weights"]
    with repeatable(1):
        run = trials._Run(one, replace(one.arm.settings, lr=one.lr, seed=0), weights)
        for name, value in run.student.state_dict().items():
            source = name.replace("layer2", "layer4").replace("layer1", "layer2")
            assert torch.equal(value, weights[source]), name
        found = run.result()
    assert found["finite"]
    assert found["divergences"][-1][1:].gt(0).all()
    assert found["rates"].shape == (4, 3)
    assert same(one.run(weights), found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["kd", "kd+jacobian"]}, r"method kd\+jacobian differentiates by the input"),
        ({"methods": ["kd+hessian"]}, r"method kd\+hessian differentiates by the input"),
        ({"shift": "blurred"}, "shift: blurred is of pictures"),
        ({"arms": {"a": {"rates": "layerwise", "signal": "jacobian"}}}, "ids of words"),
    ],
)
def test_recipes_of_documents_are_checked(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        recipe(**{**TEXT, **changes})
