"""The built-in model and images, and the trial: what it measures, and how it stops and goes on."""

import copy
import ctypes
import gzip
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import timm
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import ConfigError, DataError, MergeConfig, UnsupportedModelError, apply, is_patched, remove
from token_merge_plugin.builtin import CLASSES, FOLDER, create_reference_model, load_images, read_idx
from token_merge_plugin.config import DROPPING, METHODS
from token_merge_plugin.trial.accuracy import compare, paired_interval
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.measuring import features, forward, keep_freed_memory, peak_memory, time_in_turns
from token_merge_plugin.trial.run import evaluate, run_trial
from token_merge_plugin.trial.speed import median_interval
from token_merge_plugin.trial.tracing import trace

FAST = {"rounds": 1, "seconds": 0.0}


def make_images(number=10):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tensors(number=10, batch_size=4):
    return Tensors(make_images(number), torch.arange(number) % 10, batch_size)


def accuracy(result):
    """Return the numbers that timing does not change, row by row."""
    columns = ("gmacs", "top1", "top5", "top1_difference", "agreement", "kl", "cosine")
    return [[value for name in columns if (value := getattr(row, name)) is not None] for row in result.rows]


@pytest.fixture(scope="module")
def result():
    return run_trial(create_reference_model(), Tensors(*load_images()), (0.7, 0.5), ("merge", "tome"), **FAST)


def test_the_sample_is_a_thousand_images_of_every_class():
    images, labels = load_images()
    assert images.shape == (1000, 1, 28, 28)
    assert labels.bincount(minlength=len(CLASSES)).min() > 80
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_the_built_in_model_is_small_and_good():
    model = create_reference_model()
    assert (FOLDER / "vit_fashion_mnist.safetensors").stat().st_size < 3 * 2**20
    assert model.patch_embed.num_patches == 196
    assert model.patch_embed.grid_size == model.patch_embed.dynamic_feat_size((28, 28)) == (14, 14)
    images, labels = load_images()
    with torch.inference_mode():
        outputs = torch.cat([model(part) for part in images.split(50)])  # memory for all at once is slow to come by
    assert (outputs.argmax(1) == labels).float().mean() > 0.88


def test_the_defaults_keep_the_accuracy_of_the_built_in_model(result):
    unpatched, at_7, at_5, tome_at_7, tome_at_5 = result.rows
    assert result.images == result.total_images == 1000
    assert unpatched.agreement == 1
    assert unpatched.kl < 1e-9
    assert unpatched.cosine == pytest.approx(1)
    assert unpatched.speed_up == 1
    assert at_7.reduction > 0.3
    assert at_5.reduction > 0.45
    assert at_7.agreement >= 0.995
    assert at_7.kl <= 1e-4
    assert abs(at_7.top1_difference) <= 0.003  # the share of images that may disagree, and a few
    assert at_7.top1_interval[0] < at_7.top1_difference < at_7.top1_interval[1]
    assert at_7.top1_difference == pytest.approx(at_7.top1 - unpatched.top1)
    assert at_5.agreement >= 0.985
    assert at_7.kl < tome_at_7.kl
    assert at_5.kl < tome_at_5.kl


def test_every_row_has_every_number(result):
    others = {"patch_error", "class_error", "head_change", "setting"}
    unpatched = result.rows[0]
    for row in result.rows[1:]:
        assert {name for name, value in vars(row).items() if value is None} == others
        assert row.speed_up_interval[0] <= row.speed_up <= row.speed_up_interval[1]
        assert row.images_per_second == pytest.approx(row.speed_up * unpatched.images_per_second)
        assert row.latency == pytest.approx(unpatched.latency / row.latency_speed_up)
        assert MergeConfig.from_json(row.config).method == row.method
        assert row.ideal_share == pytest.approx(row.speed_up * (1 - row.reduction))


def test_methods_are_compared_at_equal_multiply_adds(result):
    assert result.rows[3].gmacs == pytest.approx(result.rows[1].gmacs, rel=0.005)
    assert result.rows[4].gmacs == pytest.approx(result.rows[2].gmacs, rel=0.005)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_can_be_set_to_a_number_of_multiply_adds(method, share):
    model, image = create_reference_model(), load_images()[0][:1]
    target = int(share * count_macs(model, image))
    config = equal_compute(model, image, MergeConfig(method=method), target)
    assert config.method == method
    assert count_macs(apply(model, config), image) == pytest.approx(target, rel=0.005)


