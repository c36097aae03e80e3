"""Nets of transformers, built from tiny configs with random weights: pairs, owners, maps, probabilities and padding.

Every divergence is computed a second time, row by row and without padding, in float64 and by other code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.layout import Layout
from lwkd.pairing import Pairing, pair
from lwkd.signals import Attention, Jacobian

transformers = pytest.importorskip("transformers")

CLOSE = 2e-4
"""Features are float32 and summed over paths that differ by padding; distances of 1e-2 keep four digits."""

WIDE = {"initializer_range": 0.4}  # the usual 0.02 makes all maps of a tiny net nearly uniform
TEXT = {
    "vocab_size": 40,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **WIDE,
}
AUDIO = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}


def ids(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 40, (rows, tokens), generator=torch.Generator().manual_seed(1))


def bert(depth: int, width: int, head: str = "SequenceClassification") -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**TEXT, **sizes))


def picture(name: str, depth: int, width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    config = getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}ForImageClassification")(
        config(**sizes, num_attention_heads=2, image_size=16, patch_size=4, hidden_dropout_prob=0.0)
    )


def gpt2(depth: int, width: int) -> nn.Module:
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=width, n_layer=depth, n_head=2, **drop, **WIDE)
    )


def gpt(depth: int, width: int) -> nn.Module:
    """The first one, whose blocks return lists."""
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=40, n_embd=width, n_layer=depth, n_head=2, **drop, **WIDE)
    )


def xlnet(depth: int, width: int) -> nn.Module:
    """Its tensors are (N, B, C): it turns the token ids before it looks them up."""
    sizes = {"d_model": width, "d_inner": 2 * width, "n_layer": depth, "n_head": 2}
    return transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=40, dropout=0.0, summary_last_dropout=0.0, **sizes, **WIDE)
    )


def t5(depth: int, width: int) -> nn.Module:
    sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 2, "num_layers": depth, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


def wav2vec2(depth: int, width: int, head: str) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    more = {"num_attention_heads": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return getattr(transformers, f"Wav2Vec2For{head}")(transformers.Wav2Vec2Config(**AUDIO, **sizes, **more))


def swin(depths: list[int], width: int) -> nn.Module:
    config = {"image_size": 32, "patch_size": 2, "embed_dim": width, "num_heads": [2, 2, 2], "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(depths=depths, **config))


TEXTS = {"input_ids": ids()}
PICTURE = {"pixel_values": torch.rand(2, 3, 16, 16)}
SOUND = {"input_values": torch.rand(2, 150)}
TRANSLATED = {"input_ids": ids(), "decoder_input_ids": ids(tokens=7)}
FAMILIES: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, Tensor], list[str], bool]] = {
    "bert": (bert, TEXTS, ["bert.encoder.layer"], True),
    "bert with a language head": (lambda *sizes: bert(*sizes, "MaskedLM"), TEXTS, ["bert.encoder.layer"], True),
    "vit": (lambda n, w: picture("ViT", n, w), PICTURE, ["vit.layers"], False),
    "deit": (lambda n, w: picture("DeiT", n, w), PICTURE, ["deit.layers"], False),
    "gpt": (gpt, TEXTS, ["transformer.h"], True),
    "gpt2": (gpt2, TEXTS, ["transformer.h"], False),
    "xlnet": (xlnet, TEXTS, ["transformer.layer"], True),
    "t5": (t5, TRANSLATED, ["encoder.block", "decoder.block"], False),
    "wav2vec2": (lambda n, w: wav2vec2(n, w, "SequenceClassification"), SOUND, ["wav2vec2.encoder.layers"], True),
    "wav2vec2 with a language head": (lambda n, w: wav2vec2(n, w, "CTC"), SOUND, ["wav2vec2.encoder.layers"], True),
}


@pytest.mark.parametrize("depth", [6, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_teacher_and_owns_itself(family: str, depth: int):
    net, example, blocks, post_norm = FAMILIES[family]
    pairing = pair(net(depth, 4), net(2 * depth, 8), example)
    places = [f"{block}.{{}}" for block in blocks]
    assert list(pairing.student_layers) == [place.format(i) for place in places for i in range(depth)]
    assert list(pairing.teacher_layers) == [place.format(2 * i + 1) for place in places for i in range(depth)]
    assert all((p.student_layout.before is not None) == post_norm for p in pairing)
    for p in pairing:
        inside = {name for name in (*pairing.owners(), *pairing.tail) if name.startswith(f"{p.student}.")}
        assert inside
        assert inside <= set(p.parameters)
    # What learns behind the last block follows no map: heads, and a final norm.
    assert not any(block in name for name in pairing.tail for block in blocks)


def test_stages_of_swin():
    pairing = pair(swin([1, 2, 1], 4), swin([2, 2, 2], 8), {"pixel_values": torch.rand(2, 3, 32, 32)})
    stages = [f"swin.encoder.layers.{i}" for i in range(3)]
    assert list(pairing.student_layers) == list(pairing.teacher_layers) == stages


def test_blocks_of_sam_and_its_neck():
    def sam(depth: int, width: int) -> nn.Module:
        sizes = {"hidden_size": width, "mlp_dim": 2 * width, "num_hidden_layers": depth, "num_attention_heads": 2}
        return transformers.SamVisionModel(
            transformers.SamVisionConfig(
                **sizes, image_size=16, patch_size=4, output_channels=6, global_attn_indexes=[1]
            )
        )

    pairing = pair(sam(2, 4), sam(4, 8), PICTURE)
    for layers, expected in ((pairing.student_layers, "01"), (pairing.teacher_layers, "12")):
        assert list(layers) == [f"vision_encoder.{layer}" for layer in (*(f"layers.{i}" for i in expected), "neck")]
    assert [p.student_layout.kind for p in pairing] == ["channels_last", "channels_last", "channels_first"]


def test_towers_of_a_picture_and_of_words():
    def clip(depth: int, width: int) -> nn.Module:
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 8, "num_attention_heads": 2}
        text = {**sizes, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39}
        vision = {**sizes, "image_size": 16, "patch_size": 4}
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))

    pairing = pair(clip(2, 4), clip(4, 8), {"input_ids": ids(tokens=12), **PICTURE})
    towers = {"vision_model": Layout("tokens", 1, (4, 4)), "text_model": Layout("tokens")}
    expected = [(f"{name}.encoder.layers.{i}", layout) for name, layout in towers.items() for i in range(2)]
    assert [(p.student, p.student_layout) for p in pairing] == expected
    assert list(pairing.teacher_layers) == [f"{name}.encoder.layers.{i}" for name in towers for i in (1, 3)]


# Distances


def jsd(q: Tensor, p: Tensor) -> float:
    q, p = q.double() / q.double().sum(), p.double() / p.double().sum()
    m = (q + p) / 2
    return float(0.5 * sum(torch.xlogy(x, x).sum() - torch.xlogy(x, m).sum() for x in (q, p)))


def nets(make: Callable[[int, int], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return make(2, 8, **options), make(4, 8, **options).eval()


def measured(
    student: nn.Module, teacher: nn.Module, pairing: Pairing, batch: dict[str, Tensor], signal: Any = "attention"
) -> list[float]:
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, signal=signal
    )
    with torch.no_grad():
        teacher(**batch)
    out = student(**batch)
    (out if isinstance(out, Tensor) else out.logits).sum().backward()
    optimizer.step()
    found = list(optimizer.divergences.values())
    optimizer.close()
    return found


def padded(tokens: Tensor, lengths: Sequence[int], more: int) -> dict[str, Tensor]:
    full = torch.cat([tokens, tokens.new_full((len(tokens), more), 5)], 1)
    mask = (torch.arange(full.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, full, 0), "attention_mask": mask}


def rows(batch: dict[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """Each row alone, without padding."""
    return [{name: t[i : i + 1, :n] for name, t in batch.items()} for i, n in enumerate(lengths)]


def bert_sums(net: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The residual sums in front of each block's last norm, (1, N, C), from the parts of the blocks."""
    with torch.no_grad():
        hidden = net(**batch, output_hidden_states=True).hidden_states
        attended = [block.attention(x)[0] for block, x in zip(net.bert.encoder.layer, hidden, strict=False)]
        attended = [x if x.dim() == 3 else x[None] for x in attended]
        return [b.output.dense(b.intermediate(x)) + x for b, x in zip(net.bert.encoder.layer, attended, strict=True)]


