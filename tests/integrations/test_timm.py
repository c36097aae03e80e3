"""timm as it is: layer decay with schedulers that write groups by their ``lr_scale``, and Lookahead."""

from __future__ import annotations

from typing import Any

import pytest
from toy import FORMS, batches, make, nets, train_on

import lwkd

pytest.importorskip("timm")

from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler

SCHEDULERS = {
    "cosine": lambda optimizer: CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=1e-4),
    "step": lambda optimizer: StepLRScheduler(optimizer, decay_t=2, decay_rate=0.5),
}


def trajectory(form: str, scheduler: str, lookahead: bool) -> tuple[list[Any], Any]:
    """Learning rates of all groups after every step, and what shows the rates."""
    student, teacher, pairing = nets()
    student.group_matcher = lambda coarse=False: {"stem": r"^low", "blocks": [(r"^high", None), (r"^head", (99999,))]}
    optimizer: Any = create_optimizer_v2(student, opt="adamw", lr=0.01, weight_decay=0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 1
    if lookahead:
        optimizer = Lookahead(optimizer, k=2)
    optimizer, shown = make(form, optimizer, student, teacher, pairing, policy=lwkd.Constant([0.5, 1.5]))
    schedule, seen = SCHEDULERS[scheduler](optimizer), []
    for number, batch in enumerate(batches(6)):
        train_on(optimizer, student, teacher, [batch])
        schedule.step(number + 1)
        seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])
    return seen, shown


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("form", FORMS)
def test_learning_rates_are_those_of_the_bare_optimizer(form: str, scheduler: str, lookahead: bool) -> None:
    expected, _ = trajectory("bare", scheduler, lookahead)
    found, shown = trajectory(form, scheduler, lookahead)
    assert found == expected
    assert len({tuple(rates) for rates in found}) > 1
    assert list(shown.rates.values()) == [0.5, 1.5]
