"""How the attention ops run: repeatable bits, threads, many layers, second derivatives, compilers and forward mode."""

import pytest
import torch
from backends import assert_compiled_is_the_same, over
from cases import CASES, build
from tolerances import GRADIENT, VALUE, assert_close

from lwkd import ops, reference

BY_NAME = {case.name: case for case in CASES}


def large_features(memory_format=torch.contiguous_format):
    """Enough bytes for several threads and several tiles a sample."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 96, 40, 40), (2, 48, 9, 9), (2, 16, 70, 70)), ((2, 200, 40, 40), (2, 96, 9, 9), (2, 24, 70, 70))
    return [
        [torch.randn(s, generator=generator).contiguous(memory_format=memory_format) for s in side] for side in shapes
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(threads, memory_format):
    student, teacher = large_features(memory_format)
    found = []
    for count in (1, 2, 3, 2, 1, 4):
        threads(count)
        inputs = [f.detach().requires_grad_() for f in student]
        divergence = ops.attention_divergence(inputs, teacher)
        gradients = torch.autograd.grad(divergence.sum(), inputs)
        maps, tangents = ops.attention_maps(student, student)
        found.append([divergence.detach(), *gradients, *maps, *tangents])
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))
    exact = reference.attention_divergence([f.double() for f in student], [f.double() for f in teacher])
    assert_close(found[0][0], exact, VALUE[torch.float32])


@pytest.mark.parametrize("layers", [1, 512])
def test_any_number_of_layers(layers):
    generator = torch.Generator().manual_seed(1)
    student = [torch.randn(2, 3, 4, generator=generator).requires_grad_() for _ in range(layers)]
    teacher = [torch.randn(2, 5, 4, generator=generator) for _ in range(layers)]
    found = ops.attention_divergence(student, teacher)
    assert_close(found.detach(), reference.attention_divergence(student, teacher).detach(), VALUE[torch.float32])
    gradients = torch.autograd.grad(found.sum(), student)
    expected = torch.autograd.grad(reference.attention_divergence(student, teacher).sum(), student)
    assert_close(torch.stack(gradients), torch.stack(expected), GRADIENT[torch.float32])


def test_results_do_not_depend_on_the_layers_beside():
    student, teacher = build(BY_NAME["odd"])
    together = ops.attention_divergence(student, teacher)
    alone = [ops.attention_divergence([s], [t]) for s, t in zip(student, teacher, strict=True)]
    assert_close(together, torch.cat(alone), VALUE[torch.float32])


@pytest.mark.parametrize("kind", ["jsd", "l2"])
def test_second_derivative_goes_through_the_reference(kind):
    student, teacher = (tuple(f.double() for f in side) for side in build(BY_NAME["resized"]))
    inputs = tuple(f.requires_grad_() for f in student)
    divergence = lambda *s: ops.attention_divergence(s, teacher, kind=kind)  # noqa: E731
    assert torch.autograd.gradcheck(divergence, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(divergence, inputs, fast_mode=True)


def test_second_derivative_of_maps():
    features, _ = build(BY_NAME["conv"], torch.float64)
    tangents = tuple(torch.randn_like(f).requires_grad_() for f in features)
    inputs = (*(f.requires_grad_() for f in features), *tangents)

    def both(*tensors):
        maps, map_tangents = ops.attention_maps(tensors[:2], tensors[2:], sizes=[(3, 3), (2, 3)])
        return (*maps, *map_tangents)

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *f: ops.attention_maps(f)[0], inputs[:2], fast_mode=True)


@over("name", cpu=["conv", "resized", "channels_last", "transposed", "tokens"], cuda=["conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, name, dtype):
    student, teacher = map(backend.given, build(BY_NAME[name], dtype))
    inputs = [f.detach().requires_grad_() for f in student]
    torch.library.opcheck(
        torch.ops.lwkd.attention_divergence, (inputs, teacher, "features", 2.0, "jsd", [0.5, 0.5], True)
    )
    torch.library.opcheck(
        torch.ops.lwkd.attention_divergence, (student, teacher, "features", 2.0, "l2", [0.5, 0.5], False)
    )
    divergence, factors = torch.ops.lwkd.attention_divergence(
        student, teacher, "features", 2.0, "jsd", [0.5, 0.5], True
    )
    torch.library.opcheck(torch.ops.lwkd.attention_divergence_backward, (divergence, student, factors, "features", 2.0))
    flat = [length for f in student for length in f.shape[2:]]
    tangents = [torch.randn_like(f).requires_grad_() for f in student]
    torch.library.opcheck(torch.ops.lwkd.attention_maps, (inputs, [], 2.0, flat))
    torch.library.opcheck(torch.ops.lwkd.attention_maps, (inputs, tangents, 2.0, [(n + 1) // 2 for n in flat]))
    moved = [t.detach() for t in tangents]
    for sizes in (flat, [(n + 1) // 2 for n in flat]):
        maps, map_tangents, totals = torch.ops.lwkd.attention_maps(student, moved, 2.0, sizes)
        torch.library.opcheck(
            torch.ops.lwkd.attention_maps_backward,
            (maps, map_tangents, student, moved, 2.0, sizes, [*maps, *map_tangents], totals),
        )
        of_maps = totals[:, :1].contiguous()
        torch.library.opcheck(
            torch.ops.lwkd.attention_maps_backward, (maps, [], student, [], 2.0, sizes, maps, of_maps)
        )


def test_opcheck_of_probabilities():
    student, teacher = (torch.rand(2, heads, 5, 5).softmax(-1) for heads in (2, 3))
    arguments = ([student.requires_grad_()], [teacher], "probabilities", 2.0, "jsd", [0.5, 0.5], True)
    torch.library.opcheck(torch.ops.lwkd.attention_divergence, arguments)


def test_compiled_into_one_graph():
    student, teacher = build(BY_NAME["conv"])

    def loss(features, others):
        scaled = [2 * f.relu() for f in features]
        return ops.attention_divergence(scaled, others, kind="l2").sum() + ops.attention_maps(scaled)[0].square().sum()

    assert_compiled_is_the_same(loss, student, teacher)


def test_compiled_without_gradient():
    torch._dynamo.reset()
    student, teacher = build(BY_NAME["conv"])
    compiled = torch.compile(lambda s, t: ops.attention_divergence(s, t) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(student, teacher), ops.attention_divergence(student, teacher) * 2)


def test_a_forward_mode_tangent_is_refused_and_a_plain_input_is_not():
    student, teacher = build(BY_NAME["conv"])
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(f, torch.ones_like(f)) for f in student]
        with pytest.raises(RuntimeError, match="no forward-mode rule"):
            ops.attention_divergence(dual, teacher)
        with pytest.raises(RuntimeError, match=r"lwkd\.reference\.attention_maps"):
            ops.attention_maps(dual)
        primals = [torch.autograd.forward_ad.unpack_dual(f).primal for f in dual]
        assert torch.isfinite(ops.attention_divergence(primals, teacher)).all()
    with pytest.raises(RuntimeError, match="no forward-mode rule"):
        torch.func.jvp(lambda f: ops.attention_maps([f])[0], (student[0],), (student[0],))


OPS = {
    "divergence": lambda f, g: ops.attention_divergence([f], [g])[0],
    "maps": lambda f, g: (
        ops.attention_maps([f], sizes=[(3, 2)])[0] * ops.attention_maps([g], sizes=[(3, 2)])[0]
    ).sum(),
    "tangents": lambda f, g: ops.attention_maps([f], [g])[1][0].square().sum(),
    "jacobian sums": lambda f, g: ops.jacobian_sums([f], [g])[0, 2],
    "jacobian distance": lambda f, g: ops.jacobian_divergence([f], [g])[0],
}


@pytest.mark.parametrize("op", OPS)
def test_inside_of_transforms(op):
    """grad, and vmap around it: as autograd outside, row by row."""
    generator = torch.Generator().manual_seed(0)
    f, g = (torch.randn(5, 2, 4, 6, 4, generator=generator) for _ in range(2))
    rows = [one.clone().requires_grad_() for one in f]
    expected = [torch.autograd.grad(OPS[op](*pair), pair[0])[0] for pair in zip(rows, g, strict=True)]
    torch.testing.assert_close(torch.func.grad(OPS[op])(f[0], g[0]), expected[0], rtol=1e-4, atol=1e-6)
    found = torch.func.vmap(torch.func.grad(OPS[op]))(f, g)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="kind"):
        torch.func.grad(lambda one: ops.attention_divergence([one], [g[0]], kind="js")[0])(f[0])


def test_a_teacher_under_inference_mode_and_training_on_the_loss():
    with torch.inference_mode():
        student, teacher = build(BY_NAME["conv"])
        assert torch.isfinite(ops.attention_divergence(student, teacher)).all()
    student = [f.clone().requires_grad_() for f in student]
    with pytest.raises(RuntimeError, match="second derivative needs the teacher"):
        torch.autograd.grad(ops.attention_divergence(student, teacher).sum(), student, create_graph=True)
    optimizer = torch.optim.SGD(student, lr=20.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ops.attention_divergence(student, teacher).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
