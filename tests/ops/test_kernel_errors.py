"""What the Triton kernels do not read and C++ does: float64 is refused, with the place where it was found."""

import pytest
import torch
from backends import on

from lwkd import ops

READ = "found float64; the GPU kernels read float32, float16 and bfloat16"
CALLS = {
    "attention_divergence: layer 1: student": lambda one, two: ops.attention_divergence([two, one], [two, two]),
    "attention_maps: layer 1: feature": lambda one, two: ops.attention_maps([two, one]),
    "attention_maps: layer 0: tangent": lambda one, two: ops.attention_maps([two], [one]),
    "jacobian_sums: layer 1: teacher": lambda one, two: ops.jacobian_sums([two, two], [two, one]),
    "jacobian_divergence: layer 1: teacher": lambda one, two: ops.jacobian_divergence([two, two], [two, one]),
    "rademacher: tensor 1": lambda one, two: ops.rademacher([two, one], 1),
    "hutchinson_trace: product 1": lambda one, two: ops.hutchinson_trace([two, one], [0, 1], 1, 2),
}


@pytest.mark.parametrize("place", CALLS)
@on("interpreted", "cuda")
def test_float64_is_refused(backend, place):
    backend.needs_kernels()
    one, two = backend.given([torch.rand(2, 4, 5, 5).double(), torch.rand(2, 4, 5, 5)])
    with pytest.raises(TypeError, match=rf"lwkd\.ops\.{place}: {READ}"):
        CALLS[place](one, two)
