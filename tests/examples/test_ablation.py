"""The ablation of examples/ablation.py: its variants against the package, and its tables."""

import json
import sys

import ablation
import pytest
import torch
import torch.nn.functional as F
from checks import EXAMPLES, run_program

from token_merge_plugin import MergeConfig, apply
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
    with ablation.in_place(ablation.Row("", "", variant=ablation.Variant(weight="importance"))):
        assert reduction.METHODS["merge"] == ablation.Variant(weight="importance")
    assert before == reduction.METHODS


@pytest.mark.parametrize("row", [row for row in ablation.rows_for(create_reference_model()) if row.variant])
def test_every_variant_changes_the_output(row):
    model = apply(create_reference_model(), 0.5)
    assert not torch.allclose(outputs(model, row.variant), outputs(model), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"importance": "class_attention"}, ablation.Variant(importance=ablation.root(ablation.attention_mean))),
        ({}, ablation.Variant(importance=ablation.root(ablation.attention_sampled(16)))),
        ({"multi_scale": "descriptors"}, ablation.Variant(descriptors=ablation.neighbourhoods(2 / 3))),
        (
            {"similarity": "keys", "multi_scale": "descriptors"},
            ablation.Variant(descriptors=ablation.keys_with_neighbours),
        ),
    ],
)
def test_what_both_can_do_is_the_same(options, variant):
    mine, default = create_reference_model(), create_reference_model()
    torch.testing.assert_close(
        outputs(apply(mine, 0.6, **options)), outputs(apply(default, 0.6), variant), rtol=1e-4, atol=1e-5
    )


def test_attention_received_is_the_mean_column_of_the_attention_over_patches():
    """Against the attention of the full sequence, of which tokens are copies."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 4, 8)
    size = torch.tensor([[2.0, 1.0, 3.0]])
    copies = torch.tensor([0, 1, 1, 2, 3, 3, 3])  # the first is the class token
    full = (query[:, :, copies] @ key[:, :, copies].transpose(2, 3) * 0.3).softmax(dim=3).mean(dim=(1, 2))
    expected = torch.zeros(1, 4).index_add(1, copies, full)[:, 1:]
    model = apply(create_reference_model(), 0.5)
    plan = model._token_merge.plan
    state = reduction.Pass(6, 1, None, reduction.Merged(size, torch.tensor([[0, 0, 1, 2, 2, 2]]), copies[None, :3]))
    evidence = [reduction.Evidence(query, key, key, 0.3)]
    stage = reduction.Stage(plan, state, 3, torch.zeros(1, 3, 16), state.merged, evidence)
    torch.testing.assert_close(ablation.attention_received(stage), expected)


def test_a_ratio_has_the_interval_of_the_paired_differences():
    default = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ratio, half = ablation.against_default(default * 2, default)
    assert ratio == 2
    assert half == pytest.approx(1.959964 * default.std().item() / 2 / 2.5)
    assert ablation.against_default(default, default) == (1, 0)


def test_the_tables_hold_what_was_measured(tmp_path):
    script, out = [sys.executable, EXAMPLES / "ablation.py"], tmp_path / "vit.json"
    options = ["--images", "20", "--shares", "0.6", "--groups", "keys", "three in the second half", "baselines"]
    ended = run_program(*script, "--data", FOLDER, *options, "--json", out)
    assert ended.returncode == 0, ended.stderr
    record = json.loads(out.read_text())
    model, (x, labels) = create_reference_model(), (t[:20] for t in load_images())
    keys = next(row for row in record["rows"] if row["name"] == "keys")
    with torch.no_grad():
        unpatched = model(x).log_softmax(1)
        patched = apply(model, MergeConfig.from_json(keys["config"]))(x).log_softmax(1)
    assert keys["top1"] == pytest.approx((patched.argmax(1) == labels).float().mean().item())
    assert keys["kl"] == pytest.approx(
        F.kl_div(patched, unpatched, log_target=True, reduction="batchmean").item(), rel=0.01, abs=1e-7
    )
    assert all(row["gmacs"] / record["gmacs"] == pytest.approx(0.6, abs=0.01) for row in record["rows"])
    assert [row["name"] for row in record["rows"]] == [
        "default", "keys", "three in the second half", "tome", "late_tome", "evit", "ppt", "prune", "random"
    ]  # fmt: skip
    assert all(row["name"] in ended.stdout for row in record["rows"])
    summary = run_program(*script, "--summary", out, out)
    assert f"{keys['ratio']:.2f}" in summary.stdout
    assert f"{100 * (record['rows'][0]['gained'] - record['rows'][0]['lost']) / 20:+.2f} ± " in summary.stdout


@pytest.mark.parametrize(
    ("name", "row", "share", "reason"),
    [("swin", "evit", 0.9, "on entry"), ("vit", "three in the second half", 0.4, "multiply-adds")],
)
def test_what_does_not_fit_is_said(name, row, share, reason, capsys):
    model = ablation.create_model(name).eval()
    x, labels = (t[:2] for t in load_images())
    rows = [found for found in ablation.rows_for(model) if found.name in ("default", row)]
    results = ablation.ablate(ablation.Ablation(model, x, labels, FOLDER, 2), rows, [share])
    assert "refused" not in results[0]
    assert reason in results[1]["refused"]
    ablation.print_table({"model": name, "description": "", "images": 2, "gmacs": 0.4, "top1": 0.5, "rows": results})
    assert "does not fit" in capsys.readouterr().out
