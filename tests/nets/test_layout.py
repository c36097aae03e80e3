"""The view on a feature that a layout gives."""

from __future__ import annotations

import pickle

import pytest
import torch

from lwkd.nets.layout import Layout


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (Layout("channels_first"), (2, 3, 4, 5), (2, 3, 4, 5)),
        (Layout("channels_first"), (2, 3, 4), (2, 3, 4)),
        (Layout("channels_last"), (2, 4, 5, 3), (2, 3, 4, 5)),
        (Layout("channels_last"), (2, 4, 5, 6, 3), (2, 3, 4, 5, 6)),
        (Layout("tokens"), (2, 7, 3), (2, 3, 7)),
        (Layout("tokens", prefix=1), (2, 7, 3), (2, 3, 6)),
        (Layout("tokens", prefix=1, grid=(2, 3)), (2, 7, 3), (2, 3, 2, 3)),
        (Layout("tokens", batch_first=False), (7, 2, 3), (2, 3, 7)),
        (Layout("tokens", prefix=1, grid=(2, 3), batch_first=False), (7, 2, 3), (2, 3, 2, 3)),
    ],
)
def test_view_is_channels_first_without_a_copy(layout: Layout, shape: tuple[int, ...], expected: tuple[int, ...]):
    feature = torch.arange(float(torch.Size(shape).numel())).view(shape)
    seen = layout.view(feature)
    assert tuple(seen.shape) == expected == layout.shape(shape)
    assert seen.untyped_storage().data_ptr() == feature.untyped_storage().data_ptr()


def test_token_view_keeps_rows_of_the_grid():
    feature = torch.arange(7.0).view(1, 7, 1)
    assert Layout("tokens", 1, (2, 3)).view(feature)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_view_of_a_noncontiguous_feature():
    feature = torch.rand(7, 2, 10).transpose(0, 1)[..., ::2]
    assert torch.equal(Layout("tokens", 1, (2, 3)).view(feature)[1, 2, 1], feature[1, 4:, 2])


def test_a_sequence_first_is_the_same_feature_turned():
    feature, valid = torch.rand(2, 7, 3), torch.rand(2, 7) > 0.5
    for prefix, grid in ((0, None), (1, (2, 3))):
        expected = Layout("tokens", prefix, grid).view(feature, valid)
        turned = Layout("tokens", prefix, grid, batch_first=False)
        assert torch.equal(turned.view(feature.transpose(0, 1), valid), expected)
        assert turned.positions((7, 2, 3)) == 7


def test_layout_is_a_value():
    layout = Layout("tokens", 1, (2, 3))
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert hash(layout) == hash(Layout("tokens", 1, (2, 3)))


def test_bad_layouts_say_what_was_expected():
    with pytest.raises(ValueError, match="expected one of channels_first, channels_last, tokens"):
        Layout("nchw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belong to tokens"):
        Layout("channels_last", prefix=1)
    with pytest.raises(ValueError, match="belong to tokens"):
        Layout("channels_last", batch_first=False)
    with pytest.raises(ValueError, match="0 or more"):
        Layout("tokens", prefix=-1)


def test_bad_features_say_what_was_found():
    with pytest.raises(ValueError, match=r"3 dimensions; found shape \(2, 3\)"):
        Layout("channels_first").view(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"has 7 tokens; found shape \(2, 10, 4\).*Pair again"):
        Layout("tokens", 1, (2, 3)).view(torch.zeros(2, 10, 4))
