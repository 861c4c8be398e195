"""The command `token-merge`, as a user runs it."""

import csv
import json
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from checks import TORCHRUN, draw_two_classes, run_program
from PIL import Image
from timm.models import load_checkpoint

import token_merge_plugin
from token_merge_plugin.cli import main
from token_merge_plugin.trial.data import open_data
from token_merge_plugin.trial.models import data_config, load_model
from token_merge_plugin.trial.results import from_json


@pytest.fixture
def photos(tmp_path):
    """A folder of images in one folder a class, one of which is damaged, and weights for them."""
    draw_two_classes(tmp_path / "photos", 12, (40, 50))
    (tmp_path / "photos" / "class0" / "damaged.png").write_bytes(b"no image")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return [
        "--model",
        "test_vit",
        "--num-classes",
        "2",
        "--checkpoint",
        str(tmp_path / "weights.pth"),
        "--workers",
        "0",
    ]


def fast(monkeypatch):
    """Time a single round of three passes."""
    timed = token_merge_plugin.trial.speed.time_in_turns
    monkeypatch.setattr(
        "token_merge_plugin.trial.speed.time_in_turns",
        lambda model, configs, images, **_: timed(model, configs, images, rounds=1, seconds=0),
    )


def test_a_trial_of_the_built_in_model_writes_everything_that_is_asked_for(tmp_path, monkeypatch, capsys):
    fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    files = [word for kind in ("html", "json", "csv", "png") for word in (f"--{kind}", f"result.{kind}")]
    arguments = ["trial", "--keep-rates", "0.7", "0.5", "--methods", "merge", "evit", "--num-images", "60", *files]
    assert main([*arguments, "--workers", "0"]) == 0
    output, errors = capsys.readouterr()
    for column in ("keep rate", "GMACs", "reduction", "top-1", "agreement", "images/s", "speed-up"):
        assert column in output
    assert "60 of 1,000 labelled images" in output
    assert "Keep rate" in output or "does not help" in output or "Method evit" in output
    assert errors == ""  # bars are for terminals
    result = from_json((tmp_path / "result.json").read_text())
    assert [(row.method, row.keep_rate) for row in result.rows[1:]] == [
        ("merge", 0.7),
        ("merge", 0.5),
        ("evit", 0.7),
        ("evit", 0.5),
    ]
    assert result.command.startswith("token-merge trial --keep-rates 0.7 0.5")
    assert (tmp_path / "result.csv").read_text().count("\n") == 6
    assert main(["report", "result.json", "--png", "again.png"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "result.png").read_bytes()
    assert main(["report", "result.csv"]) == 2
    assert "not the JSON of a trial's result" in capsys.readouterr().err
    page = (tmp_path / "result.html").read_text()
    assert page.count("data:image/") >= 12
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_trial_on_a_folder_counts_what_cannot_be_read(photos, tmp_path, monkeypatch, capsys):
    fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["trial", "-q", *photos, "--data", "photos", "--keep-rates", "0.5", "--json", "result.json"]) == 0
    output, errors = capsys.readouterr()
    result = from_json((tmp_path / "result.json").read_text())
    assert (result.images, result.total_images, result.labelled) == (12, 12, True)
    assert result.unreadable == ("class0/damaged.png: cannot identify image file",)
    assert "1 image could not be read" in output
    assert "it/s" not in errors
    model = load_model("test_vit", checkpoint=tmp_path / "weights.pth", num_classes=2)
    right = 0
    with torch.inference_mode():
        for batch in open_data(tmp_path / "photos", data_config(model), workers=0):
            right += (model(batch.images).argmax(1) == batch.labels).sum().item()
    assert result.rows[0].top1 == right / 12


