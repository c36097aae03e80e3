"""What the attention ops refuse, and what the message says: layer, expected, found, and what to do."""

import importlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lwkd
from lwkd import ops

GOOD = torch.ones(2, 3, 4, 4)


def divergence(student=GOOD, teacher=GOOD, **options):
    return ops.attention_divergence([GOOD, student], [GOOD, teacher], **options)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (GOOD[:1], GOOD, ValueError, "layer 1: student and teacher: expected the same batch size, found 1 and 2"),
        (GOOD[:0], GOOD[:0], ValueError, r"layer 1: student: expected at least one element.*\[0, 3, 4, 4\]"),
        (GOOD, GOOD[:, :0], ValueError, r"layer 1: teacher: expected at least one element.*\[2, 0, 4, 4\]"),
        (GOOD, GOOD.flatten(2), ValueError, r"layer 1.*as many spatial dimensions.*\[2, 3, 4, 4\] and \[2, 3, 16\]"),
        (GOOD.long(), GOOD, TypeError, r"layer 1: student: expected float32.*found Long.*\.float\(\)"),
        (GOOD, GOOD.to(torch.complex64), TypeError, "layer 1: teacher.*found ComplexFloat"),
        (GOOD[0, 0, 0], GOOD[0, 0, 0], ValueError, r"expected \(B, C, \*spatial\).*found shape \[4\]"),
        (GOOD[:, :, None, None], GOOD, ValueError, "at most three spatial dimensions"),
    ],
)
def test_features(student, teacher, error, message):
    with pytest.raises(error, match=message):
        divergence(student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.5}, "power of at least 1, found 0.5"),
        ({"power": float("nan")}, "finite power"),
        ({"power": float("inf")}, "finite power"),
        ({"kind": "kl"}, "kind 'jsd' or 'l2', found 'kl'"),
        ({"source": "maps"}, "source 'features' or 'probabilities', found 'maps'"),
        ({"betas": (0.5, 0.6)}, r"positive betas that sum to 1, found \(0.5, 0.6\)"),
        ({"betas": (1.0, 0.0)}, "positive betas"),
        ({"betas": (1.0,)}, "two betas"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        divergence(**options)


def test_probabilities():
    with pytest.raises(ValueError, match=r"layer 0.*expected probabilities \(B, heads, N, N\)"):
        ops.attention_divergence([GOOD.flatten(2)], [GOOD.flatten(2)], source="probabilities")
    with pytest.raises(ValueError, match=r"layer 0.*same number of tokens"):
        ops.attention_divergence([GOOD], [torch.ones(2, 3, 5, 5)], source="probabilities")


def test_lists():
    with pytest.raises(ValueError, match="2 of the student and 1 of the teacher"):
        ops.attention_divergence([GOOD, GOOD], [GOOD])
    with pytest.raises(ValueError, match="at least one layer"):
        ops.attention_divergence([], [])
    with pytest.raises(ValueError, match="at least one layer"):
        ops.attention_maps([])


def test_a_teacher_with_gradient():
    with pytest.raises(ValueError, match=r"layer 1: the teacher's feature requires grad.*detach\(\)"):
        divergence(teacher=GOOD.clone().requires_grad_())
    with torch.no_grad():
        assert divergence(teacher=GOOD.clone().requires_grad_()).shape == (2,)


def test_maps():
    with pytest.raises(ValueError, match=r"layer 0: tangent: expected the shape of the feature, \[2, 3, 4, 4\]"):
        ops.attention_maps([GOOD], [GOOD[:, :2]])
    with pytest.raises(ValueError, match="1 features and 2 tangents"):
        ops.attention_maps([GOOD], [GOOD, GOOD])
    with pytest.raises(TypeError, match=r"layer 0: tangent.*found Int"):
        ops.attention_maps([GOOD], [GOOD.int()])
    with pytest.raises(ValueError, match=r"layer 0: expected a size of 2 lengths.*found \(2,\)"):
        ops.attention_maps([GOOD], sizes=[(2,)])
    with pytest.raises(ValueError, match="one size a layer, found 2 sizes for 1 layers"):
        ops.attention_maps([GOOD], sizes=[(2, 2), (2, 2)])
    with pytest.raises(ValueError, match="layer 0: size: expected positive lengths"):
        ops.attention_maps([GOOD], sizes=[(0, 2)])


def test_the_raw_ops_check_for_themselves():
    with pytest.raises(ValueError, match="expected as many teacher features as student features"):
        torch.ops.lwkd.attention_divergence([GOOD], [GOOD, GOOD], "features", 2.0, "jsd", [0.5, 0.5], False)
    with pytest.raises(ValueError, match="sizes, one for every spatial dimension"):
        torch.ops.lwkd.attention_maps([GOOD], [], 2.0, [4])
    with pytest.raises(ValueError, match="layer 0: factor: expected 32 contiguous values"):
        torch.ops.lwkd.attention_divergence_backward(torch.ones(1), [GOOD], [torch.ones(2, 3)], "features", 2.0)
    student = GOOD.clone().requires_grad_()
    found, _ = torch.ops.lwkd.attention_divergence([student], [GOOD], "features", 2.0, "jsd", [0.5, 0.5], False)
    with pytest.raises(RuntimeError, match="save_factors=False"):
        found.sum().backward()


def test_other_devices():
    elsewhere = torch.empty(2, 3, 4, 4, device=torch.device("meta"))
    assert ops.attention_divergence([elsewhere], [elsewhere]).shape == (1,)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.empty(2, 3, 4, 4, device="cuda")
        assert ops.attention_divergence([cuda], [cuda]).device.type == "cuda"
        with pytest.raises(ValueError, match=r"tensor 1 is on cpu, the first one on cuda:0.*to one device"):
            ops.attention_divergence([cuda], [torch.empty(2, 3, 4, 4)])


def test_a_missing_extension_says_what_to_run(monkeypatch):
    monkeypatch.delattr(lwkd, "_C")
    monkeypatch.delattr(lwkd.ops, "extension")
    monkeypatch.setitem(sys.modules, "lwkd._C", None)  # what Python puts there for a module that must not be found
    monkeypatch.delitem(sys.modules, "lwkd.ops.extension")
    with pytest.raises(ImportError, match=r"lwkd\._C cannot be loaded.*run `pip install --no-build-isolation -e \.`"):
        importlib.import_module("lwkd.ops.extension")


def test_the_backend_says_what_is_in_use():
    assert "C++ kernels on the CPU" in ops.backend()
    assert f"{torch.get_num_threads()} threads" in ops.backend()


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(["features", "probabilities"]), st.integers(0, 3), st.integers(0, 6))
def test_any_pair_of_shapes_is_computed_or_refused(source, batch, rank):
    shape = [batch, 2, 3, 3, 1, 2, 2][:rank]
    feature = torch.ones(shape)
    try:
        found = ops.attention_divergence([feature], [feature], source=source)
    except ValueError as error:
        assert "layer 0" in str(error)  # noqa: PT017
    else:
        assert found.tolist() == [0.0]
