"""The results of a trial: verdict, table, JSON, CSV, chart, and the page in a real browser."""

import csv
import dataclasses
import html
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import token_merge_plugin
from token_merge_plugin import DataError, MergeConfig, TokenMergeError
from token_merge_plugin.config import METHODS
from token_merge_plugin.errors import MissingExtraError
from token_merge_plugin.trial.drawing import Picture, StagePicture, draw_stage
from token_merge_plugin.trial.judging import best_row, caveats, verdict
from token_merge_plugin.trial.report import (
    SERIES,
    _chart,
    _own_style,
    _points,
    image_uri,
    require_charts,
    write_html,
    write_png,
)
from token_merge_plugin.trial.results import TrialResult, TrialRow, from_json, to_csv, to_json
from token_merge_plugin.trial.table import format_table

UNPATCHED = TrialRow(
    method="unpatched",
    keep_rate=None,
    gmacs=4.0,
    reduction=0.0,
    images_per_second=100.0,
    speed_up=1.0,
    ideal_share=1.0,
    latency=20.0,
    latency_speed_up=1.0,
    peak_memory=300.0,
    top1=0.8,
    top5=0.95,
    top1_difference=0.0,
    top1_interval=(0.0, 0.0),
    agreement=1.0,
    kl=0.0,
    cosine=1.0,
)
SPEED = ("images_per_second", "speed_up", "ideal_share", "latency", "latency_speed_up", "peak_memory")
TOP = ("top1", "top5", "top1_difference", "top1_interval")
CLASSES = (*TOP, "agreement", "kl")


def row(keep_rate=0.7, method="merge", *, difference=-0.002, speed_up=1.5, half=0.003, **changes):
    """A row with a top-1 difference, its interval's half width, and a speed-up."""
    values = {
        "method": method,
        "keep_rate": keep_rate,
        "gmacs": 4.0 * keep_rate,
        "reduction": 1 - keep_rate,
        "images_per_second": 100 * speed_up,
        "speed_up": speed_up,
        "ideal_share": speed_up * keep_rate,
        "latency": 20 / speed_up,
        "latency_speed_up": speed_up,
        "peak_memory": 300 * keep_rate,
        "top1": 0.8 + difference,
        "top5": 0.95 + difference / 2,
        "top1_difference": difference,
        "top1_interval": (difference - half, difference + half),
        "agreement": 0.996,
        "kl": 0.0012,
        "cosine": 0.9987,
    }
    return TrialRow(**(values | changes))


def without(rows, fields):
    return [dataclasses.replace(row, **dict.fromkeys(fields)) for row in rows]


def result_of(*rows, unpatched=UNPATCHED, **changes):
    values = {
        "model": "vit_small_patch16_224",
        "data": "photographs",
        "images": 1000,
        "total_images": 1000,
        "labelled": True,
        "rows": (unpatched, *rows),
        "refused": {},
        "unreadable": (),
        "device": "CPU, 2 threads",
        "dtype": "float32",
        "batch_size": 32,
        "versions": {"torch": "2.15.0", "timm": "1.0.31"},
        "command": "token-merge trial --model vit_small_patch16_224",
    }
    return TrialResult(**(values | changes))


def without_labels(*rows, fields=TOP, **changes):
    unpatched, *patched = without([UNPATCHED, *rows], fields)
    return result_of(*patched, unpatched=unpatched, labelled=False, **changes)


# The verdict


def test_the_verdict_is_the_fastest_row_whose_loss_is_tolerable():
    result = result_of(
        row(0.9, difference=0.0, speed_up=1.1),
        row(0.7, difference=-0.002, speed_up=1.46),
        row(0.5, difference=-0.03, speed_up=1.9),
    )
    assert best_row(result).keep_rate == 0.7
    assert verdict(result) == "Keep rate 0.7 keeps 99.8 % of the accuracy at 1.46x the speed."


def test_a_loss_of_half_a_point_is_tolerable_and_a_little_more_is_not():
    assert best_row(result_of(row(difference=0.795 - 0.8))) is not None
    assert best_row(result_of(row(difference=-0.0051))) is None


@pytest.mark.parametrize(
    ("top1", "text"),
    [(0.81, "all of"), (0.8, "all of"), (0.7999, "over 99.9 % of"), (0.796, "99.5 % of")],
)
def test_only_an_accuracy_that_is_not_lower_is_all_of_it(top1, text):
    assert verdict(result_of(row(top1=top1))).startswith(f"Keep rate 0.7 keeps {text} the accuracy")


def test_a_method_other_than_merge_is_named():
    result = result_of(row(0.7, speed_up=1.4), row(0.7, "tome", speed_up=1.6))
    assert verdict(result) == "Method tome at keep rate 0.7 keeps 99.8 % of the accuracy at 1.60x the speed."