def test_half_precision_keeps_the_accuracy_too():
    images, labels = (x[:200] for x in load_images())
    trial = run_trial(create_reference_model(), Tensors(images, labels), (0.7,), dtype=torch.bfloat16, **FAST)
    assert trial.dtype == "bfloat16"
    assert trial.rows[1].agreement >= 0.98


def test_a_trial_leaves_the_model_as_it_was():
    model = make().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    run_trial(model, tensors(5, 2), (0.5,), **FAST)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes


def test_outputs_are_compared_as_by_hand():
    model, x, labels = make().eval(), make_images(20), torch.arange(20) % 10
    config = MergeConfig(0.3)
    with torch.inference_mode():
        unpatched, merged = model(x), apply(model, config)(x)
    first, counts = compare(model, [None, config], x, labels, batch_size=7)
    pairs = list(zip(unpatched, merged, labels, strict=True))
    assert counts.images == first.images == 20
    assert counts.top1 == sum(int(b.argmax() == label) for _, b, label in pairs)
    assert counts.top5 == sum(int(label in b.argsort(descending=True)[:5]) for _, b, label in pairs)
    assert counts.gained == sum(int(b.argmax() == label != a.argmax()) for a, b, label in pairs)
    assert counts.lost == sum(int(a.argmax() == label != b.argmax()) for a, b, label in pairs)
    assert counts.agree == sum(int(a.argmax() == b.argmax()) for a, b, _ in pairs)
    p, q = unpatched.softmax(1), merged.softmax(1)
    assert counts.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3)
    assert first.top1 == counts.top1 - counts.gained + counts.lost
    assert first.agree == 20
    features = [remove(model).forward_head(model.forward_features(x), pre_logits=True)]
    apply(model, config)
    features.append(model.forward_head(model.forward_features(x), pre_logits=True))
    assert counts.cosine == pytest.approx(torch.cosine_similarity(*features).sum().item(), rel=1e-5)


@given(gained=st.integers(0, 50), lost=st.integers(0, 50), others=st.integers(0, 1000))
def test_the_confidence_interval_is_paired_symmetric_and_never_empty(gained, lost, others):
    images = gained + lost + others + 1
    low, high = paired_interval(gained, lost, images)
    assert -1 <= low < high <= 1
    assert paired_interval(lost, gained, images) == pytest.approx((-high, -low))
    # Wald's interval with one image added to each kind of discordance.
    n, up, down = images + 2, gained + 1, lost + 1
    variance = (up + down - (up - down) ** 2 / n) / n**2
    assert (high + low) / 2 == pytest.approx((up - down) / n, abs=0.5)
    if low > -1 and high < 1:
        assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(variance))


def test_the_confidence_interval_covers_the_truth_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        draw = torch.rand(400, generator=generator)
        low, high = paired_interval(int((draw < 0.03).sum()), int((draw > 0.95).sum()), 400)
        covered += low <= -0.02 <= high
    assert 930 <= covered <= 980


def test_without_labels_agreement_takes_the_place_of_accuracy():
    result = run_trial(make(), Tensors(make_images(5)), (0.5,), **FAST)
    assert not result.labelled
    row = result.rows[1]
    assert row.top1 is row.top5 is row.top1_difference is row.top1_interval is None
    assert row.agreement is not None
    assert row.kl > 0


def test_without_a_classifier_features_are_compared():
    result = run_trial(make(num_classes=0), tensors(5), (0.5,), **FAST)
    row = result.rows[1]
    assert row.top1 is row.agreement is row.kl is None
    assert 0 < row.cosine < 1


def test_a_method_that_does_not_fit_the_model_is_reported_not_fatal():
    model = timm.create_model("test_vit2", img_size=32)
    result = run_trial(model, tensors(4), (0.5,), ("merge", "evit"), **FAST)
    assert [row.method for row in result.rows] == ["unpatched", "merge"]
    assert "class token" in result.refused["evit"]


@pytest.mark.parametrize("labels", [0, 3])
def test_a_trial_needs_a_label_for_each_image(labels):
    with pytest.raises(DataError, match=f"given 2 and {labels}"):
        Tensors(torch.randn(2, 3, 32, 32), torch.zeros(labels, dtype=torch.long))
    with pytest.raises(DataError, match="given 0 and none"):
        Tensors(torch.randn(0, 3, 32, 32))


