"""What counts as padding, in every form in which nets are told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.inputs import Inputs
from lwkd.nets.layout import Layout
from lwkd.nets.padding import Padding
from lwkd.signals import Jacobian

KEPT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
ADDED = torch.where(KEPT == 1, 0.0, -1e4)
QUERIES = KEPT[:, None, None, :].expand(2, 1, 4, 4)
CAUSAL = torch.ones(4, 4).tril()


class Net(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> None:
        """Never called."""


FORMS: dict[str, Inputs] = {
    "ones and zeros": Inputs((), {"attention_mask": KEPT}),
    "floats": Inputs((), {"attention_mask": KEPT.float()}),
    "bool": Inputs((), {"attention_mask": KEPT.bool()}),
    "added to the scores": Inputs((), {"attention_mask": ADDED}),
    "by place": Inputs((KEPT, KEPT)),
    "a batch in one argument": Inputs(({"input_ids": KEPT, "attention_mask": KEPT},)),
    "per query": Inputs((), {"attention_mask": QUERIES.bool() & CAUSAL.bool()}),
    "per query, added": Inputs((), {"attention_mask": torch.where(QUERIES * CAUSAL == 1, 0.0, -math.inf)}),
    "torch's": Inputs((), {"key_padding_mask": KEPT == 0}),
    "torch's, by place": Inputs((KEPT, None, KEPT == 0)),
    "torch's, added": Inputs((), {"src_key_padding_mask": torch.where(KEPT == 1, 0.0, -math.inf)}),
}
NONE: dict[str, Inputs] = {
    "no mask": Inputs((KEPT,)),
    "causal": Inputs((), {"attention_mask": CAUSAL.bool()[None, None]}),
    "nothing hidden": Inputs((), {"attention_mask": torch.zeros(2, 4)}),
    "one row's length": Inputs((), {"attention_mask": torch.tensor([3, 2])}),
    "a label a row": Inputs((), {"labels": torch.tensor([3, 2])}),
}


@pytest.mark.parametrize("form", [*FORMS, *NONE])
def test_forms(form: str):
    feature = torch.full((2, 4, 3), math.nan)
    feature[KEPT == 1] = 1.0
    if form in NONE:
        feature = torch.ones(2, 4, 3)
    seen = Padding(Net(), {**FORMS, **NONE}[form]).viewed(feature, Layout("tokens"), "layer")
    expected = torch.ones(2, 3, 4) if form in NONE else KEPT[:, None, :].expand(2, 3, 4).float()
    assert torch.equal(seen, expected)


def two(*names: str) -> nn.Module:
    net = nn.Module()
    for name in names:
        net.add_module(name, nn.Identity())
    return net


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"labels": torch.where(KEPT == 1, 7, -100)}, KEPT),
        ({"labels": torch.ones(2, 4, dtype=torch.long), "decoder_attention_mask": KEPT}, KEPT),
        ({"attention_mask": KEPT}, torch.ones_like(KEPT)),  # of the encoder
    ],
    ids=["labels", "its mask", "nothing"],
)
def test_decoders(given: dict[str, Any], expected: Tensor):
    behind_encoder, alone = (Padding(net, Inputs((), given)) for net in (two("encoder", "decoder"), two("decoder")))
    seen = behind_encoder.viewed(torch.ones(2, 4, 1), Layout("tokens"), "decoder.block.0")
    assert torch.equal(seen[:, 0], expected.float())
    # The -100 of a net that is only a decoder (a language model) hides what is not predicted, and is no padding.
    mask = given.get("attention_mask", torch.ones_like(KEPT))
    seen = alone.viewed(torch.ones(2, 4, 1), Layout("tokens"), "decoder.layers.0")
    assert torch.equal(seen[:, 0], mask.float())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout):
    nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(2, 2)], layout=layout)
    seen = Padding(Net(), Inputs(())).viewed(nested, Layout("tokens"), "layer")
    assert torch.equal(seen[:, 0], KEPT[:, :3].float())
    # Behind a mask of four positions the same feature is as long as the net's that was not nested.
    seen = Padding(Net(), FORMS["torch's"]).viewed(nested, Layout("tokens"), "layer")
    assert torch.equal(seen[:, 0], KEPT.float())


class Told(nn.Module):
    """Reads ids and makes the mask itself, with which it calls the encoder, or each of its layers."""

    def __init__(self, depth: int, width: int, how: str) -> None:
        super().__init__()
        self.words, self.how = nn.Embedding(20, width), how
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x, padding = self.words(ids), ids == 0
        if self.how == "encoder":
            x = self.encoder(x, src_key_padding_mask=padding)
        else:
            for block in self.encoder.layers:
                if self.how == "by place":
                    x = block(x, None, padding)
                else:
                    x = block(x, src_key_padding_mask=torch.zeros(ids.shape).masked_fill(padding, -math.inf))
        kept = ~padding[..., None]
        return self.head((x * kept).sum(1) / kept.sum(1))


IDS = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(3))
LENGTHS = (6, 4, 3)


def told(how: str) -> tuple[nn.Module, nn.Module, lwkd.Pairing]:
    torch.manual_seed(5)
    student, teacher = Told(2, 8, how), Told(4, 16, how)
    for parameter in (*student.parameters(), *teacher.parameters()):
        nn.init.normal_(parameter, std=0.4)  # the maps of a fresh net are nearly uniform
    layers = {"encoder.layers.0": "encoder.layers.1", "encoder.layers.1": "encoder.layers.3"}
    return student, teacher.eval(), lwkd.pair(student, teacher, IDS, layers=layers)


def padded(more: int) -> Tensor:
    ids = torch.cat([IDS, torch.zeros(3, more, dtype=torch.int64)], 1)
    return ids.masked_fill(torch.arange(6 + more) >= torch.tensor(LENGTHS)[:, None], 0)


def measured(student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, ids: Tensor) -> Tensor:
    optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), 0.0), student, teacher, pairing)
    with torch.no_grad():
        teacher(ids)
    student(ids).sum().backward()
    optimizer.step()
    optimizer.close()
    return torch.tensor(list(optimizer.divergences.values()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["encoder", "by place", "added"])
def test_a_net_that_makes_its_mask_itself(how: str, compiled: bool) -> None:
    """Its encoder or its layers are told of padding: rows alone, without any, measure the same."""
    student, teacher, pairing = told(how)
    rows = [measured(student, teacher, pairing, IDS[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    expected = torch.stack(rows).mean(0)
    assert expected.min() > 1e-3
    if compiled:
        student, teacher = (torch.compile(net, backend="eager", dynamic=False) for net in (student, teacher))
    for more in (0, 5, 0):
        torch.testing.assert_close(measured(student, teacher, pairing, padded(more)), expected, rtol=1e-4, atol=1e-6)


def test_measuring_passes_see_the_masks_within() -> None:
    student, teacher, pairing = told("encoder")
    signal = Jacobian(estimator="output")
    few, many = (signal.measure(student, teacher, pairing, padded(more)) for more in (0, 5))
    assert few[:, 0].min() > 1e-3
    torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-6)


def test_masks_count_for_the_layers_within_and_the_outermost_first() -> None:
    padding, feature = Padding(two("words", "pictures"), Inputs(())), torch.ones(2, 4, 1)
    padding.add("words", {"attention_mask": KEPT})
    padding.add("words.layers.0", {"attention_mask": 1 - KEPT})
    seen = {layer: padding.viewed(feature, Layout("tokens"), layer)[:, 0] for layer in ("words.layers.0", "pictures")}
    assert torch.equal(seen["words.layers.0"], KEPT.float())
    assert torch.equal(seen["pictures"], torch.ones(2, 4))
    padding = Padding(two("words"), Inputs((), {"attention_mask": KEPT}))
    padding.add("words", {"attention_mask": 1 - KEPT})
    assert torch.equal(padding.viewed(feature, Layout("tokens"), "words.layers.0")[:, 0], KEPT.float())


TRIANGLE = torch.ones(4, 4).tril()
FOUR = torch.ones(4, 4, 1)


@pytest.mark.parametrize(
    ("mask", "feature"),
    [
        (TRIANGLE.bool(), FOUR),  # causal, and as many rows in the batch as positions
        (torch.where(TRIANGLE == 1, 0.0, -math.inf), FOUR),
        (~TRIANGLE.bool()[None, None].expand(4, 1, 4, 4), FOUR),  # MPT: true is hidden
        (torch.tensor([[1e4, 0, 0, 0]] * 4), FOUR),  # Longformer: the first is attended to by all
        (torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.ones(2, 4, 1)),  # of a memory of other length
        (torch.tensor([[1, 1, 1, 0]]), torch.ones(2, 4, 1)),  # of other rows
    ],
    ids=["causal", "causal, added", "hidden", "global", "memory", "rows"],
)
def test_masks_within_that_are_not_of_the_layers_padding(mask: Tensor, feature: Tensor) -> None:
    padding = Padding(two("net"), Inputs(()))
    padding.add("net", {"attention_mask": mask})
    assert torch.equal(padding.viewed(feature, Layout("tokens"), "net.layer")[:, 0], feature[..., 0])


def test_the_outermost_mask_that_fits_counts() -> None:
    """Of a net that cuts its input into choices, or takes out frames: the root's mask is of another shape."""
    padding = Padding(two("net"), Inputs((), {"attention_mask": torch.ones(1, 2, 4)}))
    padding.add("net", {"attention_mask": KEPT})
    assert torch.equal(padding.viewed(torch.ones(2, 4, 1), Layout("tokens"), "net.layer")[:, 0], KEPT.float())


