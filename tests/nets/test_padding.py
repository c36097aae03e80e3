"""What counts as padding, in every form in which nets are told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwkd.nets.inputs import Inputs
from lwkd.nets.layout import Layout
from lwkd.nets.padding import Padding

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
