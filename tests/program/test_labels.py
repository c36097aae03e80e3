"""Multi-label data: COCO's files, what is wrong in them, and the program on a set in their layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program_runs import lwkd, rows, same, state, write_idx

from lwkd.program.data import coco, garments
from lwkd.program.data.datasets import Files, Pictures, load
from lwkd.program.data.loader import Batches
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.signals import signal_of
from lwkd.program.errors import DamagedFileError, ProgramError
from lwkd.program.models.registry import build

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
from PIL import Image

CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
FILES = {
    10: ("colour.jpg", "RGB"),
    11: ("grey.jpg", "L"),
    12: ("print.jpg", "CMYK"),
    13: ("glass.png", "RGBA"),
    14: ("crowd.png", "P"),
    15: ("empty.png", "RGB"),
    16: ("cut.jpg", "RGB"),
    17: ("gone.png", "RGB"),
    18: ("cut.png", "RGB"),
    19: ("tail.jpg", "RGB"),
    20: ("page.jpg", "RGB"),
}
ANNOTATIONS = [
    *((10, 18), (10, 1), (10, 18), (11, 90), (12, 1), (13, 18), (16, 1), (17, 1), (18, 1), (19, 90), (20, 1)),
    *((15, 2), (99, 1)),  # an unknown category, an unknown picture
]


def write_coco(folder: Path, *, sizes: tuple[tuple[int, int], ...] = ((24, 20), (20, 24))) -> None:
    """A set in COCO's layout, of one or several sizes (width, height); grey level 8 times the id."""
    (folder / "annotations").mkdir(parents=True)
    for split in coco.SPLITS:
        (folder / split).mkdir()
        images = []
        for row, (number, (name, mode)) in enumerate(FILES.items()):
            width, height = sizes[row % len(sizes)]
            Image.new("L", (width, height), 8 * number).convert(mode).save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        for name in ("cut.jpg", "cut.png"):
            (folder / split / name).write_bytes((folder / split / name).read_bytes()[:-40])
        (folder / split / "gone.png").unlink()
        (folder / split / "page.jpg").write_text("<html>not found</html>")
        with (folder / split / "tail.jpg").open("ab") as file:
            file.write(b"\n\n")  # some cameras leave such a tail: the picture is whole
        annotations = [{"image_id": i, "category_id": c, "iscrowd": 0} for i, c in ANNOTATIONS]
        annotations.append({"image_id": 14, "category_id": 1, "iscrowd": 1})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        coco.annotation_file(folder, split).write_text(json.dumps(content))


LABELS = {10: [1, 1, 0], 11: [0, 0, 1], 12: [1, 0, 0], 13: [0, 1, 0], 14: [1, 0, 0], 19: [0, 0, 1]}
COUNTED = (
    "6 of 11 pictures, 3 classes",
    "1 annotations of unknown categories left out",
    "1 annotations of unknown pictures left out",
    "1 crowd annotations, which count as any other",
    "1 pictures that are missing left out (gone.png is the first)",
    "1 pictures without an annotation left out (empty.png is the first)",
    "3 pictures that are damaged left out (cut.jpg is the first)",
)


@pytest.mark.parametrize("one_size", [False, True])
def test_annotations_become_labels_and_what_is_left_out_is_counted(tmp_path: Path, one_size: bool) -> None:
    write_coco(tmp_path, sizes=((20, 20),) if one_size else ((24, 20), (20, 24)))
    said: list[str] = []
    data = load("coco", tmp_path, say=said.append)
    assert data.multilabel
    assert (data.classes, data.channels, data.size) == (3, 3, 20 if one_size else 224)
    for split in (data.train, data.test):
        assert isinstance(split, Pictures if one_size else Files)
        assert split.labels.tolist() == list(LABELS.values())
        assert split.labels.dtype == torch.uint8
    assert len(said) == 2, "one line a split"
    for line, split in zip(said, coco.SPLITS, strict=True):
        assert line.startswith(split)
        assert all(count in line for count in COUNTED), line
    assert load("coco", tmp_path, limit=2).train.labels.tolist() == list(LABELS.values())[:2]