def test_a_module_that_is_called_again_without_a_mask() -> None:
    """Features of the second call are not cut by the mask of the first."""

    class Twice(Told):
        def forward(self, ids: Tensor) -> Tensor:
            first = super().forward(ids)
            return first + self.head(self.encoder(self.words(ids.clamp_min(1))).mean(1))

    student, teacher, pairing = told("encoder")
    for net in (student, teacher):
        net.__class__ = Twice
    whole = measured(student, teacher, pairing, padded(0).clamp_min(1))
    torch.testing.assert_close(measured(student, teacher, pairing, padded(0)), whole)


def test_the_mask_of_a_decoder_that_is_called_by_itself() -> None:
    padding, feature = Padding(two("encoder", "decoder"), Inputs(())), torch.ones(2, 4, 1)
    padding.add("encoder", {"attention_mask": KEPT})
    padding.add("decoder", {"attention_mask": 1 - KEPT})
    for layer, mask in (("encoder.block.0", KEPT), ("decoder.block.0", 1 - KEPT)):
        assert torch.equal(padding.viewed(feature, Layout("tokens"), layer)[:, 0], mask.float()), layer


def test_a_mask_is_forgotten_with_its_pass() -> None:
    """A later pass without padding is not cut by the mask of an earlier one."""
    student, teacher, pairing = told("encoder")

    class Sometimes(Told):
        def forward(self, ids: Tensor) -> Tensor:
            if (ids == 0).any():
                return super().forward(ids)
            return self.head(self.encoder(self.words(ids)).mean(1))

    for net in (student, teacher):
        net.__class__ = Sometimes
    expected = measured(student, teacher, pairing, IDS)
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), 0.0), student, teacher, pairing, policy=lwkd.Local(momentum=0.0)
    )
    for ids in (padded(0), IDS):
        with torch.no_grad():
            teacher(ids)
        student(ids).sum().backward()
        optimizer.step()
    torch.testing.assert_close(torch.tensor(list(optimizer.divergences.values())), expected)
