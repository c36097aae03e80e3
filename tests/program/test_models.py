from __future__ import annotations

import sys

import pytest
import timm
import torch
from torch import nn

from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import SMALL_NAMES, build, count_parameters

# Parameter counts for 100 classes on CIFAR: sums over the layers as the papers describe them.
COUNTS = {
    "resnet8x4": 1_233_540,
    "resnet20": 278_324,
    "resnet32x4": 7_433_860,
    "resnet56": 861_620,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}


@pytest.mark.parametrize("name", COUNTS)
def test_cifar_families_have_the_papers_sizes(name):
    assert count_parameters(build(name, classes=100, channels=3, size=32)) == COUNTS[name]


@pytest.mark.parametrize("name", [n for n in SMALL_NAMES if n not in ("resnet110", "resnet56", "resnet44")])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_names_take_grey_and_coloured_pictures(name, channels):
    net = build(name, classes=7, channels=channels, size=16)
    assert net.training
    assert net(torch.rand(2, channels, 16, 16)).shape == (2, 7)


def test_resnet10_is_one_block_a_stage():
    net = build("resnet10", classes=10, channels=3, size=32)
    assert [len(getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 28), ("mobilenet_v3_small", 32), ("densenet121", 32), ("vit_b_32", 64), ("googlenet", 32)],
)
def test_torchvision_nets_on_small_grey_pictures(name, size):
    assert build(name, classes=5, channels=1, size=size)(torch.rand(2, 1, size, size)).shape == (2, 5)


def test_small_pictures_keep_their_size_through_the_stem():
    small = build("resnet18", classes=10, channels=3, size=32)
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    large = build("resnet18", classes=10, channels=3, size=224)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))


def test_grey_stem_sees_what_the_coloured_one_sees():
    torch.manual_seed(0)
    grey = build("resnet10", classes=10, channels=1, size=80)
    torch.manual_seed(0)
    coloured = build("resnet10", classes=10, channels=3, size=80)
    x = torch.rand(2, 1, 80, 80)
    torch.testing.assert_close(grey.eval()(x), coloured.eval()(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_timm_builds_its_nets_itself(channels):
    torch.manual_seed(0)
    net = build("timm:resnet10t", classes=7, channels=channels, size=32)
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", pretrained=False, num_classes=7, in_chans=channels)
    assert type(net) is type(plain)
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), plain.parameters(), strict=True))
    assert net(torch.rand(2, channels, 32, 32)).shape == (2, 7)


def test_timm_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ProgramError, match=r"pip install 'lwkd\[program\]' \(timm\)"):
        build("timm:resnet18", classes=10, channels=3, size=32)


def own(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def own_of_anything(**options):
    assert options == {"num_classes": 10, "in_channels": 1}
    return own(10)


def own_but_fixed():
    return own(3)


def no_net(in_channels):
    return "net"


def no_key(num_classes):
    return {}["net"]


def no_item(num_classes):
    return [][num_classes]


def no_attribute(num_classes):
    return None.net


def of_a_width(num_classes, width):
    return own(num_classes)


no_function = 3


class NoKeyInForward(nn.Module):
    def __init__(self, num_classes):
        super().__init__()

    def forward(self, x):
        return {}["logits"]


def test_function_of_the_user_gets_what_it_accepts():
    for name in ("own", "own_of_anything"):
        net = build(f"{__name__}:{name}", classes=10, channels=1, size=8)
        assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet8x5", "did you mean resnet8x4"),
        ("mobilnet_v2", "did you mean mobilenet_v2"),
        ("???", "for instance resnet10"),
        ("timm:resnet19", "did you mean timm:resnet18"),
        ("timm:hf-hub:timm/resnet18", "model 'timm:hf-hub:timm/resnet18' is not known"),
        ("timm:", "for instance timm:resnet18"),
        ("wrn_15_2", "depth of a wide residual net is 6n"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{__name__}:missing", "has no attribute 'missing'"),
        (f"{__name__}:no_net", "returned str, expected an nn.Module"),
        (f"{__name__}:no_key", f"model '{__name__}:no_key': KeyError: 'net'"),
        (f"{__name__}:no_item", f"model '{__name__}:no_item': IndexError: "),
        (f"{__name__}:no_attribute", f"model '{__name__}:no_attribute': AttributeError: "),
        (f"{__name__}:of_a_width", f"model '{__name__}:of_a_width': TypeError: .*width"),
        (f"{__name__}:no_function", f"model '{__name__}:no_function': no_function is int, expected a function"),
        (f"{__name__}:NoKeyInForward", f"{__name__}:NoKeyInForward cannot take .*KeyError: 'logits'"),
        (f"{__name__}:own_but_fixed", r"gives \(2, 3\) for two pictures, expected \(2, 10\)"),
    ],
)
def test_names_that_give_no_net(name, says):
    with pytest.raises(ProgramError, match=says):
        build(name, classes=10, channels=1, size=8)


@pytest.mark.parametrize("source", ["1 / 0", "def f(:"])
def test_a_module_of_the_user_that_fails_is_named(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_nets.py").write_text(source)
    with pytest.raises(ProgramError, match=r"model 'broken_nets:f': (ZeroDivision|Syntax)Error: ") as caught:
        build("broken_nets:f", classes=10, channels=1, size=8)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [("inception_v3", 4, "cannot take pictures of 4 by 4"), ("maxvit_t", 33, "cannot be built for 33-pixel pictures")],
)
def test_pictures_of_a_wrong_size_say_what_to_do(name, size, says):
    with pytest.raises(ProgramError, match=says) as caught:
        build(name, classes=10, channels=3, size=size)
    assert "--image-size" in caught.value.remedy
