"""Calibration: the schedule that moves the output the least, for a budget."""

import json
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from families import images, make

from token_merge_plugin import ConfigError, DataError, MergeConfig, UnsupportedModelError, apply, remove
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.trial.budgets import Budget
from token_merge_plugin.trial.calibration import _Measured, better, calibrate
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.distances import Unpatched
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import features

FAST = {"moves": 3}


def moved(model, config, x):
    """The mean root of the KL divergence."""
    with torch.inference_mode():
        expected = remove(model)(x).log_softmax(1)
        output = apply(model, config)(x).log_softmax(1)
        return F.kl_div(output, expected, log_target=True, reduction="none").sum(1).clamp(min=0).sqrt().mean().item()


@pytest.fixture(scope="module")
def calibrated():
    """The built-in model calibrated on 40 of its images."""
    return calibrate(create_reference_model(), load_images()[0][:40], 0.75, moves=3)


def test_the_schedule_keeps_within_the_budget(calibrated):
    model, image = create_reference_model(), load_images()[0][:1]
    share = count_macs(apply(model, calibrated), image) / count_macs(remove(model), image)
    assert share == pytest.approx(0.75, abs=0.005)


def test_it_moves_the_output_less_than_the_default_stages_and_no_more_on_images_that_it_has_not_seen(calibrated):
    model, x = create_reference_model(), load_images()[0]
    target = int(0.75 * count_macs(model, x[:1]))
    default = equal_compute(model, x[:1], MergeConfig(), target)
    assert moved(model, calibrated, x[:40]) < 0.95 * moved(model, default, x[:40])
    assert moved(model, calibrated, x[100:300]) < 1.05 * moved(model, default, x[100:300])


def test_a_schedule_is_better_only_by_more_than_the_standard_error():
    def taken(best, other):
        first, second = (_Measured({}, MergeConfig(), torch.tensor(distances)) for distances in (best, other))
        return better(first, second) is second

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


def test_an_interrupted_calibration_goes_on_to_the_same_schedule(tmp_path, monkeypatch):
    model, x, log = make(), images(), tmp_path / "log.jsonl"
    whole, calls = Unpatched.distances, []

    def distances(self):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return whole(self)

    def calibrated():
        return calibrate(model, x, 0.8, log=log, moves=1)

    monkeypatch.setattr(Unpatched, "distances", distances)
    monkeypatch.setattr("token_merge_plugin.trial.calibration.by_number", lambda sections: [])
    with pytest.raises(KeyboardInterrupt):
        calibrated()
    found = calibrated()
    done = len(calls)
    assert calibrated() == found
    assert len(calls) == done  # everything was in the log
    with pytest.raises(ConfigError, match="other work: it differs in asked"):
        calibrate(model, x, 0.7, log=log, moves=1)


def test_measured_times_come_from_the_log_when_the_same_work_is_done_again(tmp_path, monkeypatch):
    def timed(model, configs, images, use):  # never the same twice
        return [[1.0], *([random.random()] for _ in configs[1:])]

    def times(*schedules):
        with Journal(tmp_path / "log.jsonl", {}) as journal:
            budget = Budget(make().eval(), images(), "latency", 0.8, journal)
            return [budget.time_left(MergeConfig(1.0), [schedule])[0] for schedule in schedules]

    monkeypatch.setattr("token_merge_plugin.trial.budgets.time_in_turns", timed)
    first = times({1: 0.7}, {2: 0.5})
    again = times({1: 0.7}, {2: 0.5}, {2: 0.5})
    assert again[:2] == first
    assert again[2] not in first


@pytest.mark.parametrize("kind", ["PiT", "CaiT", "Swin"])
def test_every_kind_of_section_can_be_calibrated(kind):
    model, x = make(kind), images(kind)
    config = calibrate(model, x, 0.9, **FAST)
    share = count_macs(apply(model, config), x[:1]) / count_macs(remove(model), x[:1])
    assert share == pytest.approx(0.9, abs=0.02)