@pytest.mark.parametrize(
    ("keep_rates", "methods", "message"),
    [((2.0,), ("merge",), "outside"), (((0.9, 0.5),), ("merge",), "2 numbers for"), ((0.7,), ("magic",), "not known")],
)
def test_a_trial_with_a_bad_setting_is_refused(keep_rates, methods, message):
    with pytest.raises(ConfigError, match=message):
        run_trial(make(), tensors(2), keep_rates, methods)


class Interrupted(Tensors):
    """Tensors whose reading is interrupted, as by Ctrl-C, behind so many batches."""

    def __init__(self, *args, after):
        super().__init__(*args)
        self.after = after

    def batches(self, start=0):
        for number, batch in enumerate(super().batches(start)):
            if number == self.after:
                raise KeyboardInterrupt
            yield batch


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on_there(tmp_path):
    log = tmp_path / "trial.jsonl"
    model, images = make(), make_images(10)
    labels = torch.arange(10)
    whole = run_trial(model, Tensors(images, labels, 3), (0.7, 0.5), **FAST)
    part = run_trial(model, Interrupted(images, labels, 3, after=2), (0.7, 0.5), log=log, **FAST)
    assert (part.images, part.total_images) == (6, 10)
    assert accuracy(part) == accuracy(run_trial(model, Tensors(images[:6], labels[:6], 3), (0.7, 0.5), **FAST))

    def no_timing(*args, **kwargs):
        raise AssertionError("Speeds are in the log already.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("token_merge_plugin.trial.speed.time_in_turns", no_timing)
        # Only what is left is read: the first batch, for its shape, and the last two.
        resumed = run_trial(model, Interrupted(images, labels, 3, after=2), (0.7, 0.5), log=log, **FAST)
    assert resumed.images == resumed.total_images == 10
    for mine, other in zip(accuracy(resumed), accuracy(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert [row.speed_up for row in resumed.rows] == [row.speed_up for row in part.rows]


def test_ctrl_c_while_speed_is_measured_leaves_what_is_known(monkeypatch):
    done = []

    def timed(model, configs, images, **kwargs):
        if len(done) == 2:  # throughput and latency of the first contender
            raise KeyboardInterrupt
        done.append(1)
        return time_in_turns(model, configs, images, **kwargs)

    monkeypatch.setattr("token_merge_plugin.trial.speed.time_in_turns", timed)
    result = run_trial(make(), tensors(), (0.7, 0.5), **FAST)
    assert result.images == 0 < result.total_images
    assert [row.speed_up is None for row in result.rows] == [False, False, True]
    assert all(row.agreement is None for row in result.rows)


def test_a_log_is_json_lines_and_survives_a_cut_at_its_end(tmp_path):
    log, model = tmp_path / "trial.jsonl", make()
    whole = run_trial(model, tensors(), (0.5,), log=log, **FAST)
    lines = log.read_text().splitlines()
    assert [json.loads(line).get("kind") for line in lines] == [None, "speed", "accuracy", "accuracy", "accuracy"]
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    resumed = run_trial(model, tensors(), (0.5,), log=log, **FAST)
    assert accuracy(resumed) == accuracy(whole)
    assert log.read_text().splitlines() == lines


def test_results_of_another_trial_are_not_mixed_in(tmp_path):
    log, model = tmp_path / "trial.jsonl", make()
    run_trial(model, tensors(), (0.5,), log=log, **FAST)
    with pytest.raises(ConfigError, match="other work: it differs in contenders"):
        run_trial(model, tensors(), (0.6,), log=log, **FAST)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    with pytest.raises(ConfigError, match="differs in parameters"):
        run_trial(model, tensors(), (0.5,), log=log, **FAST)
    log.write_text("not JSON\n")
    with pytest.raises(DataError, match="cannot be used as a log"):
        run_trial(model, tensors(), (0.5,), log=log, **FAST)
    with pytest.raises(DataError, match="cannot be used as a log"):
        run_trial(model, tensors(), (0.5,), log=tmp_path / "missing" / "trial.jsonl", **FAST)


def test_where_memory_runs_out_the_batch_is_halved():
    def small_memory(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    model = make()
    expected = run_trial(model, tensors(10, 8), (0.5,), **FAST)
    model.patch_embed.register_forward_pre_hook(small_memory)
    with pytest.warns(UserWarning, match="the batch is halved to 2"):
        result = run_trial(model, tensors(10, 8), (0.5,), **FAST)
    assert (expected.batch_size, result.batch_size) == (8, 2)
    for mine, other in zip(accuracy(result), accuracy(expected), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_an_image_that_does_not_fit_into_memory_is_refused():
    def no_memory(module, args):
        if torch.is_inference_mode_enabled():
            raise torch.OutOfMemoryError

    model = make()
    model.patch_embed.register_forward_pre_hook(no_memory)
    with pytest.warns(UserWarning, match="halved"), pytest.raises(DataError, match="single image"):
        run_trial(model, tensors(4), (0.5,), **FAST)


def test_one_setting_is_evaluated_as_in_a_trial():
    model = make()
    result = evaluate(model, tensors(), MergeConfig(0.5))
    assert accuracy(result) == accuracy(run_trial(model, tensors(), (0.5,), **FAST))
    assert result.rows[1].speed_up is None
    row = evaluate(model, tensors(), MergeConfig(method="tome", r=3)).rows[1]
    assert (row.method, row.keep_rate) == ("tome", None)


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    values = [float(value) for value in range(20)]
    assert median_interval(values[::-1]) == (5.0, 14.0)  # the ranks 6 and 15 of 20, as in tables
    assert median_interval(values[:6]) == (0.0, 5.0)
    assert median_interval(values[:3]) == (0.0, 2.0)
    assert median_interval([7.0]) == (7.0, 7.0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 20, generator=generator).tolist()
    covered = sum(low <= 0.5 <= high for low, high in map(median_interval, draws))
    assert 0.945 < covered / len(draws) < 0.975


def test_images_that_the_model_does_not_take_are_an_error_of_our_own():
    for images in (torch.randn(2, 3, 33, 32), torch.randn(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        for work in (
            lambda data: run_trial(make(), data, (0.5,), **FAST),
            lambda data: evaluate(make(), data, MergeConfig()),
        ):
            with pytest.raises(DataError, match="VisionTransformer, unpatched, does not take images"):
                work(Tensors(images))


def test_the_name_of_a_patched_model_is_that_of_its_original_class():
    assert run_trial(apply(make(), 0.5), tensors(2), (0.5,), **FAST).model == "VisionTransformer"
    assert evaluate(apply(make(), 0.5), tensors(), MergeConfig(0.5)).model == "VisionTransformer"


def test_a_fusion_that_was_trained_is_measured_and_not_a_new_one():
    model, x = apply(make(), 0.5, multi_scale="learned"), make_images(6)
    for name, value in model.state_dict().items():
        if name.endswith("token_merge_fusion.gates"):
            value.fill_(1.0)
    config = MergeConfig(0.5, multi_scale="learned")
    with torch.inference_mode():
        expected = model.eval()(x).log_softmax(1)
        unpatched = remove(copy.deepcopy(model))(x).log_softmax(1)
    kl = torch.nn.functional.kl_div(expected, unpatched, log_target=True, reduction="batchmean").item()
    assert evaluate(model, Tensors(x), config).rows[1].kl == pytest.approx(kl, rel=1e-4)
    assert run_trial(model, Tensors(x), (config,), **FAST).rows[1].kl == pytest.approx(kl, rel=1e-4)
    assert evaluate(make(), Tensors(x), config).rows[1].kl != pytest.approx(kl, rel=1e-4)


def test_contenders_are_timed_in_turns():
    model, order = make().eval(), []
    model.register_forward_pre_hook(lambda module, args: order.append(is_patched(module)))
    times = time_in_turns(model, [None, MergeConfig(0.5)], make_images(2), rounds=5, seconds=100)
    assert [len(t) for t in times] == [5, 5]
    assert all(t > 0 for part in times for t in part)
    assert all(len({*pair}) == 2 for pair in zip(order[::2], order[1::2], strict=True))
    few = time_in_turns(model, [None], make_images(2), rounds=100, seconds=0)
    assert len(few[0]) == 3


@pytest.mark.parametrize("use", [forward, features])
def test_compiled_copies_are_timed_and_the_model_is_left_alone(use, monkeypatch):
    compiled = []

    def eager(run, **options):
        assert run.func is use
        compiled.append(is_patched(*run.args))
        return compile(run, backend="eager", **options)

    compile, model = torch.compile, make().eval()
    monkeypatch.setattr(torch, "compile", eager)
    times = time_in_turns(model, [None, MergeConfig(0.5)], make_images(2), rounds=1, seconds=0, compiled=True, use=use)
    assert [len(part) for part in times] == [1, 1]
    assert compiled == [False, True]
    assert not is_patched(model)

    def broken(model, **options):
        raise RuntimeError("no compiler is there.")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match="cannot be compiled here: no compiler is there"):
        time_in_turns(model, [None], make_images(2), compiled=True)


def test_glibc_is_asked_to_keep_memory_and_others_are_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *call: calls.append(call)))
    keep_freed_memory()
    assert calls == [(-4, 0), (-1, 2**31 - 1), (-2, 2**28)]  # no mmap, no trimming, room at the top
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl, macOS
    keep_freed_memory()


def test_peak_memory_is_that_of_the_tensors_that_live_at_one_time():
    class Chain(torch.nn.Module):
        def forward(self, x):
            y = x + 1  # 400 bytes
            z = torch.cat((y, y))  # and 800 more
            del y
            return z.sum() + x.relu().sum()  # 4, 400 and 4

    assert peak_memory(Chain(), torch.zeros(100)) == 1208
    # In wider models than the built-in one, comparing all tokens takes less than what they are compared for.
    model, images = timm.create_model("vit_tiny_patch16_224").eval(), torch.randn(2, 3, 224, 224)
    full = peak_memory(model, images)
    assert peak_memory(apply(model, {0: 0.3}), images) < full


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_says_which_token_holds_each_patch(method):
    model, images = create_reference_model(), load_images()[0]
    stages = trace(apply(model, 0.7, method=method), images[5:6])
    # Late numbers begin with less than one token.
    assert len(stages) == {"merge": 4, "tome": 12, "late_tome": 11}.get(method, 3)
    for stage in stages:
        tokens = len(stage.representative)
        assert stage.grid_size == (14, 14)
        assert stage.token_map.shape == (196,)
        assert set(stage.token_map.tolist()) - {-1} == set(range(tokens))
        assert (stage.token_map == -1).any() == (method in DROPPING)
        assert torch.equal(stage.token_map[stage.representative], torch.arange(tokens))
    for before, after in pairwise(stages):
        # Patches that were together stay together, and what is dropped stays so.
        for token in range(len(before.representative)):
            assert len(after.token_map[before.token_map == token].unique()) == 1
        assert (after.token_map[before.token_map == -1] == -1).all()


def test_a_trace_knows_the_grid_of_images_that_are_not_square():
    model = timm.create_model("test_vit", dynamic_img_size=True).eval()
    stages = trace(apply(model, 0.5), torch.randn(1, 3, 64, 128))
    assert [stage.grid_size for stage in stages] == [(4, 8)] * len(stages)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224"])
def test_a_model_without_a_set_of_tokens_to_draw_is_refused(name):
    model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="not patched"):
        trace(model, torch.randn(1, 3, 224, 224))
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        trace(apply(model, 0.7), torch.randn(1, 3, 224, 224))


def test_idx_files_may_be_plain_or_zipped(tmp_path):
    zipped = FOLDER / "t10k-labels-idx1-ubyte.gz"
    plain = tmp_path / "t10k-labels-idx1-ubyte"
    plain.write_bytes(gzip.decompress(zipped.read_bytes()))
    assert torch.equal(read_idx(plain), read_idx(zipped))


def test_missing_damaged_and_mismatched_idx_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_images(tmp_path)
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    images.write_bytes(b"not idx")
    with pytest.raises(DataError, match="not an IDX file"):
        load_images(tmp_path)
    images.write_bytes(b"\0\0\x08\x03" + (2).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + b"\0" * 10)
    with pytest.raises(DataError, match="cut short"):
        load_images(tmp_path)
    images.write_bytes(b"\0\0\x08\x03" + (2).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + b"\0" * 2 * 784)
    labels.write_bytes(b"\0\0\x08\x01" + (1).to_bytes(4, "big") + b"\0")
    with pytest.raises(DataError, match="2 images but 1 labels"):
        load_images(tmp_path)
    images.write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(DataError, match="cannot be read"):
        load_images(tmp_path)
