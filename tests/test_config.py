import dataclasses
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import ConfigError, MergeConfig, TokenMergeError
from token_merge_plugin.config import (
    IMPORTANCE,
    METHODS,
    MULTI_SCALE,
    SCHEDULES,
    SIMILARITY,
    MergeOptions,
    default_stages,
    numbered_stages,
    ratio,
    spread,
    tokens_kept,
)


def test_default_stages_are_at_a_quarter_a_half_and_three_quarters_of_the_depth():
    assert default_stages(12) == (3, 6, 9)
    assert default_stages(24) == (6, 12, 18)
    assert default_stages(32) == (8, 16, 24)
    assert default_stages(1) == (0,)


def test_stages_of_equal_numbers_are_spread_over_the_depth_and_leave_out_the_last_block():
    assert numbered_stages(12) == (1, 3, 5, 7)
    assert numbered_stages(24) == (2, 6, 10, 14)
    assert numbered_stages(4) == (0, 1, 2)
    assert numbered_stages(2) == (0,)
    assert numbered_stages(1) == (0,)


@given(st.integers(1, 10_000), st.integers(1, 1000))
def test_the_number_of_tokens_kept_is_the_exact_ceiling(tokens, thousandths):
    assert tokens_kept(tokens, thousandths / 1000) == math.ceil(thousandths * tokens / 1000 - 1e-12)
    assert 1 <= tokens_kept(tokens, thousandths / 1000) <= tokens


@pytest.mark.parametrize(
    ("rate", "fraction"), [(0.6, (3, 5)), (0.55, (11, 20)), (1 / 3, (1, 3)), (1.0, (1, 1)), (1e-12, (1, 10**9))]
)
def test_a_rate_is_the_fraction_that_it_was_meant_to_be(rate, fraction):
    assert ratio(rate) == fraction


