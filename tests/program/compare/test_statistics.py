from __future__ import annotations

import math

import pytest

from lwkd.program.compare.statistics import holm, paired, seeds_for


def test_a_paired_difference_is_students():
    first, second = [3.1, 4.0, 5.2, 6.1, 4.4], [2.9, 3.1, 5.0, 4.9, 4.6]
    found = paired(first, second)
    differences = [0.2, 0.9, 0.2, 1.2, -0.2]
    mean = sum(differences) / 5
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4)
    error = sd / math.sqrt(5)
    quantile = 2.7764451051977987  # of Student's t with 4 degrees of freedom, 97.5 %, from tables
    assert found.mean == pytest.approx(mean)
    assert (found.sd, found.error) == pytest.approx((sd, error))
    assert (found.low, found.high) == pytest.approx((mean - quantile * error, mean + quantile * error))
    assert (found.wins, found.n) == (4, 5)
    # The distribution function of t with 4 degrees of freedom has a closed form.
    t = mean / error
    inside = t / math.sqrt(4 + t * t)
    assert found.p == pytest.approx(2 * (0.5 - 0.75 * (inside - inside**3 / 3)), rel=1e-9)


def test_equal_arms_show_nothing():
    assert paired([1.0, 2.0], [1.0, 2.0])[:6] == (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.04, 0.001, 0.03, 0.2]) == pytest.approx([0.09, 0.004, 0.09, 0.2])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_seeds_follow_from_the_spread():
    # 80 % power at the 5 % level, both sides: (1.96 + 0.84)² (sd/Δ)².
    assert seeds_for(0.5, 0.5) == 8
    assert seeds_for(2.0, 0.5) == 126