def gpt2_sums(net: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *x: found.append(x[2])) for block in net.transformer.h]
    with torch.no_grad():
        net(**batch)
    for handle in handles:
        handle.remove()
    return [x if isinstance(x, Tensor) else x[0] for x in found]


LENGTHS = [9, 6, 4]


@pytest.mark.parametrize(("make", "sums"), [(bert, bert_sums), (gpt2, gpt2_sums)], ids=["bert", "gpt2"])
def test_maps_are_of_what_varies_and_of_tokens_only(make: Any, sums: Any):
    """Behind the norm all maps of BERT were uniform, and 36 more pad tokens turned the ranking of the layers round."""
    student, teacher = nets(make)
    short, long = padded(ids(3), LENGTHS, 0), padded(ids(3), LENGTHS, 36)
    pairing = pair(student, teacher, short)
    expected = [0.0, 0.0]
    for row in rows(short, LENGTHS):
        maps_S, maps_T = ([x[0].double().square().sum(-1) for x in sums(net, row)] for net in (student, teacher))
        expected = [e + jsd(maps_S[i], maps_T[2 * i + 1]) / 3 for i, e in enumerate(expected)]
    assert min(expected) > 1e-3
    for batch in (short, long):
        assert measured(student, teacher, pairing, batch) == pytest.approx(expected, rel=CLOSE)
    wide = {**long, "attention_mask": long["attention_mask"].float()}
    assert measured(student, teacher, pairing, wide) == pytest.approx(expected, rel=CLOSE)