def test_a_trial_without_labels_goes_by_agreement(photos, tmp_path, monkeypatch, capsys):
    fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arguments = ["trial", "-q", *photos, "--data", "photos/class1", "--keep-rates", "0.5"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "6 unlabelled images" in output
    assert "agreement" in output
    assert "top-1" not in output


def test_ctrl_c_ends_a_trial_with_130_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    compare, calls = token_merge_plugin.trial.accuracy.compare, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr("token_merge_plugin.trial.accuracy.compare", interrupted)
    arguments = ["trial", "-q", "--keep-rates", "0.7", "--num-images", "100", "--batch-size", "20", "--json", "r.json"]
    assert main([*arguments, "--workers", "0"]) == 130
    output, errors = capsys.readouterr()
    assert "interrupted after 40 of 100 images" in output
    assert "The same command goes on from here" in errors
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    assert main([*arguments, "--workers", "0"]) == 0
    assert len(calls) == 3 + 3
    assert "going on from" in capsys.readouterr().err
    assert from_json((tmp_path / "r.json").read_text()).images == 100
    assert not list(tmp_path.glob("*.jsonl"))


def test_another_process_with_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("token_merge_plugin.trial.accuracy.compare", interrupted)
    arguments = ["trial", "-q", "--keep-rates", "0.7", "--num-images", "40", "--batch-size", "20", "--workers", "0"]
    assert main(arguments) == 130
    (log,) = tmp_path.glob("*.jsonl")
    # As many threads as here: a trial on another device is another trial.
    ended = run_program(sys.executable, "-m", "token_merge_plugin", *arguments, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    assert f"going on from the results in {log.name}" in ended.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_interrupted_evaluation_goes_on_in_another_process(tmp_path, monkeypatch, capsys):
    compare, calls = token_merge_plugin.trial.accuracy.compare, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("token_merge_plugin.trial.accuracy.compare", interrupted)
    arguments = ["evaluate", "-q", "--num-images", "40", "--batch-size", "20", "--workers", "0"]
    assert main([*arguments, "--json", "first.json"]) == 130
    (log,) = tmp_path.glob("*.jsonl")
    output, errors = capsys.readouterr()
    assert "interrupted after 20 of 40 images" in output
    assert f"The same command goes on from here ({log.name})" in errors
    ended = run_program(sys.executable, "-m", "token_merge_plugin", *arguments, "--json", "r.json", OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    assert f"going on from the results in {log.name}" in ended.stderr
    assert from_json((tmp_path / "r.json").read_text()).images == 40
    assert not log.exists()


def test_an_interrupted_calibration_says_that_the_same_command_goes_on(photos, tmp_path, monkeypatch, capsys):
    logs = []

    def interrupted(*args, log, **kwargs):
        logs.append(log)
        log.write_text("what was measured")
        if len(logs) == 1:
            raise KeyboardInterrupt
        return token_merge_plugin.MergeConfig({1: 0.7})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("token_merge_plugin.cli.calibrate.calibrate", interrupted)
    arguments = ["calibrate", *photos, "--data", "photos"]
    assert main(arguments) == 130
    assert f"The same command goes on from here ({logs[0].name})" in capsys.readouterr().err
    assert main([*arguments, "-q"]) == 0
    assert f"going on from the results in {logs[0].name}" in capsys.readouterr().err
    assert logs[0] == logs[1]
    assert not logs[0].exists()


@pytest.fixture
def fused(photos, tmp_path):
    """Options of a model with a learned fusion in its checkpoint; `photos` are without it."""
    model = token_merge_plugin.apply(timm.create_model("test_vit", num_classes=2), 0.5, multi_scale="learned")
    load_checkpoint(model, tmp_path / "weights.pth", strict=False)
    for name, value in model.state_dict().items():
        if name.endswith("token_merge_fusion.gates"):
            value.fill_(1.0)
    torch.save(model.state_dict(), tmp_path / "fused.pth")
    return ["--model", "test_vit", "--num-classes", "2", "--checkpoint", str(tmp_path / "fused.pth")]


def test_a_learned_fusion_is_measured_and_never_lost_in_silence(fused, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fast(monkeypatch)
    (tmp_path / "learned.json").write_text('{"keep_rate": 0.5, "multi_scale": "learned"}')
    options = ["-q", "--data", "photos", "--workers", "0", "--json", "r.json"]
    kl = []
    for command in (
        ["evaluate", *fused, "--keep-rate", "0.5"],
        ["evaluate", *fused, "--config", "learned.json"],
        ["trial", *fused, "--keep-rate", "0.5"],
        ["evaluate", *photos, "--keep-rate", "0.5"],
    ):
        assert main([*command, *options]) == 0
        kl.append(from_json((tmp_path / "r.json").read_text()).rows[1].kl)
    assert kl[0] == kl[1] == kl[2] != kl[3]
    capsys.readouterr()
    for command, reason in (
        (["evaluate", *photos, "--config", "learned.json"], "no trained fusion is there"),
        (["trial", *photos, "--config", "learned.json"], "no trained fusion is there"),
        (["evaluate", *fused, "--stages", "4,5"], "Choose the same first stage"),
        (["calibrate", *fused], "Calibrate before fine-tuning"),
    ):
        assert main([*command, "-q", "--data", "photos", "--workers", "0"]) == 2
        assert reason in capsys.readouterr().err


def test_the_config_of_a_file_is_compared_at_equal_multiply_adds(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fast(monkeypatch)
    config = token_merge_plugin.MergeConfig({1: 0.6, 3: 0.8}).to_json()
    (tmp_path / "c.json").write_text(config)
    options = ["-q", *photos, "--data", "photos", "--json", "r.json"]
    assert main(["trial", *options, "--config", "c.json", "--methods", "tome"]) == 0
    _, merge, tome = from_json((tmp_path / "r.json").read_text()).rows
    assert (merge.method, merge.setting, tome.method) == ("merge", "0.6, 0.8", "tome")
    assert tome.gmacs == pytest.approx(merge.gmacs, rel=0.02)
    assert merge.config == config
    assert main(["bench", *photos[:6], "-q", "--config", "c.json", "--batch-sizes", "1", "--rounds", "1"]) == 0
    assert "0.6, 0.8" in capsys.readouterr().out


def test_trial_and_evaluate_take_keep_rates_in_one_way(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast(monkeypatch)
    options = ["-q", *photos, "--data", "photos", "--json", "r.json"]
    assert main(["trial", *options, "--keep-rate", "0.5", "0.9,0.7,0.5"]) == 0
    _, first, second = from_json((tmp_path / "r.json").read_text()).rows
    assert (first.keep_rate, first.setting, second.keep_rate, second.setting) == (0.5, None, None, "0.9, 0.7, 0.5")
    assert main(["evaluate", *options, "--keep-rate", "0.9,0.7,0.5"]) == 0
    row = from_json((tmp_path / "r.json").read_text()).rows[1]
    assert (row.keep_rate, row.setting, row.kl) == (None, "0.9, 0.7, 0.5", second.kl)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["trial", "--keep-rate", "0.5"], "--keep-rate"),
        (["bench", "--keep-rates", "0.5"], "--keep-rate"),
        (["trial", "--stages", "2,5"], "--stages"),
        (["evaluate", "--keep-rate", "0.5"], "--keep-rate"),
        (["evaluate", "--keep-rate", "0.7"], "--keep-rate"),
        (["evaluate", "--method", "tome"], "--method"),
        (["run", "--keep-rate", "0.5"], "--keep-rate"),
    ],
)
def test_options_beside_a_config_are_refused(arguments, option, tmp_path, capsys):
    config = tmp_path / "c.json"
    config.write_text('{"keep_rate": 0.6}')
    script = ["script.py"] if arguments[0] == "run" else []
    assert main([*arguments, "--config", str(config), *script]) == 2
    assert f"c.json says all of it: leave {option} out" in capsys.readouterr().err


def test_evaluate_under_torchrun_gives_what_one_process_gives(tmp_path):
    arguments = ["evaluate", "--keep-rate", "0.6", "--num-images", "101", "-q", "--workers", "0", "--json"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    ended = run_program(*TORCHRUN, "-m", "token_merge_plugin", *arguments, tmp_path / "two.json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("| keep rate") == 2  # two tables, of one process alone
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["images"], two["images"]) == (101, 101)
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-7)
        assert [row[k] for k in ("top1", "top5", "agreement")] == [other[k] for k in ("top1", "top5", "agreement")]


def test_bench_times_every_batch_size(tmp_path, capsys):
    arguments = ["--model", "test_vit", "--no-pretrained", "--keep-rates", "0.5", "--batch-sizes", "1", "3"]
    files = ["--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]
    assert main(["bench", "-q", *arguments, "--rounds", "1", *files]) == 0
    output = capsys.readouterr().out
    one, three = (from_json(json.dumps(values)) for values in json.loads((tmp_path / "b.json").read_text()))
    assert (one.batch_size, three.batch_size, one.model, one.trained) == (1, 3, "test_vit", False)
    lines = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [line["batch_size"] for line in lines] == ["1", "1", "3", "3"]
    assert float(lines[3]["speed_up"]) == three.rows[1].speed_up
    assert "batch 1\n" in output
    assert "batch 3\n" in output
    assert "speed-up" in output
    assert "top-1" not in output


@pytest.mark.parametrize("command", ["trial", "bench"])
def test_compiled_models_are_timed_on_request(command, monkeypatch, tmp_path):
    seen = []

    def timed(model, configs, images, *, compiled, **_):
        seen.append(compiled)
        return [[1.0] * 3 for _ in configs]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("token_merge_plugin.trial.speed.time_in_turns", timed)
    images = ["--num-images", "2", "--workers", "0"] if command == "trial" else ["--batch-sizes", "1"]
    for option in ([], ["--compile"]):
        assert main([command, "-q", "--keep-rate", "0.5", *images, *option, "--json", "r.json"]) == 0
    assert seen == [False, False, True, True]
    assert '"compiled": true' in (tmp_path / "r.json").read_text()


def test_calibrate_writes_a_config_for_the_other_commands(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "-q", *photos, "--data", "photos", "--target", "0.8"]) == 0
    output = capsys.readouterr().out
    assert "block " in output
    assert "of the multiply-adds are left" in output
    assert "of the default schedule at the same share" in output
    words = shlex.split(output.splitlines()[-1])
    assert words[:4] == ["token-merge", "evaluate", "--config", "token-merge.json"]
    assert sorted(words[4:]) == sorted([*photos, "--data", "photos"])
    assert main([*words[1:], "-q", "--json", "r.json"]) == 0
    assert from_json((tmp_path / "r.json").read_text()).rows[1].reduction == pytest.approx(0.2, abs=0.02)
    assert main(["evaluate", "--config", "missing.json"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture
def quick_calibration(monkeypatch):
    """Let `calibrate` find the same schedule at once, whatever the images are."""
    found = token_merge_plugin.MergeConfig({1: 0.7, 4: 0.5})
    monkeypatch.setattr("token_merge_plugin.cli.calibrate.calibrate", lambda *args, **kwargs: found)
    return found


def test_calibrate_prints_the_schedule_before_it_writes_the_file(
    quick_calibration, photos, tmp_path, monkeypatch, capsys
):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    assert main(["calibrate", "-q", *photos, "--data", "photos", "--target", "0.8"]) == 1
    output, errors = capsys.readouterr()
    assert "No space left" in errors
    (text,) = (line for line in output.splitlines() if line.startswith("{"))
    assert text == quick_calibration.to_json()


@pytest.mark.parametrize("content", ['{"architecture": "test_vit", "num_classes": 2}', "no JSON", "{}"])
def test_calibrate_replaces_no_file_of_others_without_being_told_to(
    content, quick_calibration, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "config.json"
    output.write_text(content)
    arguments = ["calibrate", "-q", *photos, "--data", "photos", "--target", "0.8", "--output", "config.json"]
    assert main(arguments) == 2
    assert "add --force" in capsys.readouterr().err
    assert output.read_text() == content
    assert main([*arguments, "--force"]) == 0
    written = output.read_text()
    assert main(arguments) == 0  # its own it may replace
    assert output.read_text() == written


@pytest.mark.parametrize(
    "arguments",
    [
        ["trial", "--json"],
        ["trial", "--csv"],
        ["trial", "--html"],
        ["trial", "--png"],
        ["trial", "--log"],
        ["evaluate", "--json"],
        ["calibrate", "--output"],
        ["show", "image.png", "--output"],
        ["report", "results.json", "--html"],
        ["bench", "--csv"],
    ],
)
@pytest.mark.parametrize(("path", "reason"), [("missing/file", "no folder missing"), ("folder", "it is a folder")])
def test_outputs_are_checked_before_the_work_starts(arguments, path, reason, tmp_path, monkeypatch, capsys):
    def no_work(*args, **kwargs):
        raise AssertionError("The model is loaded already.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("token_merge_plugin.cli.options.load_model", no_work)
    (tmp_path / "folder").mkdir()
    assert main([*arguments, path]) == 2
    assert reason in capsys.readouterr().err


def test_show_draws_every_stage(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = "photos/class1/1.png"
    assert main(["show", image, "--output", "tokens.png", "--keep-rate", "0.5", *photos[:6], "--device", "cpu"]) == 0
    about, predicted, *lines = capsys.readouterr().out.splitlines()
    assert about == "test_vit, method merge, keep rate 0.5"
    assert re.fullmatch(r"Prediction: class [01] \(\d+%\) unpatched, class [01] \(\d+%\) patched\.", predicted)
    assert lines[0].endswith("of 100 tokens")
    assert all(line.startswith("block ") for line in lines[:-1])
    assert Image.open("tokens.png").width > 4 * 100
    assert main(["show", image, "--output", "missing/tokens.png", *photos[:6]]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["show", image, "--model", "swin_tiny_patch4_window7_224", "--no-pretrained"]) == 2
    assert "SwinTransformer merge tokens inside" in capsys.readouterr().err


def test_list_prints_names_for_scripts(capsys):
    assert main(["list", "--names"]) == 0
    names = capsys.readouterr().out.split()
    assert names == token_merge_plugin.supported_models()


def test_list_ends_quietly_when_nobody_reads_on():
    command = [sys.executable, "-m", "token_merge_plugin", "list", "--names"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_under_torchrun_a_trial_runs_once_in_the_first_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("token_merge_plugin.cli.options.load_model", lambda *args, **kwargs: pytest.fail("It runs."))
    assert main(["trial"]) == 0
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(pytest.fail.Exception, match="It runs"):
        main(["trial"])


def test_run_leaves_the_warnings_of_a_script_alone(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import warnings\nwarnings.warn('the script is old')\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, file, line, *_: print(f"{file}:{line}: {message}")
        assert main(["run", str(script)]) == 0
    output, errors = capsys.readouterr()
    assert output == f"{script}:2: the script is old\n"
    assert errors.startswith("token-merge: no model was patched")


def test_run_is_strict_on_request(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    assert main(["run", str(script)]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["run", "--strict", str(script)])
    assert stop.value.code == 1


def test_run_patches_the_models_of_a_script(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "model = timm.create_model('test_vit')\n"
        "print(model._get_name(), sys.argv[1:])\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["run", "--keep-rate", "0.7", str(script), "--model", "3"])
    assert stop.value.code == 3
    output, errors = capsys.readouterr()
    assert output == "TokenMergeVisionTransformer ['--model', '3']\n"
    assert "1 model patched" in errors
    assert main(["run", "-m", "there_is_no_such_module"]) == 2


def test_the_environment_does_not_patch_the_unpatched_model(tmp_path, capsys):
    token_merge_plugin.install(0.5)
    try:
        arguments = ["--model", "test_vit", "--no-pretrained", "--keep-rates", "0.5", "--batch-sizes", "1"]
        assert main(["bench", "-q", *arguments, "--rounds", "1"]) == 0
        unpatched, patched = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
        assert float(patched[3]) < float(unpatched[3])
    finally:
        token_merge_plugin.uninstall()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial", "--keep-rates", "1.5"], "outside (0, 1]"),
        (["trial", "--data", "missing"], "missing"),
        (["trial", "--model", "deit_smal_patch16_224"], "deit_small_patch16_224"),
        (["trial", "--model", "test_vit", "--no-pretrained"], "give --data"),
        (["trial", "--html", "missing/report.html"], "no folder missing"),
        (["trial", "--stages", "3,99"], "99 does not exist"),
        (["bench", "--model", "test_vit", "--no-pretrained", "--img-size", "7"], "does not take images [3, 7, 7]"),
        (["evaluate", "--method", "evit", "--r", "3"], "option of method 'tome'"),
        (["show", "missing.jpg"], "missing.jpg"),
        (["run", "missing.py"], "missing.py"),
    ],
)
def test_bad_input_is_explained_and_exits_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trial", "--batch-size", "0"],
        ["trial", "--workers", "-1"],
        ["trial", "--device", "nowhere"],
        ["trial", "--methods", "magic"],
        ["evaluate", "--keep-rate", "much"],
        ["evaluate", "--stages", "first"],
        ["trial", "-q", "-v"],
    ],
)
def test_options_that_cannot_be_read_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: token-merge" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--keep-rate", "much"), ("--stages", "first"), ("--workers", "-1")])
def test_an_option_that_cannot_be_read_is_named_and_what_it_takes(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", option, value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: {value!r} " in error
    assert "_" not in error


def test_verbose_shows_the_traceback_of_an_error(capsys):
    assert main(["trial", "-v", "--keep-rates", "1.5"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_elsewhere_ends_the_command_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("token_merge_plugin.cli.options.load_model", interrupted)
    assert main(["show", "image.png"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == token_merge_plugin.__version__


@pytest.mark.parametrize("command", ["trial", "evaluate", "report", "calibrate", "bench", "show", "list", "run"])
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"token-merge {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("calibrate --target 2", "argument --target: '2' is not a number between 0 and 1"),
        ("list --keep-rate much", "argument --keep-rate: 'much' is not a number between 0 and 1"),
    ],
)
def test_a_share_out_of_range_is_refused_by_the_name_of_its_option(words, message, capsys):
    """At once: before a model is loaded."""
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err
