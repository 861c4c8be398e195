import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import ConfigError, MergeConfig, TokenMergeError
from token_merge_plugin.config import default_stages, ratio, tokens_kept


def test_default_stages_are_at_a_quarter_a_half_and_three_quarters_of_the_depth():
    assert default_stages(12) == (3, 6, 9)
    assert default_stages(24) == (6, 12, 18)
    assert default_stages(32) == (8, 16, 24)
    assert default_stages(1) == (0,)


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


def test_a_float_keep_rate_counts_for_every_stage():
    assert MergeConfig(0.7).schedule(12) == {3: 0.7, 6: 0.7, 9: 0.7}
    assert MergeConfig(0.5, stages=(1, 2)).schedule(12) == {1: 0.5, 2: 0.5}


def test_a_sequence_has_one_keep_rate_a_stage():
    assert MergeConfig([0.9, 0.8, 0.7]).schedule(12) == {3: 0.9, 6: 0.8, 9: 0.7}
    assert MergeConfig((0.9, 1)).schedule(2) == {0: 0.9}


def test_a_mapping_names_the_blocks():
    assert MergeConfig({5: 0.5, 2: 0.9}).schedule(12) == {2: 0.9, 5: 0.5}


def test_stages_that_keep_everything_are_no_stages():
    assert MergeConfig(1.0).schedule(12) == {}
    assert MergeConfig((1.0, 0.5, 1)).schedule(12) == {6: 0.5}


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
        MergeConfig((0.7, 0.7)).schedule(12)
    with pytest.raises(ConfigError, match="2 numbers for 1 stages"):
        MergeConfig((0.7, 0.7), stages=(1,))


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"Block 12 does not exist.*0 to 11"):
        MergeConfig({12: 0.5}).schedule(12)
    with pytest.raises(ConfigError, match="Block 12 does not exist"):
        MergeConfig(0.7, stages=(3, 12)).schedule(12)


def test_a_mapping_and_stages_together_are_refused():
    with pytest.raises(ConfigError, match="leave stages out"):
        MergeConfig({3: 0.5}, stages=(3,))


@pytest.mark.parametrize("option", ["importance", "similarity", "multi_scale"])
@pytest.mark.parametrize("value", ["nonsense", None, 1])
def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option}=.* is not known. Choose one of '"):
        MergeConfig(0.7, **{option: value})


@pytest.mark.parametrize("option", ["distinctiveness", "proportional_attention"])
def test_a_switch_that_is_no_bool_is_refused(option):
    with pytest.raises(ConfigError, match="Give True or False"):
        MergeConfig(0.7, **{option: 1})


def test_an_unknown_option_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match=r"no option 'keep'.*stages, importance"):
        MergeConfig.of(0.7, keep=1)


def test_config_errors_are_value_errors_and_errors_of_this_package():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, TokenMergeError)