def test_merge_is_preferred_at_equal_speed():
    result = result_of(row(0.7, "tome", speed_up=1.42), row(0.7, speed_up=1.40), row(0.8, speed_up=1.2))
    assert best_row(result) == result.rows[2]


def test_without_labels_the_verdict_is_about_equal_predictions():
    result = without_labels(row(0.7, speed_up=1.46), row(0.5, speed_up=1.9, agreement=0.98))
    assert verdict(result) == "Keep rate 0.7 gives the same prediction for 99.6 % of the images at 1.46x the speed."
    assert "for all of the images" in verdict(without_labels(row(agreement=1.0)))
    assert "for over 99.9 % of the images" in verdict(without_labels(row(agreement=0.9999)))
    assert best_row(without_labels(row(agreement=0.99))) is not None
    assert best_row(without_labels(row(agreement=0.989))) is None


def test_without_classes_the_verdict_is_about_the_features():
    result = without_labels(row(0.7, cosine=0.9934, speed_up=1.46), row(0.5, cosine=0.98), fields=CLASSES)
    assert verdict(result) == (
        "Keep rate 0.7 gives features with a cosine similarity of 0.993 to the unpatched ones at 1.46x the speed."
    )


def without_classes(*rows, **changes):
    errors = {"patch_error": 0.0, "class_error": 0.0, "head_change": 0.0 if rows[0].head_change is not None else None}
    unpatched, *patched = without([dataclasses.replace(UNPATCHED, **errors), *rows], CLASSES)
    return result_of(*patched, unpatched=unpatched, labelled=False, **changes)


def test_with_a_head_the_verdict_is_about_the_patch_tokens_and_says_what_the_head_makes_of_them():
    result = without_classes(
        row(0.8, patch_error=0.081, head_change=0.00983, cosine=0.95, speed_up=1.21),
        row(0.5, patch_error=0.148, head_change=0.0213, cosine=0.999, speed_up=1.46),
    )
    assert verdict(result) == (
        "Keep rate 0.8 moves the patch tokens by 8.1 % and the head's output by 0.00983 at 1.21x the speed."
    )
    assert best_row(without_classes(row(patch_error=0.1, head_change=1.0))) is not None
    assert best_row(without_classes(row(patch_error=0.1001, head_change=1.0))) is None
    assert verdict(without_classes(row(0.9, patch_error=0.121, head_change=0.02))) == (
        "Token merging does not help here: at keep rate 0.9 the patch tokens are already 12.1 % off."
    )
    assert "the patch tokens stay, but" in verdict(without_classes(row(patch_error=0.05, head_change=1.0, speed_up=1)))


def test_tokens_that_are_not_pooled_are_judged_by_their_error():
    result = without_classes(row(0.8, patch_error=0.081, cosine=None, speed_up=1.21))
    assert verdict(result) == "Keep rate 0.8 moves the patch tokens by 8.1 % at 1.21x the speed."


def test_pooled_features_are_judged_by_the_cosine_and_heads_of_patch_tokens_get_advice_of_their_own():
    mild = row(0.9, cosine=0.9995, patch_error=0.0651, speed_up=1.1)
    result = without_classes(mild, row(0.7, cosine=0.9949, patch_error=0.2034, speed_up=1.43))
    said = (
        "Keep rate 0.7 gives features with a cosine similarity of 0.995 to the unpatched ones and moves the patch "
        "tokens by 20.3 % at 1.43x the speed. For a head that reads the patch tokens, where up to 10 % are tolerable, "
    )
    assert verdict(result) == (
        f"{said}keep rate 0.9 is recommended: it moves the patch tokens by 6.5 % at 1.10x the speed."
    )
    assert verdict(without_classes(*result.rows[2:])) == f"{said}no setting that was tried is recommended."
    assert verdict(without_classes(mild)).endswith("moves the patch tokens by 6.5 % at 1.10x the speed.")


def test_if_no_loss_is_tolerable_the_mildest_keep_rate_says_so():
    result = result_of(row(0.5, difference=-0.3), row(0.9, difference=-0.021), row(0.9, "tome", difference=-0.04))
    assert best_row(result) is None
    assert verdict(result) == (
        "Token merging does not help here: at keep rate 0.9 the model is already 2.1 points less accurate."
    )
    result = result_of(row(0.9, "evit", difference=-0.021))
    assert "at keep rate 0.9 with method evit the model is already" in verdict(result)


def test_if_only_low_keep_rates_were_tried_the_verdict_says_so():
    assert verdict(result_of(row(0.5, difference=-0.021))).endswith("accurate. Higher keep rates were not tried.")


