"""Schedules as plain numbers: regular ones, and the cheapest by prices."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin.trial.schedules import LEVELS, _interpolated, by_number, cheapest, numbers, regular


def test_schedules_to_begin_with_are_regular_and_a_stage_stays_in_its_section():
    found = [tuple(shape(1.0)) for shape in regular([range(3), range(3, 9)], (1, 3, 6))]
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


def merged(schedule, blocks):
    """The share of all tokens that each block merges."""
    left, found = 1.0, []
    for block in blocks:
        rate = schedule.get(block, 1.0)
        found.append(left * (1 - rate))
        left *= rate
    return found


def test_equal_numbers_are_equal_and_late_ones_grow_with_the_square_of_the_block():
    assert merged(numbers([range(5)], range(5), 0, 0.5), range(5)) == pytest.approx([0.1] * 5)
    assert merged(numbers([range(5)], (1, 3), 0, 0.5), range(5)) == pytest.approx([0, 0.25, 0, 0.25, 0])
    weights = [1, 4, 9, 16]
    assert merged(numbers([range(4)], range(4), 2, 0.6), range(4)) == pytest.approx([0.6 * w / 30 for w in weights])


def test_numbers_begin_anew_in_each_section_and_no_block_merges_more_than_half():
    assert merged(numbers([range(2), range(2, 4)], range(4), 0, 0.8), range(2)) == pytest.approx([0.2, 0.2])
    assert numbers([range(2), range(2, 4)], range(4), 0, 0.8)[2] == pytest.approx(0.8)
    assert numbers([range(3)], range(3), 0, 100.0) == dict.fromkeys(range(3), 0.5)


def test_schedules_by_number_have_stages_at_twelfths_of_any_depth():
    assert [tuple(shape(0.5)) for shape in by_number([range(12)])] == [
        tuple(range(12)),
        (1, 3, 5, 7, 9),
        (2, 4, 6, 8),
        (3, 5, 7, 9),
        (1, 4, 7),
        (3, 4, 5, 6, 7, 8, 9),
        tuple(range(12)),
        (1, 3, 5, 7, 9, 11),
    ]
    assert (4, 8, 12, 16) in [tuple(shape(0.5)) for shape in by_number([range(24)])]
    shallow = [tuple(shape(0.5)) for shape in by_number([range(2), range(2, 4)])]
    assert shallow == [(0, 1, 2, 3), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3), (1, 3)]


@pytest.mark.parametrize("shape", [*by_number([range(6), range(6, 7)]), *by_number([range(1)])])
def test_a_shape_merges_the_more_the_stronger_it_is(shape):
    kept = [math.prod(shape(strength).values()) for strength in (0.0, 0.3, 0.6, 1.0, 4.0)]
    assert kept[0] == 1
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[1] < 1
