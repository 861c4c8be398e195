"""Schedules as plain numbers: regular ones, and the cheapest by prices."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin.trial.schedules import LEVELS, _interpolated, cheapest, regular


def test_schedules_to_begin_with_are_regular_and_a_stage_stays_in_its_section():
    found = [tuple(pattern) for pattern in regular([range(3), range(3, 9)], (1, 3, 6))]
    assert found[0] == (1, 3, 6)
    assert found[1] == (0, 3, 5)  # one block earlier, but 3 is the first behind the pooling
    assert {tuple(range(9)), (0, 2, 4, 6, 8), (0, 3, 6), (0, 4, 8)} <= set(found)
    assert len(set(found)) == len(found)


def test_the_path_is_the_cheapest_of_all():
    """Against every path, for prices drawn at random."""
    draw = random.Random(0)
    few = (1.0, 0.7, 0.4)
    for _ in range(20):
        prices = {block: [(0.2, a := draw.random()), (0.4, a * 2), (0.6, a * 5)] for block in range(3)}
        savings = {0: 0.9, 1: 0.6, 2: 0.3}
        schedule = cheapest([range(3)], prices, savings, 0.35)

        def total(path, prices=prices):
            ends = [1.0, *path]
            falls = zip(range(3), ends, ends[1:], strict=False)
            return sum(_interpolated(prices[b], 1 - y) - _interpolated(prices[b], 1 - x) for b, x, y in falls)

        def saved(path, savings=savings):
            ends = [1.0, *path]
            return sum(savings[b] * (x - y) for b, x, y in zip(range(3), ends, ends[1:], strict=False))

        path, left = [], 1.0
        for block in range(3):
            left *= schedule.get(block, 1.0)
            path.append(left)
        assert saved(path) >= 0.35
        for other in ((x, y, z) for x in few for y in few for z in few if x >= y >= z):
            if saved(other) >= saved(path):
                assert total(path) <= total(other) + 1e-9


@given(scale=st.floats(1e-6, 1), growth=st.lists(st.floats(1.01, 20), min_size=2, max_size=2))
def test_prices_grow_with_what_is_merged_and_meet_what_was_measured(scale, growth):
    price = [(0.2, scale), (0.4, scale * growth[0]), (0.6, scale * growth[0] * growth[1])]
    values = [_interpolated(price, 1 - level) for level in LEVELS]
    assert values[0] == 0
    assert values == sorted(values)
    for merged, measured in price:
        assert _interpolated(price, merged) == pytest.approx(measured)