def test_a_loss_without_labels_or_classes_is_said_in_its_own_terms():
    assert verdict(without_labels(row(0.9, agreement=0.966))) == (
        "Token merging does not help here: at keep rate 0.9 the predictions are already different for 3.4 % of the "
        "images."
    )
    assert verdict(without_labels(row(0.9, cosine=0.95), fields=CLASSES)) == (
        "Token merging does not help here: at keep rate 0.9 the features are already down to a cosine similarity of "
        "0.950."
    )


def test_if_nothing_is_faster_the_verdict_says_how_much_and_names_no_cause():
    result = result_of(row(0.9, speed_up=0.97), row(0.7, speed_up=1.01), batch_size=1)
    assert best_row(result) is None
    assert verdict(result) == (
        "Token merging does not help here: the accuracy stays, but the model is not faster on this device: 1.01x at "
        "best, with 30 % less computation, at batch size 1."
    )
    assert "with 3 % less computation" in verdict(result_of(row(0.97, speed_up=1.02)))
    assert best_row(result_of(row(speed_up=1.05))) is not None
    assert best_row(result_of(row(speed_up=1.049))) is None


def test_a_speed_up_is_said_with_its_interval_and_is_none_where_that_reaches_one():
    sure, unsure = row(0.8, speed_up=1.2), row(0.7, speed_up=1.46)
    sure, unsure = (
        dataclasses.replace(one, speed_up_interval=interval)
        for one, interval in ((sure, (1.15, 1.25)), (unsure, (0.9, 1.8)))
    )
    assert verdict(result_of(sure)) == (
        "Keep rate 0.8 keeps 99.8 % of the accuracy at 1.20x the speed (95 %: 1.15x to 1.25x)."
    )
    assert best_row(result_of(sure, unsure)) == sure
    assert verdict(result_of(unsure)) == (
        "Token merging does not help here: the accuracy stays, but the model is not faster on this device: 1.46x (95 "
        "%: 0.90x to 1.80x) at best, with 30 % less computation, at batch size 32."
    )
    assert cells(format_table(result_of(sure)).splitlines()[3])[5] == "1.20x [1.15, 1.25]"


def test_a_row_that_is_slower_at_batch_size_1_says_so_in_the_same_sentence():
    slower = row(speed_up=1.46, latency_speed_up=0.9)
    text = (
        "Keep rate 0.7 keeps 99.8 % of the accuracy at 1.46x the speed in batches of 32, but at 0.90x at batch size 1."
    )
    assert verdict(result_of(slower)) == text
    unsure = dataclasses.replace(slower, latency_speed_up_interval=(0.8, 1.1))
    assert "at batch size 1" not in verdict(result_of(unsure))
    assert "at batch size 1" not in verdict(result_of(slower, batch_size=1))


def test_an_unpatched_model_at_chance_has_no_accuracy_to_keep():
    guessing = dataclasses.replace(UNPATCHED, top1=0.11)
    text = verdict(result_of(row(top1=0.11, difference=0.0), unpatched=guessing, num_classes=10))
    assert text.startswith("Keep rate 0.7 gives the same prediction for 99.6 % of the images")
    assert text.endswith(
        "The unpatched model is no better than chance, with 11.0% of the images right: are the labels those of its "
        "classes?"
    )
    better = dataclasses.replace(UNPATCHED, top1=0.13)
    assert "of the accuracy" in verdict(result_of(row(top1=0.13, difference=0.0), unpatched=better, num_classes=10))


def test_of_random_weights_only_the_speed_is_said():
    said = "The weights are random: what merging costs trained ones was not measured."
    result = result_of(row(0.7, speed_up=1.4, difference=0.0), row(0.5, speed_up=1.8), trained=False)
    assert verdict(result) == f"Keep rate 0.5 runs at 1.80x the speed; what it costs was not measured. {said}"
    result = result_of(*without([row()], SPEED), trained=False)
    assert verdict(result) == f"Nothing can be said of the accuracy of random weights. {said}"


def test_what_may_be_wrong_with_the_images_is_in_the_verdict():
    assert verdict(result_of(row(), warnings=("Labels are numbers.",))).endswith("the speed. Labels are numbers.")


def test_a_setting_of_several_rates_is_named_by_them():
    setting = dataclasses.replace(row(), keep_rate=None, setting="0.9, 0.7, 0.5")
    assert verdict(result_of(setting)).startswith("Setting 0.9, 0.7, 0.5 keeps 99.8 % of the accuracy")
    assert cells(format_table(result_of(setting)).splitlines()[3])[1] == "0.9, 0.7, 0.5"


def test_if_only_what_costs_too_much_is_faster_the_verdict_says_both():
    result = result_of(
        row(0.9, speed_up=1.02), row(0.7, speed_up=1.4, difference=-0.02), row(0.5, speed_up=1.8, difference=-0.06)
    )
    assert best_row(result) is None
    assert verdict(result) == (
        "Token merging does not help here: as long as the accuracy stays, the model runs at 1.02x the speed at best; "
        "at keep rate 0.7, 1.40x, the model is 2.0 points less accurate."
    )


