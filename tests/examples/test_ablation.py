"""The ablation of examples/ablation.py: its variants against the package, and its tables."""

import json
import math
import sys

import ablation
import pytest
import torch
import torch.nn.functional as F
from checks import EXAMPLES, run_program
from families import images, make

from token_merge_plugin import MergeConfig, apply, remove
from token_merge_plugin.builtin import FOLDER, create_reference_model, load_images
from token_merge_plugin.method import reduction


def outputs(model, variant=None):
    x = load_images()[0][:8]
    with ablation.in_place(ablation.Row("", "", variant=variant)), torch.no_grad():
        return model(x)


def test_a_variant_with_nothing_exchanged_is_the_package():
    model = apply(create_reference_model(), 0.6)
    assert torch.equal(outputs(model, ablation.Variant()), outputs(model))


def test_a_variant_is_in_place_only_for_its_row():
    before = dict(reduction.METHODS)
    with ablation.in_place(ablation.Row("", "", variant=ablation.Variant(by_importance=True))):
        assert reduction.METHODS["merge"] == ablation.Variant(by_importance=True)
    assert before == reduction.METHODS


@pytest.mark.parametrize("row", [row for row in ablation.rows_for(create_reference_model()) if row.variant])
def test_every_variant_changes_the_output(row):
    model, x = apply(create_reference_model(), 0.5), load_images()[0][:4]
    with torch.no_grad():
        expected = model.forward_features(x)
        with ablation.in_place(row):
            assert not torch.allclose(model.forward_features(x), expected, atol=1e-6)
        assert torch.equal(model.forward_features(x), expected)


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"importance": "class_attention"}, ablation.Variant(importance=ablation.powers(0.25, 0, 0))),
        ({}, ablation.Variant(importance=ablation.powers(0.25, 0.5, 0.7))),
    ],
)
def test_what_both_can_do_is_the_same(options, variant):
    mine, default = create_reference_model(), create_reference_model()
    torch.testing.assert_close(
        outputs(apply(mine, 0.6, **options)), outputs(apply(default, 0.6), variant), rtol=1e-4, atol=1e-5
    )


def test_merging_the_cheapest_pair_again_and_again_is_that_of_a_loop():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 4), torch.rand(2, 9)
    plan = apply(create_reference_model(), {3: 0.5})._token_merge.plan
    stage = reduction.Stage(plan, None, 3, x, None, [])
    crucial, rest, target, _ = ablation.agglomerate(stage, weight)
    for b in range(2):
        groups = [{i} for i in range(9)]

        def mean(group, b=b):
            share = weight[b, list(group)]
            return (share[:, None] * x[b, list(group)]).sum(0) / share.sum(), share.sum()

        def loss(one, other):
            (first, n), (second, m) = mean(one), mean(other)
            return (n * m / (n + m) * (first - second).square().sum()).item()

        while len(groups) > 5:
            one, other = min(
                ((one, other) for one in groups for other in groups if one is not other), key=lambda pair: loss(*pair)
            )
            groups.remove(other)
            one |= other
        mine = [{c} | set(rest[b][target[b] == k].tolist()) for k, c in enumerate(crucial[b].tolist())]
        assert sorted(map(sorted, mine)) == sorted(map(sorted, groups))


def test_a_ratio_has_the_interval_of_the_paired_differences():
    default = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ratio, half = ablation.Ablation.against_default(default * 2, default)
    assert ratio == 2
    assert half == pytest.approx(1.959964 * default.std().item() / 2 / 2.5)
    assert ablation.Ablation.against_default(default, default) == (1, 0)


def test_no_photograph_decides_alone():
    default = torch.tensor([0.1, 0.1, 0.1, 10.0])
    ratio, half = ablation.DenseAblation.against_default(default * torch.tensor([2.0, 2.0, 2.0, 0.5]), default)
    assert ratio == pytest.approx(2**0.5)
    assert half == pytest.approx(ratio * 1.959964 * math.log(2) / 2)
    assert ablation.DenseAblation.against_default(default, default) == (1, 0)


