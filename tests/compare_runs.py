"""Comparisons on the digits that take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lwkd.program.cli import _settings_from
from lwkd.program.compare.recipe import Arm, Recipe, _recipe
from lwkd.program.compare.trial import Trial

TINY: dict[str, Any] = {
    "title": "Digits",
    "data": "digits",
    "teacher": "cnn_4",
    "student": "cnn_4",
    "teacher_epochs": 1,
    "pair": ["layer1.2=layer1.2", "layer1.5=layer1.5", "layer2.5=layer2.5"],
    "student_limit": 64,
    "epochs": 2,
    "batch_size": 16,
    "optimizer": "adam",
    "temperature": 2.0,
    "base_rates": [0.002, 0.004],
    "development": 2,
    "seeds": [2, 3],
    "validation": 400,
    "start": {"kind": "replaced", "segment": "random"},
    "labels": False,
    "arms": {
        "attention": {"rates": "layerwise", "policy": "relative", "gamma": 2.0, "clamp": [0.1, 10.0], "controls": True}
    },
}


def recipe(**changes: Any) -> Recipe:
    return _recipe({**TINY, **changes}, lambda values: _settings_from({**values, "data_dir": "data"}))


def trial(of: Recipe, arm: str | Mapping[str, Any] = "uniform", *, method: Any = "kd", seed: int = 0) -> Trial:
    """A trial of one of the recipe's arms, or of uniform's with other fields."""
    chosen = of.arms[arm] if isinstance(arm, str) else replace(of.arms["uniform"], **arm)
    assert isinstance(chosen, Arm)
    return Trial(of, method, chosen, 0.003, seed)