def test_without_speed_the_verdict_is_about_computation():
    result = result_of(*without([row(0.9), row(0.7), row(0.5, difference=-0.1)], SPEED))
    assert verdict(result) == (
        "Keep rate 0.7 keeps 99.8 % of the accuracy with 30 % less computation; its speed was not measured."
    )
    result = result_of(row(0.9, difference=-0.1), *without([row(0.7)], SPEED))
    assert best_row(result) is None
    assert "the accuracy stays at keep rate 0.7, but its speed was not measured" in verdict(result)


def test_without_accuracy_the_verdict_is_about_speed():
    fields = (*CLASSES, "cosine")
    result = without_labels(row(0.7, speed_up=1.4), row(0.5, speed_up=1.8), fields=fields, images=0, total_images=0)
    assert best_row(result) is None
    assert verdict(result) == "Keep rate 0.5 runs at 1.80x the speed; what it costs was not measured."


def test_where_nothing_was_measured_the_verdict_says_that():
    nothing = without([UNPATCHED, row()], (*SPEED, *CLASSES, "cosine"))
    said = "Nothing can be said yet: no patched model was measured."
    assert verdict(result_of(nothing[1], unpatched=nothing[0])) == said
    assert verdict(result_of()) == said
    assert "every method that was asked for is refused" in verdict(result_of(refused={"merge": "a reason"}))


def test_an_interrupted_trial_says_so():
    text = verdict(result_of(row(), images=1200, total_images=50000))
    assert text.endswith("the speed. The trial was interrupted after 1,200 of 50,000 images.")


def test_too_few_images_to_tell_are_said_to_be_too_few():
    assert verdict(result_of(row(half=0.009))).endswith("the speed.")
    assert verdict(result_of(row(half=0.015))).endswith(
        "the speed. 1,000 images are too few to be sure: the difference is uncertain by 1.5 points either way."
    )
    # With no image that differs, the interval is of no width.
    assert verdict(result_of(row(difference=0.0, half=0.0), images=50, total_images=50)).endswith(
        "50 images are too few to be sure."
    )
    assert verdict(without_labels(row(), images=299, total_images=299)).endswith("299 images are too few to be sure.")
    assert verdict(without_labels(row(), images=300, total_images=300)).endswith("the speed.")


def test_labels_of_other_classes_are_noticed():
    wrong = dataclasses.replace(UNPATCHED, top1=0.0)
    text = verdict(result_of(row(top1=0.0, difference=0.0), unpatched=wrong))
    assert text.startswith("Keep rate 0.7 gives the same prediction for 99.6 % of the images")
    assert text.endswith("The unpatched model gets no label right: are the labels those of its classes?")


def test_outputs_that_are_no_numbers_are_not_recommended():
    nan = float("nan")
    assert best_row(without_labels(row(agreement=nan, cosine=nan))) is None


def test_a_setting_that_is_no_single_rate_has_a_verdict_too():
    setting = dataclasses.replace(row(method="tome"), keep_rate=None)
    assert verdict(result_of(setting)).startswith("Method tome at this setting keeps 99.8 % of the accuracy")
    setting = dataclasses.replace(row(difference=-0.02), keep_rate=None)
    assert verdict(result_of(setting)).endswith("at this setting the model is already 2.0 points less accurate.")


# Table, JSON and CSV


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_of_cost_and_loss_are_aligned_markdown_with_a_line_for_each_row():
    cost, lost = (part.splitlines() for part in format_table(result_of(row(0.9), row(0.7, "tome"))).split("\n\n"))
    for lines in (cost, lost):
        assert len(lines) == 5
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) < 130
        assert all(line.startswith("|") and line.endswith("|") for line in lines)
        assert cells(lines[4])[:2] == ["tome", "0.7"]
    assert cells(cost[4])[2:] == ["2.800", "30.0%", "150", "1.50x", "105%", "13.3", "1.50x", "210"]
    assert cells(lost[4])[2:] == ["79.80%", "-0.20 [-0.50, +0.10]", "94.90%", "99.60%", "1.2e-03", "0.9987"]


def test_the_tables_leave_out_what_no_row_has_and_mark_what_one_lacks():
    cost, lost = (part.splitlines() for part in format_table(without_labels(row())).split("\n\n"))
    assert "agreement" in lost[0]
    assert "top-1" not in lost[0]
    assert "difference" not in lost[0]
    assert cells(cost[2])[1] == "-"
    cost, _ = (
        part.splitlines() for part in format_table(result_of(row(0.9), *without([row(0.7)], SPEED))).split("\n\n")
    )
    assert "speed-up" in cost[0]
    assert cells(cost[4]).count("-") == len(SPEED)
    assert len(format_table(result_of(*without([row()], SPEED))).split("\n\n")) == 2