def test_the_tables_hold_what_was_measured(tmp_path):
    script, out = [sys.executable, EXAMPLES / "ablation.py"], tmp_path / "vit.json"
    groups = ["of the keys", "late-heavy numbers, every block", "baselines"]
    options = ["--images", "20", "--shares", "0.7", "--groups", *groups]
    page = tmp_path / "results" / "vit.md"
    ended = run_program(*script, "--data", FOLDER, *options, "--json", out, "--markdown", page)
    assert ended.returncode == 0, ended.stderr
    record = json.loads(out.read_text())
    model, (x, labels) = create_reference_model(), (t[:20] for t in load_images())
    keys = next(row for row in record["rows"] if row["name"] == "of the keys")
    with torch.no_grad():
        unpatched = model(x).log_softmax(1)
        patched = apply(model, MergeConfig.from_json(keys["config"]))(x).log_softmax(1)
    assert keys["top1"] == pytest.approx((patched.argmax(1) == labels).float().mean().item())
    assert keys["kl"] == pytest.approx(
        F.kl_div(patched, unpatched, log_target=True, reduction="batchmean").item(), rel=0.01, abs=1e-7
    )
    assert all(row["gmacs"] / record["gmacs"] == pytest.approx(0.7, abs=0.01) for row in record["rows"])
    assert [row["name"] for row in record["rows"]] == [
        "default", *groups[:2], "tome", "late_tome", "evit", "ppt", "prune", "random"
    ]  # fmt: skip
    assert page.read_text() in ended.stdout
    assert all(f"| {row['name']} |" in page.read_text() for row in record["rows"])
    assert f"{keys['ratio']:.3f} ± {keys['ratio_half']:.3f}" in page.read_text()


def test_errors_of_dense_models_are_by_photograph():
    model = make(num_classes=0)
    x, photograph = images(batch=4), torch.tensor([0, 0, 1, 1])

    def head(tokens):
        return tokens.transpose(1, 2).unflatten(2, (8, 8))

    dense = ablation.DenseAblation(model, head, x, photograph, lambda: x, 3)
    row = ablation.rows_for(model)[0]
    (result,) = dense.ablate([row], [0.8])
    assert result["ratio"] == 1
    with torch.no_grad():
        expected = remove(model).forward_features(x)
        tokens = apply(model, MergeConfig.from_json(result["config"])).forward_features(x)
    error = (tokens - expected)[:, 1:].flatten(1).norm(dim=1) / expected[:, 1:].flatten(1).norm(dim=1)
    assert result["patches"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert result["saliency"] == pytest.approx((tokens - expected)[:, 1:].abs().mean().item(), rel=1e-4)
    torch.testing.assert_close(dense.by_photograph(error), error.view(2, 2).mean(1))
    page = ablation.tables(
        {"model": "m", "description": "", "gmacs": 1.0, "images": 4, "measure": "", "rows": [result]}
    )
    assert f"| {result['patches']:.4f} | {result['class_token']:.4f} | {result['saliency']:.4f} | 1 |" in page


def test_patches_have_nothing_of_their_own_without_it():
    model, x = apply(make(num_classes=0), 0.5), images()
    rows = {row.name: row for row in ablation.rows_for(model)}
    with ablation.in_place(rows["without what was its own"]), torch.no_grad():
        tokens = model.forward_features(x)[0, 1:]
    assert len(tokens.unique(dim=0)) < len(tokens)
    with torch.no_grad():
        tokens = model.forward_features(x)[0, 1:]
    assert len(tokens.unique(dim=0)) == len(tokens)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [("swin", MergeConfig(method="evit"), "on entry"), ("vit", MergeConfig(stages=(11,)), "multiply-adds")],
)
def test_what_does_not_fit_is_said(name, config, reason):
    model = ablation.create_model(name).eval()
    x, labels = (t[:2] for t in load_images())
    rows = [ablation.rows_for(model)[0], ablation.Row("group", "row", config)]
    results = ablation.Ablation(model, x, labels, lambda: x, 2).ablate(rows, [0.8])
    assert "refused" not in results[0]
    assert reason in results[1]["refused"]
    record = {"model": name, "description": "", "images": 2, "gmacs": 0.4, "top1": 0.5, "measure": "", "rows": results}
    assert "does not fit" in ablation.tables(record)
