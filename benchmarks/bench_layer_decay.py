"""``step()`` alone: layer-wise rates that follow the teacher, and timm's layer decay, the field's static ones.

Run with ``python -m pytest benchmarks/bench_layer_decay.py``, after ``pip install --group bench``; ``conftest.py`` says
how the contenders take turns and where the ratios are kept. Gradients are fixed and nothing is due.
"""

from __future__ import annotations

import pytest
from bench_optimizer import BASES, PAIRS, Stepping
from timing import timed

optim = pytest.importorskip("timm.optim", reason="timm is not installed: pip install --group bench")


@pytest.mark.benchmark(group="step alone")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_step_alone(names, base, contest):
    of = Stepping(names, base)
    net, owners = of.net(), of.pairing.owners()
    # How parameters follow each other, which timm asks a net: its groups are then those of lwkd, tail included. Weight
    # decay for all parameters alike keeps it from splitting each in two.
    net.group_matcher = lambda coarse: lambda name: owners.get(name, len(of.pairing))
    options = {name: value for name, value in of.options.items() if name != "nesterov"}  # its "sgd" has it
    theirs = optim.create_optimizer_v2(net, base, layer_decay=0.75, filter_bias_and_bn=False, **options)
    assert len(theirs.param_groups) == len(of.pairing) + 1
    contest({"lwkd": of.wrapped(), "timm": timed(theirs.step)})