def test_json_gives_the_same_result_back():
    result = result_of(row(), *without([row(0.5)], SPEED), refused={"evit": "why"}, unreadable=("a\udcffb.jpg", "ü"))
    assert from_json(to_json(result)) == result


def test_json_keeps_the_errors_of_tokens_and_takes_results_written_before_there_were_any():
    result = without_classes(row(patch_error=0.081, class_error=0.03, head_change=0.0098))
    assert from_json(to_json(result)) == result
    values = json.loads(to_json(result_of(row())))
    for old in values["rows"]:
        for name in ("patch_error", "class_error", "head_change", "setting", "config", "speed_up_interval"):
            del old[name]
    for name in ("trained", "num_classes", "warnings", "rounds", "date", "checkpoint", "compiled"):
        del values[name]
    assert from_json(json.dumps(values)) == result_of(row())


def test_the_table_and_csv_show_the_errors_of_tokens():
    result = without_classes(row(patch_error=0.081, class_error=0.03, head_change=0.00983))
    lost = format_table(result).split("\n\n")[1].splitlines()
    assert cells(lost[0]) == ["method", "keep rate", "cosine", "patch error", "class error", "head change"]
    assert cells(lost[3]) == ["merge", "0.7", "0.9987", "8.10%", "3.00%", "0.00983"]
    written = list(csv.DictReader(io.StringIO(to_csv(result))))[1]
    assert [written[name] for name in ("patch_error", "class_error", "head_change")] == ["0.081", "0.03", "0.00983"]


def test_the_report_shows_the_errors_of_tokens(tmp_path):
    write_html(without_classes(row(0.8, patch_error=0.081, head_change=0.00983)), [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<strong>8.1%</strong> <span>error of the patch tokens</span>" in text
    assert "<strong>0.00983</strong> <span>change of the head&#39;s output</span>" in text
    assert "error of the patch tokens, %" in text
    assert "keep rate 0.8: 1.50x, -8.10 % of the patch tokens&#x27; length" in text


def test_json_is_strict_where_numbers_are_not_finite():
    text = to_json(result_of(row(kl=float("inf"), cosine=float("nan"))))
    json.loads(text, parse_constant=pytest.fail)
    assert from_json(text).rows[1].kl is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"method": "merge"}]}', '{"rows": 3}', '{"rows": []}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(DataError, match="not the JSON of a trial's result"):
        from_json(text)


def test_csv_has_a_column_for_each_number_and_is_empty_where_there_is_none():
    table = list(csv.DictReader(io.StringIO(to_csv(result_of(*without([row()], SPEED))))))
    assert [line["method"] for line in table] == ["unpatched", "merge"]
    merge = table[1]
    assert (merge["speed_up"], merge["keep_rate"], float(merge["top1"])) == ("", "0.7", 0.798)
    assert (float(merge["top1_low"]), float(merge["top1_high"])) == pytest.approx((-0.005, 0.001))
    names = {f.name for f in dataclasses.fields(TrialRow)}
    intervals = {name for name in names if name.endswith("_interval")}
    ends = {name.replace("interval", end) for name in intervals for end in ("low", "high")}
    assert {"top1_low", "speed_up_high"} <= ends
    assert set(merge) == names - intervals | ends
    assert table[1] == list(csv.DictReader(io.StringIO(to_csv(without_labels(*without([row()], SPEED))))))[1] | {
        name: merge[name] for name in ("top1", "top5", "top1_difference", "top1_low", "top1_high")
    }


# The chart and the page


def full_result(**changes):
    """Every method at three keep rates, one of them far worse than the others."""
    losses = {"merge": 1, "tome": 2, "late_tome": 3, "evit": 8, "ppt": 6, "prune": 9, "random": 30}
    rows = [
        row(rate, method, difference=-scale * (1 - rate) ** 2 / 100, speed_up=1 + (1 - rate) * (1 + scale / 100))
        for method, scale in losses.items()
        for rate in (0.9, 0.7, 0.5)
    ]
    return result_of(*rows, **changes)


def photograph(seed):
    """Noise over a gradient: no easier to compress than a photograph."""
    y, x = np.mgrid[:224, :224]
    gradient = np.stack([x, y, 255 - (x + y) / 2], 2)
    return Image.fromarray(
        (gradient + np.random.default_rng(seed).normal(0, 12, (224, 224, 3))).clip(0, 255).astype("u1")
    )