@pytest.mark.parametrize("one_size", [False, True])
def test_every_picture_becomes_rgb_beside_its_labels(tmp_path: Path, one_size: bool) -> None:
    write_coco(tmp_path, sizes=((20, 20),) if one_size else ((24, 20), (20, 24)))
    data = load("coco", tmp_path, size=16)
    mean, std = (torch.tensor(moments)[:, None, None] for moments in (data.mean, data.std))
    batches = Batches(data, 3, seed=4)
    grey = {}
    for x, y in (*batches.train(0), *batches.test()):
        assert x.shape[1:] == (3, 16, 16)
        for picture, label in zip(x * std + mean, y.tolist(), strict=True):
            inner = picture[:, 4:-4, 4:-4]  # pictures in memory are shifted, zeros come in
            assert inner.max() - inner.min() < 0.02, "all three channels, every pixel"
            grey.setdefault(round(float(inner.mean()) * 255 / 8), set()).add(tuple(label))
    assert grey == {number: {tuple(label)} for number, label in LABELS.items()}


def test_files_are_cropped_anew_in_every_epoch_and_the_same_with_any_workers(tmp_path: Path) -> None:
    write_coco(tmp_path)
    pattern = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("crowd.png", "glass.png"):
        Image.fromarray(pattern.numpy()).save(tmp_path / "train2017" / name)
    data = load("coco", tmp_path, size=12)
    epochs = [list(Batches(data, 6, seed=3, workers=w).train(epoch)) for w, epoch in ((0, 1), (1, 1), (0, 2))]
    (x, y), (same_x, same_y), (other_x, other_y) = (batches[0] for batches in epochs)
    assert torch.equal(x, same_x)
    assert torch.equal(y, same_y)
    dog, other_dog = (
        pictures[(labels[:, 1] == 1) & (labels[:, 0] == 0)] for pictures, labels in ((x, y), (other_x, other_y))
    )
    assert len(dog) == len(other_dog) == 1
    assert not torch.equal(dog, other_dog)


def test_a_picture_that_goes_bad_later_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = load("coco", tmp_path, size=12)
    path = tmp_path / "val2017" / "glass.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DamagedFileError, match=f"{path} is damaged") as caught:
        list(Batches(data, 6, seed=3).test())
    assert "--resume" in caught.value.remedy


def test_damage_in_the_middle_is_found_when_pictures_go_into_memory(tmp_path: Path) -> None:
    write_coco(tmp_path, sizes=((20, 20),))
    path = tmp_path / "train2017" / "glass.png"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 6
    content[at] ^= 255
    path.write_bytes(bytes(content))
    Image.new("RGB", (21, 20)).save(tmp_path / "train2017" / "crowd.png")
    said: list[str] = []
    data = load("coco", tmp_path, say=said.append)
    assert data.train.labels.tolist() == [label for number, label in LABELS.items() if number not in (13, 14)]
    assert f"2 damaged pictures left out; the first is {path}" in said[-1]


