"""``step()`` alone: layer-wise rates that follow the teacher, and timm's layer decay, the field's static ones.

Needs ``pip install --group bench``. Gradients are fixed and nothing is due.
"""

from __future__ import annotations

import pytest

from benchmarks.harness import timed
from benchmarks.ops.optimizer import BASES, PAIRS, Stepping

optim = pytest.importorskip("timm.optim", reason="timm is not installed: pip install --group bench")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_step_alone(names, base, compare):
    of = Stepping(names, base)
    net, owners = of.net(), of.pairing.owners()
    # How parameters follow each other, which timm asks a net: its groups are then those of lwkd, tail included. Weight
    # decay for all parameters alike keeps it from splitting each in two.
    net.group_matcher = lambda coarse: lambda name: owners.get(name, len(of.pairing))
    options = {name: value for name, value in of.options.items() if name != "nesterov"}  # its "sgd" has it
    theirs = optim.create_optimizer_v2(net, base, layer_decay=0.75, filter_bias_and_bn=False, **options)
    assert len(theirs.param_groups) == len(of.pairing) + 1
    compare({"lwkd": of.wrapped(), "timm": timed(theirs.step)})