def picture(image, caption="a photograph"):
    token_map = np.arange(196).reshape(14, 14) // 3 * 3
    drawing = draw_stage(image, token_map, np.arange(196).reshape(14, 14) % 3 == 0)
    return Picture(image, caption, tuple(StagePicture(block, 66, 196, drawing) for block in (3, 6, 9)))


@pytest.fixture(scope="module")
def pictures():
    return [picture(photograph(seed), f"photograph {seed}") for seed in range(12)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, pictures):
    """The path of a report with everything in it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    refused = {"evit": "CrossViT has no single class token <b>."}
    result = full_result(refused=refused, unreadable=("<script>alert(1)</script>.jpg", "b\udcff.jpg"))
    write_html(result, [*pictures[:2], picture(Image.new("L", (28, 28), 90), '"><script>alert(2)</script>.png')], path)
    return path


def test_the_chart_knows_every_method():
    assert set(SERIES) == set(METHODS)
    for part in zip(*SERIES.values(), strict=True):
        assert len({str(item) for item in part}) == len(METHODS)  # each of colour, marker and line tells them apart


def test_the_report_needs_nothing_but_itself(page):
    text = page.read_text()
    assert re.findall(r"https?://[^\s\"']*", text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")) == []
    links = re.findall(r'\b(?:src|href|srcset|action)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "@import" not in text


def test_names_are_escaped_in_the_report(page):
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "no single class token &lt;b&gt;" in text


def test_no_id_is_used_twice_in_the_report(page):
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))
    assert {f"series-{method}" for method in METHODS} | {"unpatched", "recommended", "narrow-series-merge"} <= set(ids)


def test_equal_results_give_equal_files(tmp_path, pictures):
    for name in ("a", "b"):
        write_html(full_result(), pictures[:1], tmp_path / f"{name}.html")
        write_png(full_result(), tmp_path / f"{name}.png")
    for kind in ("html", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_report_with_a_dozen_photographs_stays_below_2_mb(tmp_path, pictures):
    write_html(full_result(), pictures, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_pictures_are_embedded_as_whatever_is_smaller():
    assert image_uri(Image.new("RGB", (224, 224))).startswith("data:image/png;base64,")
    assert image_uri(photograph(0)).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "result",
    [
        result_of(),
        result_of(row(top1_interval=None)),
        result_of(*without([row(0.9), row(0.7)], SPEED)),
        without_labels(row(0.9), row(0.7, agreement=0.5)),
        without_labels(row(0.9), fields=CLASSES),
        without_labels(row(), fields=(*CLASSES, "cosine"), images=0),
        without_classes(row(0.9, patch_error=0.06, head_change=0.01), row(0.5, patch_error=0.4, head_change=0.1)),
        without_labels(row(agreement=float("nan"))),
        result_of(dataclasses.replace(row(method="tome"), keep_rate=None), model="a $name$ with $ signs"),
        result_of(refused={"merge": "a reason"}, unreadable=tuple(f"{i}.jpg" for i in range(150))),
    ],
)
def test_any_result_has_a_report_and_a_chart(tmp_path, result):
    write_html(result, [], tmp_path / "report.html")
    write_png(result, tmp_path / "chart.png")
    text = (tmp_path / "report.html").read_text()
    assert 'id="unpatched"' in text
    assert ("and 50 more" in text) == (len(result.unreadable) == 150)
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.size == (1520, 1040)


def test_the_title_of_the_chart_fits_onto_it(tmp_path):
    errors = {"patch_error": 0.081, "head_change": 0.0112}
    wide = result_of(row(), data="MMMMMMM WWWW " * 8, warnings=("MMMMMMM WWWW " * 8,))
    for result in (without_classes(row(0.8, **errors)), result_of(row(0.9, difference=-0.021)), full_result(), wide):
        write_png(result, tmp_path / "chart.png")
        with Image.open(tmp_path / "chart.png") as chart:
            assert np.asarray(chart.convert("L"))[:, -12:].min() == 255


def test_charts_leave_the_settings_of_other_plots_alone(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.titlepad": 40, "lines.markeredgewidth": 5}):
        before = dict(matplotlib.rcParams)
        write_png(full_result(), tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before
    write_png(full_result(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for write in (
        require_charts,
        lambda: write_html(full_result(), [], tmp_path / "report.html"),
        lambda: write_png(full_result(), tmp_path / "chart.png"),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install matplotlib\..*clone.*\[charts\]") as error:
            write()
        assert isinstance(error.value, TokenMergeError)
    assert list(tmp_path.iterdir()) == []


# In a browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "Chromium is not installed, so the page was not tried in a browser (Debian: apt install chromium)."
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page):
    """Opens the report with options of the browser, and holds it to having no errors and asking for no other file."""
    complaints, requests, contexts, opened_pages = [], [], [], set()

    def opened(path=page, **options):
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        opened_pages.add(path.as_uri())
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == opened_pages


def test_the_browser_shows_the_verdict_as_the_headline(open_page):
    tab = open_page()
    headline = tab.get_by_role("heading", level=1)
    assert headline.inner_text() == verdict(full_result())
    assert headline.is_visible()
    assert not tab.locator(".caveat").count()
    assert tab.title() == "Token merging: vit_small_patch16_224"


def test_the_headline_is_one_sentence_with_the_caveats_under_it(tmp_path):
    result = result_of(row(), images=50, total_images=90, warnings=("Labels may be wrong.",))
    write_html(result, [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert '<h1 id="verdict">Keep rate 0.7 keeps 99.8 % of the accuracy at 1.50x the speed.</h1>' in text
    shown = re.findall(r'<p class="caveat">(.*)</p>', text)
    assert shown == caveats(result)
    assert shown[1:] == ["Labels may be wrong.", "50 images are too few to be sure."]


def test_the_report_says_what_to_do_next_and_how_it_was_measured(tmp_path):
    measured = {"date": "2026-01-31", "rounds": 20, "checkpoint": "mine.pth", "compiled": True}
    write_html(result_of(row(config='{"keep_rate": 0.5}', keep_rate=0.5), **measured), [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "token_merge_plugin.apply(model, 0.5)" in text
    assert "token-merge run --keep-rate 0.5 your_script.py" in text
    for fact in ("2026-01-31", "at most 20 rounds", "mine.pth", "of compiled models", "up to 0.5 points of top-1"):
        assert fact in text
    assert "<strong>1.50x</strong> <span>at batch size 1</span>" in text
    config = MergeConfig({2: 0.7, 5: 0.5})
    setting = dataclasses.replace(row(), keep_rate=None, setting="0.7, 0.5", config=config.to_json())
    write_html(result_of(setting), [], tmp_path / "report.html")
    code = html.unescape((tmp_path / "report.html").read_text()).split("<pre><code>")
    applied, environment = (part.split("</code>")[0] for part in code[1:3])
    argument = applied.splitlines()[-1].removeprefix("token_merge_plugin.apply(model, ").removesuffix(")")
    given = eval(argument, {"token_merge_plugin": token_merge_plugin})
    assert given.to_json() == config.to_json()
    assert environment.startswith("TOKEN_MERGE_OPTIONS='{")
    write_html(result_of(row(difference=-0.1)), [], tmp_path / "report.html")
    assert "What to do next" not in (tmp_path / "report.html").read_text()


def test_labels_of_the_chart_cover_no_point_and_no_other_label():
    close = [row(0.9 - number / 50, speed_up=1.3 + number / 200, difference=-0.001) for number in range(8)]
    for result in (full_result(), result_of(*close)):
        with _own_style():
            figure = _chart(result, (760, 430))
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw_without_rendering()
            (axes,) = figure.axes
            boxes = [text.get_window_extent(renderer) for text in axes.texts]
            places = axes.transData.transform(
                [(p.speed_up, p.difference) for series in _points(result).values() for p in series]
            )
        assert boxes
        for index, box in enumerate(boxes):
            assert not box.count_overlaps(boxes[:index] + boxes[index + 1 :])
            assert not any(box.contains(*place) for place in places)


def test_the_browser_shows_a_series_for_each_method(open_page):
    tab = open_page()
    for method in METHODS:
        assert tab.locator(f"#series-{method}").bounding_box()["width"] > 100
        assert tab.locator(f"#series-{method} use").count() == 3  # a marker for each keep rate
        assert tab.locator("#chart-heading ~ .chart .wide text", has_text=re.compile(f"^{method}$")).is_visible()
    assert tab.locator("#unpatched").is_visible()
    assert tab.locator("#series-tome use title").all_text_contents()[1].startswith("tome, keep rate 0.7: 1.31x, -0.18 ")
    chart = tab.get_by_role("img", name=verdict(full_result()))
    assert chart.count() == 1  # the narrow one is hidden
    assert "Method tome: keep rate" in chart.locator("desc").text_content()


def test_the_browser_folds_away_all_but_four_pictures(open_page, tmp_path, pictures):
    path = tmp_path / "report.html"
    write_html(full_result(), pictures[:6], path)
    tab = open_page(path)
    shown = tab.locator("article.picture")
    assert [shown.nth(number).is_visible() for number in range(6)] == [True] * 4 + [False] * 2
    tab.get_by_text("2 more").click()
    assert shown.nth(5).is_visible()


def test_the_browser_shows_every_picture(open_page):
    tab = open_page()
    pictures = tab.locator("article.picture")
    assert pictures.count() == 3
    images = tab.locator("article.picture img")
    assert images.count() == 3 * 4
    assert all(images.evaluate_all("all => all.map(image => image.complete && image.naturalWidth >= 224)"))
    assert all(images.evaluate_all("all => all.map(image => image.alt.length > 0)"))
    assert pictures.first.get_by_text("block 3: 66 of 196 tokens").is_visible()


def test_the_browser_shows_the_numbers_with_the_recommended_row_and_the_best_marked(open_page):
    tab = open_page()
    tables = tab.get_by_role("table")
    assert tables.count() == 2
    assert [tables.nth(number).get_by_role("row").count() for number in range(2)] == [1 + 1 + 21] * 2
    best = best_row(full_result())
    recommended = tab.get_by_role("row").filter(has_text="recommended")
    assert recommended.count() == 2
    assert recommended.first.locator("td").first.inner_text() == f"{best.keep_rate:g}"
    titles = [text.split("\n")[0] for text in tab.locator("thead th").all_inner_texts()]
    assert titles[:5] == ["method", "keep rate", "speed-up [95 %]", "at batch 1", "difference [95 %]"]
    columns = tables.first.locator("tbody tr > :nth-child(3)")
    marked = columns.evaluate_all("all => all.map(cell => cell.className == 'best')")
    assert marked == [False] + [*[False] * 6, True] * 3  # "random" is the fastest at each keep rate
    second = titles.index("method", 1)
    assert tab.locator(".glossary dt").all_inner_texts() == titles[:second] + titles[second + 2 :]


def test_the_browser_shows_what_was_refused_unreadable_and_how_to_run_it_again(open_page):
    tab = open_page()
    assert tab.get_by_text("CrossViT has no single class token <b>.").is_visible()
    assert tab.get_by_text("<script>alert(1)</script>.jpg").is_visible()
    assert tab.get_by_text(full_result().command).is_visible()
    assert tab.get_by_text("torch 2.15.0, timm 1.0.31").is_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen_nor_cut_off(open_page, width):
    tab = open_page(viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    cells = tab.locator("tbody td, tbody th")
    assert all(cells.evaluate_all("all => all.map(cell => cell.scrollWidth <= cell.clientWidth + 1)"))
    right = cells.evaluate_all("all => Math.max(...all.map(cell => cell.getBoundingClientRect().right))")
    assert right <= width
    title = tab.locator("td").nth(1).evaluate("cell => getComputedStyle(cell, '::before').content")
    assert (title == '"speed-up [95 %]"') == (width < 1000)  # a card for each row, where columns have no room


def test_a_phone_gets_a_chart_of_its_own_with_letters_that_can_be_read(open_page):
    tab = open_page(viewport={"width": 375, "height": 800})
    assert tab.locator("#narrow-series-merge").is_visible()
    assert not tab.locator("#series-merge").is_visible()
    heights = tab.locator(".narrow text").evaluate_all("all => all.map(text => text.getBoundingClientRect().height)")
    assert min(heights) > 10
    right = tab.locator(".narrow text").evaluate_all("all => all.map(text => text.getBoundingClientRect().right)")
    assert max(right) <= 375


# WCAG's contrast of every text with what is behind it; and of the lines of the chart.
CONTRASTS = """() => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const linear = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.slice(0, 3).map(value => linear(value / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length == 3 || colour[3] > 0) return colour;
    }
  };
  const contrast = (element, colour) => {
    const [dark, light] = [luminance(rgb(colour)), luminance(behind(element))].sort((a, b) => a - b);
    return (light + .05) / (dark + .05);
  };
  const texts = [...document.querySelectorAll('body *')].filter(
    e => e.tagName != 'STYLE' && e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  const lines = [...document.querySelectorAll('.wide [id^=series] > path')];
  return {
    texts: texts.filter(e => !e.closest('svg title, svg desc')).map(
      e => [contrast(e, getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']), e.textContent]),
    lines: lines.map(e => [contrast(e, getComputedStyle(e).stroke), e.parentElement.id]),
    paper: luminance(behind(document.body)),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_have_contrast_in_light_and_dark(open_page, scheme):
    found = open_page(color_scheme=scheme).evaluate(CONTRASTS)
    assert (found["paper"] > 0.5) == (scheme == "light")
    assert len(found["texts"]) > 100
    assert len(found["lines"]) == len(METHODS)
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert [line for line in found["lines"] if line[0] < 3] == []


def test_on_paper_the_report_is_dark_on_white_and_nothing_is_cut_off(open_page):
    tab = open_page(color_scheme="dark", viewport={"width": 1030, "height": 700})  # A4 landscape
    tab.emulate_media(media="print", color_scheme="dark")
    found = tab.evaluate(CONTRASTS)
    assert found["paper"] == pytest.approx(1)
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert tab.evaluate("document.documentElement.scrollWidth") == 1030