def reached(model, x, target=0.8, **options):
    """Calibrate, and return the config and the report."""
    reports = []
    config = calibrate(model, x, target, moves=1, report=reports.append, **options)
    assert len(reports) == 1
    return config, reports[0]


def test_a_model_without_classes_is_calibrated_by_its_patch_tokens_or_by_what_a_head_makes_of_them():
    model, x = make(num_classes=0), images(batch=2)
    config, report = reached(model, x)
    assert report.measure == "relative error of the patch tokens"
    macs = count_macs(apply(model, config), x[:1], features)
    assert report.left == pytest.approx(macs / count_macs(remove(model), x[:1], features))
    _, report = reached(model, x, head=torch.nn.Linear(32, 2))
    assert report.measure == "relative error of the head's output"


def test_the_report_says_what_was_reached_and_how_far_the_default_is():
    model, x = make(), images(batch=3)
    config, report = reached(model, x)
    assert report.config == config
    assert report.images == 3
    assert report.left == pytest.approx(count_macs(apply(model, config), x) / count_macs(remove(model), x))
    assert report.distance == pytest.approx(moved(model, config, x), rel=1e-3)
    default = equal_compute(remove(model), x[:1], MergeConfig(), int(0.8 * count_macs(remove(model), x)))
    assert report.default_distance == pytest.approx(moved(model, default, x), rel=0.1)
    assert report.difference[0] == pytest.approx(report.distance - report.default_distance, abs=1e-6)
    assert f"{report.left:.3f} of the multiply-adds are left" in str(report)
    assert f"{report.default_distance:.4f}" in str(report)


def test_where_the_default_cannot_leave_so_little_the_report_says_so():
    model, x = make(), images()
    config, report = reached(model, x, target=0.3)
    assert min(config.keep_rate) == 0
    assert report.difference is None
    assert "the default schedule cannot leave so little" in str(report)


def test_batches_of_a_loader_are_as_good_as_one_tensor():
    model, x = make(), images(batch=5)
    batches = [(x[:2], None), (x[2:], None), (x, None)]
    assert calibrate(model, batches, 0.8, num_images=5, moves=1) == calibrate(model, x, 0.8, moves=1)


@pytest.mark.parametrize("helps", [True, False])
def test_proportional_attention_is_switched_off_where_that_surely_helps(monkeypatch, helps):
    model, x = make(), images(batch=4)

    def distances(self):
        plan = next(m._token_merge.plan for m in self._model.modules() if hasattr(m, "_token_merge"))
        noise = torch.tensor([0.0, 0.1, 0.2, 0.3])
        gain = (0.4, 0.5, 0.6, 0.7) if helps else (-0.1, 0.2, -0.1, 0.2)
        return 1 + noise - (0 if plan.config.proportional_attention else torch.tensor(gain))

    monkeypatch.setattr(Unpatched, "distances", distances)
    assert calibrate(model, x, 0.8, moves=0).proportional_attention is not helps


def test_an_option_that_is_given_is_not_chosen(monkeypatch):
    monkeypatch.setattr("token_merge_plugin.trial.calibration.better", lambda best, other, errors=1.0: other)
    given = {"importance": "class_attention", "proportional_attention": True}
    config = calibrate(make(), images(), 0.8, moves=0, **given)
    assert (config.importance, config.proportional_attention) == ("class_attention", True)
    config = calibrate(make(), images(), 0.8, moves=0)
    assert (config.importance, config.proportional_attention) == ("uniform", False)


def test_what_comparing_longer_descriptors_costs_is_saved_elsewhere(monkeypatch):
    monkeypatch.setattr("token_merge_plugin.trial.calibration.ALTERNATIVES", (("similarity", "tokens", 1.0),))
    monkeypatch.setattr("token_merge_plugin.trial.calibration.better", lambda best, other, errors=1.0: other)
    model, x = make(img_size=112), torch.randn(2, 3, 112, 112)  # 28 x 28 patches: mean keys by default
    config = calibrate(model, x, 0.8, moves=0)
    assert config.similarity == "tokens"
    assert count_macs(apply(model, config), x) / count_macs(remove(model), x) == pytest.approx(0.8, abs=0.01)


