from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from compare_runs import TINY, recipe

from lwkd.program.cli import _settings_from
from lwkd.program.compare.recipe import CONTROLS, FREE, OF_ARMS, read_recipe
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import ProgramError

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_recipes(path):
    assert read_recipe(path, _settings_from).arms["uniform"].rates == "uniform"


def test_an_arm_has_its_own_options_in_place_of_the_recipes():
    arms = recipe(gamma=0.5, arms={"a": {"rates": "layerwise", "gamma": 2.0}, "b": {"rates": "layerwise"}}).arms
    assert (arms["a"].settings.gamma, arms["b"].settings.gamma) == (2.0, 0.5)
    assert arms["a"].settings.student == "cnn_4"


def test_every_setting_is_the_recipes_the_arms_or_of_neither():
    both = {field.name for field in dataclasses.fields(Settings)} - {*FREE}
    assert not {*FREE} & {*OF_ARMS}
    assert {*OF_ARMS} < both


def test_controls_stand_for_four_arms_that_repeat_the_one_above():
    arms = recipe().arms
    assert list(arms)[:2] == ["uniform", "attention"]
    assert [(arm.rates, arm.of) for arm in list(arms.values())[2:]] == [(rates, "attention") for rates in CONTROLS]


def test_the_teacher_is_trained_with_its_own_settings():
    found = recipe(teacher_training={"optimizer": "sgd", "lr": 0.05}, weight_decay=0.0)
    assert (found.teacher_settings.optimizer, found.teacher_settings.lr) == ("sgd", 0.05)
    assert (found.settings.optimizer, found.settings.weight_decay) == ("adam", 0.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimiser": "sgd"}, "unknown entries: optimiser"),
        ({"lr": 0.1}, "unknown entries: lr"),
        ({"base_rates": [0.1]}, "base_rates is"),
        ({"base_rates": [0.2, 0.1]}, "ascending"),
        ({"epochs": "many"}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"start": {"kind": "melted"}}, "kind is 'melted'"),
        ({"start": {"knd": "copy"}}, "start: knd is not known"),
        ({"start": {"kind": "replaced"}}, "start: all segments are replaced"),
        ({"start": {"kind": "quantized", "keep": 0.1}}, "start: quantized has no keep"),
        ({"start": {"segment": 1}}, "start: scratch has no segment"),
        ({"teacher_training": {"optimiser": "sgd"}}, "teacher_training: optimiser is nothing of the training"),
        ({"teacher_training": {"teacher": "cnn_8"}}, "teacher_training: teacher is nothing of the training"),
        ({"start": ["copy"]}, "expected a mapping"),
        ({"start": {"kind": "quantized", "bits": 1}}, "start: bits is 1"),
        ({"methods": ["kd+hope"]}, "methods is ['kd+hope']"),
        ({"methods": []}, "methods is []"),
        ({"methods": ["kd", "kd"]}, "each once"),
        ({"methods": {"kd": 1}}, "methods is {'kd': 1}"),
        ({"title": None}, "title is None"),
        ({"shift": "invertedd"}, "shift is 'invertedd'"),
        ({"labels": "no"}, "labels is 'no'"),
        ({"head": "no"}, "head is 'no'"),
        ({"weights": {"kd+attentoin": 5}}, "weights: kd+attentoin is no transfer loss"),
        ({"weights": {"kd": 5}}, "weights: kd is no transfer loss"),
        ({"weights": [1]}, "weights is [1]"),
        ({"weights": {"kd+attention": "big"}}, "weights is {'kd+attention': 'big'}"),
        ({"weights": {"kd+attention": -1}}, "weights: kd+attention is -1"),
        ({"base_rates": [float("nan"), float("nan")]}, "base_rates is [nan, nan]"),
        ({"base_rates": [0.1, float("inf")]}, "base_rates is [0.1, inf]"),
        ({"base_rates": ["a", "b"]}, "base_rates is ['a', 'b']"),
        ({"base_rates": [True, 2]}, "base_rates is [True, 2]"),
        ({"base_rates": [0.01, 0.02, 0.1]}, "a constant factor"),
        ({"base_rates": 0.1}, "base_rates is 0.1"),
        ({"seeds": [2, 3, 4]}, "seeds is [2, 3, 4]"),
        ({"seeds": []}, "seeds is []"),
        ({"seeds": "many"}, "seeds is 'many'"),
        ({"seeds": 2.5}, "seeds is 2.5"),
        ({"seeds": [2, 20_000]}, "most seeds is 20000"),
        ({"development": "two"}, "development is 'two'"),
        ({"label_noise": "lots"}, "label_noise is 'lots'"),
        ({"label_noise": True}, "label_noise is True"),
        ({"validation": "x"}, "validation is 'x'"),
        ({"difference": float("nan")}, "difference is nan"),
        ({"teachers": 1.5}, "teachers is 1.5"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"epochs": None}, "epochs is None"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"normalize": "no"}, "normalize is 'no'"),
        ({"pair": "layer1=layer1"}, "pair is 'layer1=layer1'"),
        ({"teacher_training": {"momentum": True}}, "teacher_training: momentum is True"),
        ({"teacher_training": {"lr": -1}}, "teacher_training: lr"),
        ({"start": {"keep": "lots"}}, "start: keep is 'lots'"),
        ({"start": {"kind": "copy", "layers": ["a"]}}, "start: layers is ['a']"),
        ({"start": {"kind": "replaced", "segment": True}}, "start: segment is True"),
        ({"arms": {}}, "arms is empty"),
        ({"arms": ["a"]}, "arms is ['a']"),
        ({"arms": {"lw": 5}}, "arm 'lw' is 5"),
        ({"arms": {"lw": None}}, "arm 'lw' is None"),
        ({"arms": {1: {"rates": "layerwise"}}}, "arms: 1 is no name"),
        ({"arms": {"uniform": {"rates": "layerwise"}}}, "arm 'uniform': every comparison has it"),
        ({"arms": {"a": {"rates": "layerwise", "controls": 3}}}, "arm 'a': controls is 3"),
        ({"arms": {"a": {"rates": "layerwise", "controls": "mean"}}}, "arm 'a': controls is 'mean'"),
        ({"arms": {"a": {"rates": "layerwise", "controls": ["fast"]}}}, "arm 'a': controls is ['fast']"),
        ({"arms": {"a": {"rates": "layerwise", "controls": ["mean", "mean"]}}}, "all layers' is there twice"),
        (
            {"arms": {"a": {"rates": "layerwise", "controls": True}, "a: its mean, all layers": {"rates": "auto-rgn"}}},
            "arm 'a: its mean, all layers' is there twice",
        ),
        ({"arms": {"a": {"rates": ["layerwise"]}}}, "arm 'a': rates is ['layerwise']"),
        ({"arms": {"a": {"rates": "layerwise", "every": 1.5}}}, "arm 'a': every is 1.5"),
        ({"arms": {"a": {"rates": "layerwise", "samples": 0}}}, "arm 'a': samples"),
        ({"arms": {"a": {"rates": "layer-decay", "decay": "x"}}}, "arm 'a': decay is 'x'"),
        ({"arms": {"a": {"rates": "layer-decay"}}}, "arm 'a': decay is 1"),
        ({"arms": {"a": {"rates": "frozen-prefix", "layers": "x"}}}, "arm 'a': layers is 'x'"),
        ({"arms": {"a": {"rates": "frozen-prefix", "layers": 1.5}}}, "arm 'a': layers is 1.5"),
        ({"arms": {"a": {"rates": "uniform", "decay": 0.3}}}, "arm 'a': rates: uniform has no decay"),
        ({"arms": {"a": {"policy": "decay"}}}, "arm 'a': rates: uniform has no policy"),
        ({"arms": {"a": {"rates": "layerwise", "layers": 2}}}, "arm 'a': rates: layerwise has no layers"),
        ({"arms": {"a": {"rates": "auto-rgn", "controls": True}}}, "arm 'a': rates: auto-rgn has no controls"),
        (
            {"arms": {"a": {"rates": "layerwise"}, "b": {"rates": "mean", "of": "a", "epochs": 9}}},
            "arm 'b': epochs is 9, and 'a', whose rates it repeats, has 2",
        ),
        ({"methods": ["supervised"]}, "without labels"),
        ({"label_noise": 2}, "label_noise is 2"),
        ({"seeds": [5, 3]}, "fewest seeds is 5"),
        ({"arms": {"a": {"rates": "fast"}}}, "rates is 'fast'"),
        ({"amp": "bf16"}, "unknown entries: amp"),
        ({"arms": {"a": {"speed": 2}}}, "arm 'a': speed is nothing of one arm"),
        ({"arms": {"a": {"rates": "layerwise", "temperature": 1.0}}}, "arm 'a': temperature is nothing of one arm"),
        ({"arms": {"a": {"rates": "layerwise", "student_limit": 10}}}, "arm 'a': student_limit is nothing of one arm"),
        ({"arms": {"a": {"rates": "mean"}}}, "rates mean and of None"),
        ({"arms": {"a": {"rates": "mean", "of": "b"}}}, "of is 'b', which is no layer-wise arm"),
        ({"arms": {"a": {"rates": "frozen-prefix"}}}, "layers is 0"),
        ({"arms": {"a": {"rates": "layer-decay", "decay": 0}}}, "decay is 0"),
        ({"arms": {"a": {"rates": "layerwise", "clamp": [2, 1]}}}, "clamp is (2.0, 1.0)"),
        ({"arms": {"a": {"rates": "layerwise", "kind": "direction"}}}, "--signal jacobian"),
    ],
)
def test_what_is_wrong_is_named(changes, says, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    with pytest.raises(ProgramError) as error:
        read_recipe(path, _settings_from)
    assert str(path) in error.value.problem
    assert says in str(error.value)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "holds no recipe"),
        ("a: [", "cannot be read"),
        ("title: x\n", "arms is missing"),
        ("title: x\ntitle: y\n", r"(?s)title is there twice.*line 2"),
        ("arms:\n  a: {rates: layerwise}\n  a: {rates: auto-rgn}\n", r"(?s)a is there twice.*line 3"),
        ("title: 2024-13-45\n", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_recipe(text, says, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ProgramError, match=says):
        read_recipe(path, _settings_from)
    with pytest.raises(ProgramError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.yaml", _settings_from)


def test_numbers_with_an_exponent_are_numbers_and_a_grid_may_be_rounded(tmp_path):
    """YAML reads 1e-3 as a word."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "base_rates": ["1e-3", 0.003, 0.01], "difference": "5e-1"}))
    found = read_recipe(path, _settings_from)
    assert (found.base_rates, found.difference) == ((0.001, 0.003, 0.01), 0.5)