def test_annotation_files_that_are_none(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = coco.annotation_file(tmp_path, "train2017")
    whole = path.read_text()

    def changed(part: str, change: Any) -> str:
        content = json.loads(whole)
        content[part] = change(content[part])
        return json.dumps(content)

    for text, what in (
        (whole[:-30], "it is no JSON"),
        ("[]", "images are not COCO's"),
        (changed("images", lambda i: [*i, {"id": 1}]), "images are not COCO's: KeyError: 'file_name'"),
        (changed("images", lambda i: [*i, i[0]]), "images has the id 10 more than once"),
        (changed("annotations", lambda a: [{**a[0], "image_id": "10"}]), "annotations are not COCO's: TypeError"),
        (changed("categories", lambda c: []), "categories is empty"),
    ):
        path.write_text(text)
        with pytest.raises(DamagedFileError, match=what) as caught:
            load("coco", tmp_path)
        assert str(path) in caught.value.problem
    path.write_text(changed("categories", lambda c: c[:-1]))
    with pytest.raises(ProgramError, match=r"different categories: \[\(18, 'dog'\)\]"):
        load("coco", tmp_path)
    path.write_text(changed("annotations", lambda a: []))
    with pytest.raises(ProgramError, match=r"no picture that .* names can be used; 11 pictures without an annotation"):
        load("coco", tmp_path)
    path.unlink()
    with pytest.raises(ProgramError, match=r"instances_train2017\.json is not there"):
        load("coco", tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 40 made-up garments a split, and a set of 40 pictures made from them."""
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder / "FashionMNIST/raw", zipped=False)
    result = lwkd("garments", "--data-dir", folder, "--out", folder / "garments", "--pictures", 40)
    assert result.exit_code == 0, result.output
    return folder


def test_garments_are_where_their_boxes_say(made: Path) -> None:
    fashion = load("fashion-mnist", made)
    for split, of, count in zip(coco.SPLITS, (fashion.train, fashion.test), (40, 8), strict=True):
        content = json.loads(coco.annotation_file(made / "garments", split).read_text())
        assert len(content["images"]) == len(list((made / "garments" / split).iterdir())) == count
        assert [c["name"] for c in content["categories"]] == list(garments.NAMES)
        assert isinstance(of, Pictures)
        counts = set()
        for image in content["images"]:
            with Image.open(made / "garments" / split / image["file_name"]) as picture:
                canvas = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(56, 56)
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            counts.add(len(own))
            covered = torch.zeros(56, 56, dtype=torch.bool)
            for annotation in own:
                x, y, w, h = annotation["bbox"]
                assert min(x, y) >= 0
                assert max(x + w, y + h) <= 56
                covered[y : y + h, x : x + w] = True
                # One of the split's garments of that class has this area, and is what is seen in the box.
                fit = [
                    g for g in of.images[of.labels == annotation["category_id"] - 1, 0] if _fits(g, canvas, annotation)
                ]
                assert fit, annotation
            assert not canvas[~covered].any()
        assert counts <= {1, 2, 3, 4}
        assert len(counts) > 2


def _fits(garment: torch.Tensor, canvas: torch.Tensor, annotation: dict[str, Any]) -> bool:
    x, y, w, h = annotation["bbox"]
    seen = garment.nonzero()
    (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
    inner = garment[top : bottom + 1, left : right + 1]
    return (
        annotation["area"] == len(seen)
        and (w, h) == (right - left + 1, bottom - top + 1)
        and bool((canvas[y : y + h, x : x + w] == inner).all())
    )


def test_garments_are_the_same_for_a_seed_and_whole_or_not_there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    garments.make_garments(made, made / "again", 40)
    garments.make_garments(made, made / "other", 40, seed=1)
    first, again, other = (contents(made / name) for name in ("garments", "again", "other"))
    assert first == again
    assert first != other
    result = lwkd("garments", "--data-dir", made, "--out", made / "garments", "--pictures", 3)
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert contents(made / "garments") == first
    killed = made / ".half.partial" / "train2017"
    killed.mkdir(parents=True)

    def fail(*_: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(garments, "annotation_file", fail)
    with pytest.raises(ProgramError, match="could not be written: no space left"):
        garments.make_garments(made, made / "half", 4)
    assert not list(made.glob("*half*"))


def test_garments_are_made_by_one_process_at_a_time(made: Path) -> None:
    out = made / "two of them"
    code = "import sys; from pathlib import Path; from lwkd.program.data import garments\n"
    code += "def waits(*_): print('began', flush=True); sys.stdin.read()\n"
    code += "garments._write_split = waits; garments.make_garments(Path(sys.argv[1]), Path(sys.argv[2]), 4)"
    command = [sys.executable, "-c", code, str(made), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"began\n"
        aside = out.with_name(".two of them.partial")
        (aside / "train2017").mkdir()
        second = lwkd("garments", "--data-dir", made, "--out", out, "--pictures", 4)
        assert second.exit_code == 2
        assert "another run writes there" in second.stderr
        assert (aside / "train2017").exists()
        first.kill()
    third = lwkd("garments", "--data-dir", made, "--out", out, "--pictures", 4)
    assert third.exit_code == 0, third.output
    assert f"--data-dir '{out}'" in third.stdout
    assert {path.name for path in out.iterdir()} == {"train2017", "val2017", "annotations"}


TINY = (
    *("--batch-size", 10, "--threads", 1, "--teacher", "cnn_2", "--student", "cnn_2", "--lr", 0.05),
    *("--teacher-epochs", 1, "--epochs", 2, "--image-size", 16),
)


def test_distil_on_coco_and_go_on(made: Path, tmp_path: Path) -> None:
    given = ("distill", "--data", "coco", "--data-dir", made / "garments", *TINY)
    signal = ("--signal", "hessian", "--probes", 1, "--samples", 2)  # by the binary cross-entropy
    whole = lwkd(*given, *signal, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "mAP after the last epoch" in whole.stdout
    assert "test mAP" in whole.stdout
    epochs = rows(tmp_path / "whole" / "epochs.csv")
    assert list(epochs[0]) == ["net", "epoch", "train_loss", "test_mAP", "test_OF1", "test_CF1", "lr"]
    summary = {r["stage"]: r for r in rows(tmp_path / "whole" / "summary.csv")}
    for stage, row in summary.items():
        last = [e for e in epochs if e["net"] == stage][-1]
        assert [row[name] for name in ("mAP", "OF1", "CF1")] == [last[f"test_{n}"] for n in ("mAP", "OF1", "CF1")]
    # The same, stopped after the student's first epoch: the checkpoint before the last one is put in its place.
    half = tmp_path / "half"
    (tmp_path / "whole").rename(half)
    expected = state(half, "layerwise")
    before = half / "checkpoints" / "layerwise.previous.pt"
    before.replace(half / "checkpoints" / "layerwise.pt")
    assert state(half, "layerwise")["epoch"] == 1
    result = lwkd("distill", "--resume", "--out", half)
    assert result.exit_code == 0, result.output
    assert "continuing in epoch 2, batch 0" in result.stdout
    assert rows(half / "epochs.csv") == epochs
    assert same(state(half, "layerwise")["model"], expected["model"])


def test_a_student_alone_learns_by_the_binary_cross_entropy(made: Path, tmp_path: Path) -> None:
    given = ("distill", "--data", "coco", "--data-dir", made / "garments", *TINY, "--no-teacher", "--lr", 0)
    assert lwkd(*given, "--augment", "none", "--weight-decay", 0, "--out", tmp_path).exit_code == 0
    # At a rate of 0 the first epoch can be gone through again with the weights of the end.
    data = load("coco", made / "garments", size=16, augment="none")
    net = build("cnn_2", classes=10, channels=3, size=16)
    net.load_state_dict(state(tmp_path, "alone")["model"])
    losses = []
    for x, y in Batches(data, 10, seed=0).train(0):
        p = net.train()(x).double().sigmoid()
        losses.append(-torch.where(y == 1, p, 1 - p).log().sum(1).mean().item())
    assert float(rows(tmp_path / "epochs.csv")[0]["train_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_hessian_of_many_labels_is_that_of_their_loss() -> None:
    signal = signal_of(Settings(data="coco", signal="hessian"))
    z, t = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = 1 / (1 + (-t).exp())
    expected = -(p * torch.sigmoid(z).log() + (1 - p) * torch.sigmoid(-z).log()).sum(1).mean()
    assert torch.allclose(signal.criterion(z, t), expected)
    assert signal_of(Settings(data="cifar10", signal="hessian")).criterion is None
    assert signal_of(Settings(data="coco", signal="hessian", wrt="input")).criterion is None
    with pytest.raises(ProgramError, match="--curvature ggn is the Gauss-Newton matrix"):
        signal_of(Settings(data="coco", signal="hessian", curvature="ggn"))