def test_padding_of_an_encoder_and_its_decoder():
    """Masks of the encoder and of the decoder, whose padding nothing but the labels may say."""
    student, teacher = nets(t5)
    source, target, lengths = ids(3), ids(3, 8), [5, 8, 3]

    def batch(more: int) -> dict[str, Tensor]:
        labels = torch.cat([target, target.new_zeros(3, more)], 1)
        real = torch.arange(8 + more) < torch.tensor(lengths)[:, None]
        return {**padded(source, LENGTHS, more), "labels": torch.where(real, labels, -100)}

    pairing = pair(student, teacher, batch(0))
    short = measured(student, teacher, pairing, batch(0))
    assert measured(student, teacher, pairing, batch(11)) == pytest.approx(short, rel=CLOSE)
    alone = []
    for i in range(3):
        row = {name: t[i : i + 1] for name, t in batch(0).items()}
        cut = {n: t[:, : lengths[i] if n == "labels" else LENGTHS[i]] for n, t in row.items()}
        alone.append(measured(student, teacher, pairing, cut))
    assert short == pytest.approx([sum(layer) / 3 for layer in zip(*alone, strict=True)], rel=CLOSE)
    assert min(short) > 1e-4


@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("signal", ["attention", lwkd.signals.Jacobian(wrt="parameters")])
@pytest.mark.parametrize("told", ["student", "teacher"])
def test_padding_that_one_net_alone_is_told_of_counts_for_both(told, signal, teacher_first):
    """The labels of a decoder, which the student's loss needs and the teacher's pass does not."""
    student, teacher = nets(t5)
    labels = ids(3, 8).masked_fill(torch.arange(8) >= torch.tensor([5, 8, 3])[:, None], -100)
    batch = {**padded(ids(3), LENGTHS, 4), "decoder_input_ids": ids(3, 8)}
    pairing = pair(student, teacher, batch)

    def measured(*told: str) -> list[float]:
        optimizer = lwkd.LayerwiseOptimizer(
            torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, signal=signal
        )
        with lwkd.Capture(student, teacher, pairing) as capture:
            for whose in ("teacher", "student") if teacher_first else ("student", "teacher"):
                with torch.set_grad_enabled(whose == "student"):
                    (student if whose == "student" else teacher)(
                        **batch, **({"labels": labels} if whose in told else {})
                    )
            transfer = lwkd.losses.attention_transfer(capture.student, capture.teacher)
        optimizer.step()
        optimizer.close()
        return [*optimizer.divergences.values(), float(transfer.detach())]

    expected = measured("student", "teacher")
    assert measured(told) == pytest.approx(expected, rel=CLOSE)
    assert measured() != pytest.approx(expected, rel=0.1), "and the padding matters"