def test_a_budget_of_time_is_met_as_it_is_measured(monkeypatch):
    # Time of which half does not follow the multiply-adds: 0.85 of the time are 0.7 of the multiply-adds.
    def times(self, base, schedules):
        return [0.5 + self.compute_left(base, schedule) / 2 for schedule in schedules]

    monkeypatch.setattr(Budget, "time_left", times)
    model, x = make(), images(batch=2)
    config = calibrate(model, x, 0.85, budget="latency", moves=1)
    assert count_macs(apply(model, config), x) / count_macs(remove(model), x) == pytest.approx(0.7, abs=0.05)


def test_a_config_is_saved_as_json(calibrated):
    text = calibrated.to_json()
    assert MergeConfig.from_json(text) == calibrated
    assert isinstance(json.loads(text)["keep_rate"], dict)
    model, x = create_reference_model(), load_images()[0][:2]
    with torch.inference_mode():
        assert torch.equal(apply(model, MergeConfig.from_json(text))(x), apply(model, calibrated)(x))
    old = MergeConfig.from_json('{"keep_rate": [0.9, 0.5], "stages": [1, 2]}')  # as 0.1.0 wrote a mapping
    assert old == MergeConfig((0.9, 0.5), stages=(1, 2))
    for config in (MergeConfig(), old, MergeConfig({3: 0.9, 5: 1}), MergeConfig(method="tome", r=8)):
        assert MergeConfig.from_json(config.to_json()) == config
    for text, message in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"keep_rat": 1}', "no option")):
        with pytest.raises(ConfigError, match=message):
            MergeConfig.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.5,), {}, ConfigError, "in \\(0, 1\\)"),
        ((1,), {}, ConfigError, "not a float"),
        ((0.67,), {"budget": "money"}, ConfigError, "budget='money'"),
        ((0.01,), {}, ConfigError, r"No schedule leaves 0.01 of .* the least is 0\.\d"),
        ((0.67,), {"method": "tome"}, ConfigError, "leave method and stages out"),
        ((0.67,), {"stages": (1, 2)}, ConfigError, "leave method and stages out"),
        ((0.67,), {"similarity": "magic"}, ConfigError, "similarity"),
        ((0.67,), {"simlarity": "keys"}, ConfigError, "no option 'simlarity'"),
        ((0.67,), {"batch_size": 0}, ConfigError, "batch_size=0 is not a whole number of at least 1"),
        ((0.67,), {"num_images": 0}, ConfigError, "num_images=0"),
        ((0.67,), {"head": 3}, ConfigError, "head=3 cannot be called"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_model_alone(arguments, options, error, message):
    model = timm.create_model("test_vit")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        calibrate(model, torch.randn(1, 3, 160, 160), *arguments, **options, **FAST)
    assert [type(module) for module in model.modules()] == classes


def test_a_target_out_of_reach_is_refused_before_the_images_are_run(monkeypatch):
    monkeypatch.setattr("token_merge_plugin.trial.calibration.Unpatched", None)
    for budget in ("compute", "latency"):
        with pytest.raises(ConfigError, match="Choose a larger target"):
            calibrate(make("Swin"), images("Swin"), 0.01, budget=budget)


def test_calibration_needs_images_and_one_supported_model():
    model = timm.create_model("test_vit")
    with pytest.raises(DataError, match="given none"):
        calibrate(model, torch.zeros(0, 3, 160, 160))
    for wrong in (torch.zeros(1, 3, 48, 48), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32).double()):
        with pytest.raises(DataError, match=r"does not take images \[\d, \d+, \d+\] of torch.float.*prepare them"):
            calibrate(make(), wrong)
    with pytest.raises(DataError, match="uint8, not floats"):
        calibrate(model, torch.zeros(1, 3, 160, 160, dtype=torch.uint8))
    with pytest.raises(UnsupportedModelError, match="no model that is served"):
        calibrate(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(UnsupportedModelError, match="2 vision transformers"):
        calibrate(torch.nn.ModuleList([model, timm.create_model("test_vit")]), torch.zeros(1, 3, 160, 160))
