"""Calibration: the schedule that moves the output the least, for a budget."""

import json
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from families import images, make
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import ConfigError, DataError, MergeConfig, UnsupportedModelError, apply, remove
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.trial.calibration import LEVELS, _better, _cheapest, _interpolated, _patterns, calibrate
from token_merge_plugin.trial.counting import count_macs, equal_compute

FAST = {"moves": 3}


def moved(model, config, x):
    """The mean root of the KL divergence."""
    with torch.inference_mode():
        expected = remove(model)(x).log_softmax(1)
        output = apply(model, config)(x).log_softmax(1)
        return F.kl_div(output, expected, log_target=True, reduction="none").sum(1).clamp(min=0).sqrt().mean().item()


@pytest.fixture(scope="module")
def calibrated():
    """The built-in model calibrated on 100 of its images."""
    return calibrate(create_reference_model(), load_images()[0][:100], 0.6, moves=8)


def test_the_schedule_keeps_within_the_budget(calibrated):
    model, image = create_reference_model(), load_images()[0][:1]
    share = count_macs(apply(model, calibrated), image) / count_macs(remove(model), image)
    assert share == pytest.approx(0.6, abs=0.005)


def test_it_moves_the_output_less_than_the_default_stages_and_no_more_on_images_that_it_has_not_seen(calibrated):
    model, x = create_reference_model(), load_images()[0]
    target = int(0.6 * count_macs(model, x[:1]))
    default = equal_compute(model, x[:1], MergeConfig(), target)
    assert moved(model, calibrated, x[:100]) < 0.95 * moved(model, default, x[:100])
    assert moved(model, calibrated, x[100:500]) < 1.05 * moved(model, default, x[100:500])


def test_a_schedule_is_better_only_by_more_than_the_standard_error():
    def taken(best, other):
        return _better(({0: 0.5}, torch.tensor(best)), ({1: 0.5}, torch.tensor(other)))[0] == {1: 0.5}

    assert taken([1.0, 2.0, 3.0, 4.0], [0.9, 1.8, 2.9, 3.8])
    assert not taken([1.0, 2.0, 3.0, 4.0], [0.1, 2.2, 3.0, 4.0])
    assert not taken([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert taken([1.0], [0.5])


def test_the_same_seed_gives_the_same_schedule_and_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit").train(), torch.randn(4, 3, 160, 160)
    classes = [type(module) for module in model.modules()]
    first, second = (calibrate(model, x, 0.8, seed=3, **FAST) for _ in range(2))
    assert first == second
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["PiT", "CaiT", "Swin"])
def test_every_kind_of_section_can_be_calibrated(kind):
    model, x = make(kind), images(kind)
    config = calibrate(model, x, 0.9, **FAST)
    share = count_macs(apply(model, config), x[:1]) / count_macs(remove(model), x[:1])
    assert share == pytest.approx(0.9, abs=0.02)


def test_schedules_to_begin_with_are_regular_and_a_stage_stays_in_its_section():
    found = [tuple(pattern) for pattern in _patterns([range(3), range(3, 9)], (1, 3, 6))]
    assert found[0] == (1, 3, 6)
    assert found[1] == (0, 3, 5)  # one block earlier, but 3 is the first behind the pooling
    assert {tuple(range(9)), (0, 2, 4, 6, 8), (0, 3, 6), (0, 4, 8)} <= set(found)
    assert len(set(found)) == len(found)


def test_a_model_without_classes_is_calibrated_by_its_features():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    assert calibrate(model, torch.randn(2, 3, 160, 160), 0.8, **FAST).keep_rate


def test_a_budget_of_time_is_met_as_it_is_measured(monkeypatch):
    # Time of which half does not follow the multiply-adds: 0.85 of the time are 0.7 of the multiply-adds.
    from token_merge_plugin.trial.calibration import _Calibration

    def times(self, schedules):
        return [0.5 + self.share(schedule) / 2 for schedule in schedules]

    monkeypatch.setattr(_Calibration, "time_shares", times)
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit"), torch.randn(2, 3, 160, 160)
    config = calibrate(model, x, 0.85, budget="latency", **FAST)
    assert count_macs(apply(model, config), x) / count_macs(remove(model), x) == pytest.approx(0.7, abs=0.05)


def test_a_config_is_saved_as_json(calibrated):
    text = calibrated.to_json()
    assert MergeConfig.from_json(text) == MergeConfig(**json.loads(text))
    model, x = create_reference_model(), load_images()[0][:2]
    with torch.inference_mode():
        assert torch.equal(apply(model, MergeConfig.from_json(text))(x), apply(model, calibrated)(x))
    for config in (MergeConfig(), MergeConfig((0.9, 0.5), stages=(1, 2)), MergeConfig(method="tome", r=8)):
        assert MergeConfig.from_json(config.to_json()) == config
    for text, message in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"keep_rat": 1}', "no option")):
        with pytest.raises(ConfigError, match=message):
            MergeConfig.from_json(text)


def test_the_path_is_the_cheapest_of_all():
    """Against every path, for prices drawn at random."""
    draw = random.Random(0)
    few = (1.0, 0.7, 0.4)
    for _ in range(20):
        prices = {block: [(0.2, a := draw.random()), (0.4, a * 2), (0.6, a * 5)] for block in range(3)}
        savings = {0: 0.9, 1: 0.6, 2: 0.3}
        schedule = _cheapest([range(3)], prices, savings, 0.35)

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


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.5,), {}, ConfigError, "in \\(0, 1\\)"),
        ((1,), {}, ConfigError, "not a float"),
        ((0.67,), {"budget": "money"}, ConfigError, "budget='money'"),
        ((0.01,), {}, ConfigError, "No schedule leaves 0.01"),
        ((0.67,), {"method": "tome"}, ConfigError, "leave method and stages out"),
        ((0.67,), {"stages": (1, 2)}, ConfigError, "leave method and stages out"),
        ((0.67,), {"similarity": "magic"}, ConfigError, "similarity"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_model_alone(arguments, options, error, message):
    model = timm.create_model("test_vit")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        calibrate(model, torch.randn(1, 3, 160, 160), *arguments, **options, **FAST)
    assert [type(module) for module in model.modules()] == classes


def test_calibration_needs_images_and_one_supported_model():
    model = timm.create_model("test_vit")
    with pytest.raises(DataError, match="given none"):
        calibrate(model, torch.zeros(0, 3, 160, 160))
    with pytest.raises(UnsupportedModelError, match="no model that is served"):
        calibrate(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(UnsupportedModelError, match="2 vision transformers"):
        calibrate(torch.nn.ModuleList([model, timm.create_model("test_vit")]), torch.zeros(1, 3, 160, 160))
