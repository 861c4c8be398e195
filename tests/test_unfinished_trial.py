"""An unfinished trial on the command line, taken up again by another process."""

import subprocess
import sys

import token_merge_plugin
from token_merge_plugin.cli import main


def test_another_process_with_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["trial", "-q", "--keep-rates", "0.7", "--num-images", "40", "--batch-size", "20", "--workers", "0"]
    monkeypatch.chdir(tmp_path)
    timed = token_merge_plugin.trial.speed.time_in_turns

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "token_merge_plugin.trial.speed.time_in_turns",
            lambda model, configs, images, **_: timed(model, configs, images, rounds=1, seconds=0),
        )
        patch.setattr("token_merge_plugin.trial.accuracy.compare", interrupted)
        assert main(arguments) == 130
    (log,) = tmp_path.glob("*.jsonl")
    command = [sys.executable, "-m", "token_merge_plugin", *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert f"going on behind the results in {log.name}" in run.stderr
    assert not list(tmp_path.glob("*.jsonl"))