@given(st.integers(1, 10_000), st.integers(1, 10**8))
def test_a_keep_rate_of_many_digits_keeps_the_exact_ceiling(tokens, rate):
    assert tokens_kept(tokens, rate / 10**8) == -(-rate * tokens // 10**8)


def test_a_float_keep_rate_counts_for_every_stage_of_equal_rates():
    assert MergeConfig(0.7, schedule="equal_rates").amounts(12) == {3: 0.7, 6: 0.7, 9: 0.7}
    assert MergeConfig(0.5).amounts(12, by_numbers=False) == {3: 0.5, 6: 0.5, 9: 0.5}
    assert MergeConfig(0.5, stages=(1, 2)).amounts(12) == {1: 0.5, 2: 0.5}


def test_a_keep_rate_means_equal_numbers_where_a_stage_would_merge_more_than_a_fifth():
    assert MergeConfig(0.8).amounts(12) == {3: 0.8, 6: 0.8, 9: 0.8}
    assert MergeConfig(0.79).amounts(12) == MergeConfig(0.79, schedule="equal_numbers").amounts(12)
    assert tuple(MergeConfig(0.79).amounts(12)) == numbered_stages(12)
    assert MergeConfig(0.5, multi_scale="learned").amounts(12) == {3: 0.5, 6: 0.5, 9: 0.5}


def work_left(schedule, depth):
    """The work of blocks that cost 1 each with all tokens, a third of it in front of the place where they get fewer."""
    left, total = 1.0, 0.0
    for block in range(depth):
        after = left * schedule.get(block, 1.0)
        total += left / 3 + after * 2 / 3
        left = after
    return total


@given(st.floats(0.05, 0.99), st.sampled_from([6, 12, 24, 40]), st.booleans())
def test_equal_numbers_leave_the_work_of_three_stages_of_the_keep_rate(keep_rate, depth, own_stages):
    stages = tuple(range(1, depth - 1, 2)) if own_stages else None
    config = MergeConfig(keep_rate, stages=stages, schedule="equal_numbers")
    schedule = config.amounts(depth)
    assert tuple(schedule) == (stages or numbered_stages(depth))
    wanted = work_left(dict.fromkeys(default_stages(depth), keep_rate), depth)
    least = work_left(dict.fromkeys(schedule, 0.006), depth)
    assert work_left(schedule, depth) == pytest.approx(max(wanted, least), rel=0.01)
    left, merged = 1.0, []
    for rate in schedule.values():
        merged.append(left * (1 - rate))
        left *= rate
    if min(schedule.values()) >= 0.8:  # no more than a fifth of a stage's tokens
        if not own_stages and next(iter(schedule.values())) > 0.8 + 1e-9:
            merged[0] *= 3  # the first stage merges a third as many
        free = [number for number, rate in zip(merged, schedule.values(), strict=True) if rate > 0.8 + 1e-9]
        assert free == pytest.approx([max(free)] * len(free)) if free else True
        assert max(merged, default=0) <= max(free, default=1) + 1e-9
    else:  # not enough: then one share for all
        assert list(schedule.values()) == pytest.approx([min(schedule.values())] * len(schedule))


def test_equal_numbers_begin_anew_in_every_section():
    sections = [range(6), range(6, 12)]
    schedule = MergeConfig(0.7, schedule="equal_numbers").amounts(12, (1, 3, 7, 9), sections)
    assert {block - 6: rate for block, rate in schedule.items() if block >= 6} == {
        block: rate for block, rate in schedule.items() if block < 6
    }


def test_blocks_of_no_weight_merge_nothing():
    assert spread({1: 0.5}, [0.0, 1.0, 0.0], least=0.1) == pytest.approx([1.0, 0.5, 1.0])


def test_a_schedule_for_several_keep_rates_is_refused():
    for rates in ((0.9, 0.8, 0.7), {3: 0.5}):
        with pytest.raises(ConfigError, match="leave schedule out"):
            MergeConfig(rates, schedule="equal_numbers")


def test_a_sequence_has_one_keep_rate_a_stage():
    assert MergeConfig([0.9, 0.8, 0.7]).amounts(12) == {3: 0.9, 6: 0.8, 9: 0.7}
    assert MergeConfig((0.9, 1)).amounts(2) == {0: 0.9}


def test_a_mapping_names_the_blocks():
    assert MergeConfig({5: 0.5, 2: 0.9}).amounts(12) == {2: 0.9, 5: 0.5}


def test_stages_that_keep_everything_are_no_stages():
    assert MergeConfig(1.0).amounts(12) == {}
    assert MergeConfig((1.0, 0.5, 1)).amounts(12) == {6: 0.5}


def test_a_config_is_equal_to_and_hashes_like_its_twin():
    assert MergeConfig([0.7, 0.8]) == MergeConfig((0.7, 0.8))
    assert hash(MergeConfig({1: 0.5})) == hash(MergeConfig({1: 0.5}))


def test_options_override_a_config():
    config = MergeConfig(0.5, similarity="keys")
    assert MergeConfig.of(config, importance="uniform") == MergeConfig(0.5, similarity="keys", importance="uniform")


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan"), float("inf"), [0.5, 2.0], {3: 0.0}])
def test_a_keep_rate_outside_the_range_is_refused(rate):
    with pytest.raises(ConfigError, match=r"outside \(0, 1\]"):
        MergeConfig(rate)


@pytest.mark.parametrize("rate", ["0.7", None, True, b"x", object(), [0.5, "0.5"], {3: None}, {0.5}])
def test_a_keep_rate_of_the_wrong_type_is_refused(rate):
    with pytest.raises(ConfigError, match="Give a number"):
        MergeConfig(rate)


@pytest.mark.parametrize("stages", [3, "369", (3, 3), (-1,), (1.0,), (True,)])
def test_stages_that_are_no_block_indices_are_refused(stages):
    with pytest.raises(ConfigError, match="stages"):
        MergeConfig(0.7, stages=stages)


@pytest.mark.parametrize("rate", [{-1: 0.5}, {"3": 0.5}, {True: 0.5}])
def test_mapping_keys_that_are_no_block_indices_are_refused(rate):
    with pytest.raises(ConfigError, match="block index"):
        MergeConfig(rate)


def test_the_number_of_keep_rates_has_to_be_that_of_the_stages():
    with pytest.raises(ConfigError, match="2 numbers for 3 stages"):
        MergeConfig((0.7, 0.7)).amounts(12)
    with pytest.raises(ConfigError, match="2 numbers for 1 stages"):
        MergeConfig((0.7, 0.7), stages=(1,))


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"Block 12 does not exist.*0 to 11"):
        MergeConfig({12: 0.5}).amounts(12)
    with pytest.raises(ConfigError, match="Block 12 does not exist"):
        MergeConfig(0.7, stages=(3, 12)).amounts(12)


def test_a_mapping_and_stages_together_are_refused():
    with pytest.raises(ConfigError, match="leave stages out"):
        MergeConfig({3: 0.5}, stages=(3,))


@pytest.mark.parametrize("option", ["importance", "similarity", "multi_scale", "schedule"])
@pytest.mark.parametrize("value", ["nonsense", 1])
def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option}=.* is not known. Choose one of .*'"):
        MergeConfig(0.7, **{option: value})


def test_a_switch_that_is_no_bool_is_refused():
    with pytest.raises(ConfigError, match="Give True or False"):
        MergeConfig(0.7, proportional_attention=1)


def test_an_unknown_option_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match=r"no option 'keep'.*stages, schedule, importance"):
        MergeConfig.of(0.7, keep=1)


def test_config_errors_are_value_errors_and_errors_of_this_package():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, TokenMergeError)


def test_type_checkers_know_the_options_that_there_are():
    options = typing.get_type_hints(MergeOptions)
    names = [option.name for option in dataclasses.fields(MergeConfig)][1:]
    assert sorted(options) == sorted(names)
    for name, allowed in (
        ("method", METHODS),
        ("schedule", SCHEDULES),
        ("importance", IMPORTANCE),
        ("similarity", SIMILARITY),
        ("multi_scale", MULTI_SCALE),
    ):
        literals = [part for part in (options[name], *typing.get_args(options[name])) if typing.get_origin(part)]
        found = set(typing.get_args(literals[-1] if literals else options[name]))
        assert found == set(allowed) - {None}
