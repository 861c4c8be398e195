"""The speeds of examples/benchmark.py and the curves of examples/tradeoff.py: what their tables hold."""

import json
import sys

import ablation
import benchmark
import pytest
import torch
import tradeoff
from families import images, make
from torch import nn

from token_merge_plugin import MergeConfig, apply, summary
from token_merge_plugin.trial.counting import count_macs


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def rows_of(text):
    """Return the cells of the first table."""
    lines = text[text.index("\n| ") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


@pytest.mark.parametrize("training", [False, True])
def test_the_table_of_a_model(training, monkeypatch, capsys):
    options = ["--model", "test_vit", "--keep-rates", 0.5, "--rounds", 3, "--batch-size", 2]
    run(benchmark, monkeypatch, *options, *(["--training"] if training else ["--profile"]))
    printed = capsys.readouterr().out
    titles, unpatched, patched = rows_of(printed)
    assert unpatched[:3] == ["unpatched", "", "1.0"]
    assert unpatched[4:8] == ["1.000", "1.000", "1.00x", "1.00"]
    assert patched[:3] == ["merge", "default", "0.5"]
    model, image = benchmark.timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
    full = count_macs(model, image)
    assert float(patched[4]) == pytest.approx(count_macs(apply(model, 0.5), image) / full, abs=1e-3)
    if training:
        assert int(patched[8].split()[0]) < int(unpatched[8].split()[0])
        assert titles[8] == "peak memory"
    else:
        assert "| choosing | merging |" in printed


def test_stages_leave_multiples_of_so_many_tokens(monkeypatch, capsys):
    model, image = benchmark.timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
    config = benchmark.in_multiples(model, MergeConfig(0.6), 8, image)
    tokens = summary(apply(model, config)).tokens
    assert [*tokens] == [*summary(apply(model, 0.6)).tokens] == [*config.keep_rate]
    assert all((tokens[block] + 1) % 8 == 0 for block in tokens)
    run(benchmark, monkeypatch, "--model", "test_vit", "--keep-rates", 0.6, "--rounds", 3, "--multiples", 8)
    printed = capsys.readouterr().out
    assert [row[:3] for row in rows_of(printed)][2:] == [
        ["merge", "default", "0.6"],
        ["merge", "multiples of 8", "0.6"],
    ]


def test_a_step_of_training_gives_every_parameter_a_gradient_of_its_own():
    model = make().train()
    for _ in range(2):
        benchmark.training_step(model)(images())
    once = [parameter.grad.clone() for parameter in model.parameters()]
    benchmark.training_step(model)(images())
    for parameter, expected in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_the_chart_of_several_sizes(tmp_path, monkeypatch, capsys):
    chart = tmp_path / "growth.svg"
    options = ["--model", "test_vit", "--img-size", 96, 128, "--keep-rates", 0.5, "--rounds", 3, "--batch-size", 1]
    run(benchmark, monkeypatch, *options, "--chart", chart)
    assert capsys.readouterr().out.count("| unpatched |") == 2
    assert "<svg" in chart.read_text()


class Head(nn.Module):
    def forward(self, tokens):
        return tokens.mean(2)[:, None, None]


def test_error_against_time(tmp_path, monkeypatch):
    model = make("ViT", num_classes=0, depth=12)
    crops = images(batch=4)
    small = ablation.DenseAblation(model, Head(), crops, torch.arange(4), lambda: crops, 4)
    monkeypatch.setattr(tradeoff, "on_photographs", lambda args: (small, "4 images"))
    options = ["--photographs", tmp_path, "--weights", tmp_path, "--shares", 0.8, 0.6, "--batch-sizes", 1, 2]
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "chart.svg")}
    run(
        tradeoff, monkeypatch, *options, "--rounds", 3,
        *("--json", files["json"], "--markdown", files["markdown"], "--chart", files["chart.svg"]),
    )  # fmt: skip
    rows = json.loads(files["json"].read_text())
    assert [(row["contender"], row["share"]) for row in rows] == [
        (name, share) for name in tradeoff.CONTENDERS for share in (0.8, 0.6)
    ]
    for row in rows:
        assert row["patches"] > 0
        assert set(row["speed_up"]) == {"1", "2"}
    assert len(rows_of(files["markdown"].read_text())) == 1 + len(rows)
    assert "<svg" in files["chart.svg"].read_text()