class Encoder(nn.Module):
    """Of torch, post-norm; its teacher runs on nested tensors where a mask is given, and its layers get them."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(block, depth), nn.Linear(width, 3)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.first(x), src_key_padding_mask=src_key_padding_mask)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_key_padding_masks_and_nested_tensors():
    student, teacher = nets(Encoder)
    x = torch.rand(3, 9, 5)

    def batch(more: int) -> dict[str, Tensor]:
        full = torch.cat([x, torch.full((3, more, 5), 7.0)], 1)
        return {"x": full, "src_key_padding_mask": torch.arange(9 + more) >= torch.tensor(LENGTHS)[:, None]}

    pairing = pair(student, teacher, batch(0))
    assert [p.student_layout.before for p in pairing] == [f"encoder.layers.{i}.norm2" for i in range(2)]
    alone = [measured(student, teacher, pairing, row) for row in rows(batch(0), LENGTHS)]
    expected = [sum(layer) / 3 for layer in zip(*alone, strict=True)]
    for more in (0, 13):
        assert measured(student, teacher, pairing, batch(more)) == pytest.approx(expected, rel=CLOSE)


def test_the_logits_of_padding_are_not_compared():
    student, teacher = nets(gpt2)
    short, long = padded(ids(3), LENGTHS, 0), padded(ids(3), LENGTHS, 20)
    pairing = pair(student, teacher, short, head=True)
    expected = 0.0
    for row in rows(short, LENGTHS):
        with torch.no_grad():
            z_S, z_T = (net(**row).logits[0].double().softmax(-1) for net in (student, teacher))
        expected += sum(jsd(q, p) for q, p in zip(z_S, z_T, strict=True)) / len(z_S) / 3
    for batch in (short, long):
        assert measured(student, teacher, pairing, batch)[-1] == pytest.approx(expected, rel=CLOSE)


def test_jacobians_do_not_move_with_padding():
    """Maps of a measuring pass have no padded positions either."""
    student, teacher = nets(Encoder)
    x = torch.rand(1, 6, 5)

    def batch(
        more: int,
    ) -> dict[str, Tensor]:  # of one row: its tokens have the same tangent whatever stands behind them
        full = torch.cat([x, torch.full((1, more, 5), 7.0)], 1)
        return {"x": full, "src_key_padding_mask": torch.arange(6 + more)[None] >= 6}

    pairing, signal = pair(student, teacher, batch(0)), Jacobian()
    found = [signal.measure(student, teacher, pairing, batch(more)) for more in (0, 14)]
    assert torch.allclose(*found, rtol=CLOSE, atol=0)
    assert float(found[0][:, -1].min()) > 1e-3


def test_padding_of_a_layer_that_cannot_be_known_is_refused():
    class Halves(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.words, self.merge = nn.Embedding(40, width), nn.Conv1d(width, 2 * width, 2, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.merge(self.words(input_ids).transpose(1, 2)).mean(2)

    student, teacher = Halves(4), Halves(8).eval()
    batch = padded(ids(2, 8), [8, 8], 0)
    pairing = pair(student, teacher, batch, layers={"merge": "merge"})
    assert measured(student, teacher, pairing, batch)[0] > 0
    batch = padded(ids(2, 8), [8, 6], 0)
    with pytest.raises(
        ValueError, match=r"layer 'merge' has 4 positions, and the mask of the batch 8, some of them pad"
    ):
        measured(student, teacher, pairing, batch)


# Probabilities

ATTENTION = {
    "bert": (bert, "bert.encoder.layer.{}.attention.self", {}),
    "gpt2": (gpt2, "transformer.h.{}.attn", {}),
    "t5": (t5, "encoder.block.{}.layer.0.SelfAttention", {"decoder_input_ids": ids(3, 4)}),
}


def attention_pairs(place: str) -> dict[str, str]:
    return {place.format(i): place.format(2 * i + 1) for i in range(2)}


@pytest.mark.parametrize("family", ATTENTION)
def test_probabilities_of_attention_modules(family: str):
    make, place, more = ATTENTION[family]
    student, teacher = nets(make)
    batch = {**padded(ids(3), LENGTHS, 3), **more}
    for net in (student, teacher):
        net.set_attn_implementation("eager")
    pairing = pair(student, teacher, batch, layers=attention_pairs(place))
    with torch.no_grad():
        found = [net(**batch, output_attentions=True) for net in (student, teacher)]
    probabilities = [out.encoder_attentions if family == "t5" else out.attentions for out in found]
    expected = []
    for i in range(2):
        p_S, p_T = (p.double().mean(1) for p in (probabilities[0][i], probabilities[1][2 * i + 1]))
        each = [jsd(p_S[b, n], p_T[b, n]) for b, length in enumerate(LENGTHS) for n in range(length)]
        expected.append(sum(each) / len(each))
    signal = Attention(source="probabilities")
    assert measured(student, teacher, pairing, batch, signal) == pytest.approx(expected, rel=CLOSE)
    owners = pairing.owners()
    for i in range(2):  # the feed-forward part too
        inside = place.partition("{}")[0] + f"{i}."
        assert {owners.get(name) for name, _ in student.named_parameters() if name.startswith(inside)} == {i}
    for net in (student, teacher):
        net.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attn_implementation='eager'"):
        measured(student, teacher, pairing, batch, signal)


class Attends(nn.Module):
    def __init__(self, depth: int, width: int, need_weights: bool = True) -> None:
        super().__init__()
        self.first, self.need_weights = nn.Linear(5, width), need_weights
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x, x, key_padding_mask=key_padding_mask, need_weights=self.need_weights)[0]


def test_probabilities_of_torchs_attention():
    student, teacher = nets(Attends)
    mask = torch.arange(6) >= torch.tensor([6, 4])[:, None]
    batch, signal = {"x": 3 * torch.rand(2, 6, 5), "key_padding_mask": mask}, Attention(source="probabilities")
    pairing = pair(student, teacher, batch, layers={"attention": "attention"})
    with torch.no_grad():
        p_S, p_T = (net.attention(*3 * (net.first(batch["x"]),), mask)[1] for net in (student, teacher))
    each = [jsd(p_S[b, n], p_T[b, n]) for b, length in enumerate([6, 4]) for n in range(length)]
    assert measured(student, teacher, pairing, batch, signal) == pytest.approx([sum(each) / 10], rel=CLOSE)
    student.need_weights = False
    with pytest.raises(ValueError, match=r"'attention' returned no attention probabilities .*need_weights=True"):
        measured(student, teacher, pairing, batch, signal)


def test_blocks_have_no_probabilities():
    student, teacher = nets(bert)
    pairing = pair(student, teacher, TEXTS)
    with pytest.raises(ValueError, match=r"expects self-attention probabilities .*Pair the attention modules"):
        measured(student, teacher, pairing, TEXTS, Attention(source="probabilities"))


# Adapters


class LowRank(nn.Module):
    """A linear layer with a frozen weight and a trained product of two thin ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def by_hand(student: nn.Module) -> nn.Module:
    student.requires_grad_(False)
    for block in student.bert.encoder.layer:
        attention = block.attention.self
        attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)
    return student


def by_peft(student: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(student, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@pytest.mark.parametrize("adapt", [by_hand, by_peft])
def test_lora_students(adapt: Callable[[nn.Module], nn.Module]):
    student, teacher = nets(bert)
    student, batch = adapt(student), TEXTS
    pairing = pair(student, teacher, batch)
    assert [name[-len("bert.encoder.layer.0") :] for name in pairing.names] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
    ]
    assert list(pairing.teacher_layers) == ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    owners = pairing.owners()
    trained = {name: owners.get(name) for name, p in student.named_parameters() if p.requires_grad and "lora" in name}
    assert len(trained) == 8
    assert all(f".layer.{owner}." in name for name, owner in trained.items())
    assert pairing.silent_layers(student) == ()
    assert min(measured(student, teacher, pairing, batch)) > 1e-3
