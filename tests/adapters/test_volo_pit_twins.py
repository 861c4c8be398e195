"""What VOLO, PiT and Twins have of their own; the invariants that all families share are in test_families.py."""

import pytest
import torch
from families import images, make

from token_merge_plugin import ConfigError, UnsupportedModelError, apply, remove
from token_merge_plugin.method.state import Plan
from token_merge_plugin.trial.counting import count_macs


def doubled(batch, height, width, channels):
    """A grid [B, H, W, C] in which every token has an equal neighbour."""
    torch.manual_seed(2)
    return torch.randn(batch, height, width // 2, channels).repeat_interleave(2, dim=2)


def twins_with_padding():
    return make("Twins-SVT", wss=(7, 7, 7, 7))


@torch.no_grad()
def test_windows_of_twins_that_need_padding():
    """At this keep rate every block takes the way of merged tokens, and K = T."""
    model, x = twins_with_padding(), images("Twins-SVT")
    expected = model(x)
    torch.testing.assert_close(apply(model, 0.99999)(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Twins-PCPVT", "Twins-SVT"])
def test_merging_equal_tokens_changes_nothing_in_twins(kind):
    model = make(kind)
    for stage, side in zip(model.blocks, (32, 16, 8, 4), strict=True):
        for block in stage:
            x = doubled(2, side, side, block.norm1.weight.numel()).flatten(1, 2)
            expected = block(x, (side, side))
            apply(model, 0.5)
            torch.testing.assert_close(block(x, (side, side)), expected, rtol=1e-4, atol=1e-4)
            remove(model)


def test_padded_windows_of_twins_do_not_cost_more_than_without_merging():
    model, x = twins_with_padding(), images("Twins-SVT", batch=1)
    macs = count_macs(model, x)
    assert count_macs(apply(model, 0.6), x) < 0.95 * macs


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing_in_pit():
    model = make("PiT, distilled")
    x, cls_tokens = doubled(2, 12, 12, 16).permute(0, 3, 1, 2), torch.randn(2, 2, 16)
    expected = model.transformers[0]((x, cls_tokens))
    apply(model, {0: 0.5})
    torch.testing.assert_close(model.transformers[0]((x, cls_tokens)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing_in_volo():
    model, x = make("VOLO"), doubled(2, 4, 4, 384)
    expected = x
    for blocks in model.network[2:]:
        expected = blocks(expected)
    apply(model, {4: 0.5})
    for blocks in model.network[2:]:
        x = blocks(x)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_transformer_block_of_volo_on_its_own_takes_the_grid():
    model, x = make("VOLO"), torch.randn(2, 4, 4, 384)
    expected = model.network[4][1](x)
    apply(model, 0.6)
    assert torch.equal(model.network[4][1](x), expected)


def test_outlookers_do_not_reduce_tokens():
    with pytest.raises(ConfigError, match=r"Block 3 .* Choose from blocks 4, 5, "):
        apply(make("VOLO"), 0.6, stages=(3, 6))


@torch.no_grad()
def test_volo_with_outlookers_alone_is_refused():
    model, x = make("VOLO"), images("VOLO")
    model.prune_intermediate_layers([0])
    expected = model.forward_intermediates(x, intermediates_only=True)
    with pytest.raises(UnsupportedModelError, match="no transformer block"):
        apply(model, 0.6)
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize(("kind", "last"), [("VOLO", 0), ("VOLO", 2), ("PiT", 0), ("PiT", 1)])
def test_the_grid_is_restored_behind_whatever_run_of_blocks_is_left(kind, last, monkeypatch):
    # A grid from which no block takes the tokens again is restored more finely: here all are.
    monkeypatch.setattr(Plan, "restore", lambda self, state, x, last, restore=Plan.restore: restore(self, state, x))
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model.forward_intermediates(x, indices=[last], intermediates_only=True)[0]
    model.prune_intermediate_layers([last])
    torch.testing.assert_close(model.forward_intermediates(x, indices=[last], intermediates_only=True)[0], expected)
    model.forward_features(x)
    assert model._token_merge.plan.current() is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mix_token", [False, True])
def test_volo_trains_with_token_labels(mix_token, checkpointing):
    model = apply(make("VOLO", use_mix_token=mix_token), 0.6).train()
    model.set_grad_checkpointing(checkpointing)
    pooled, dense, box = model.forward_train(images("VOLO"))
    assert pooled.shape == (2, 384)  # in front of the head
    assert dense.shape == (2, 16, 5)
    assert len(box) == 4
    assert model._token_merge.plan.current() is None
    (pooled.square().sum() + dense.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert name.startswith("head.") or torch.isfinite(parameter.grad).all()


@torch.no_grad()
@pytest.mark.parametrize(("block", "grid_size"), [(0, (13, 13)), (4, (7, 7)), (9, (4, 4))])
def test_scales_of_pit_are_those_of_the_section(block, grid_size, monkeypatch):
    seen = []
    reduce_tokens = "token_merge_plugin.adapters.base.reduce_tokens"
    monkeypatch.setattr(reduce_tokens, lambda plan, state, x, block: seen.append(state.grid_size) or x)
    apply(make("PiT"), {block: 0.6}, multi_scale="importance")(images("PiT"))
    assert seen == [grid_size]


def test_the_last_block_of_a_section_of_pit_is_no_default_stage():
    model = apply(make("PiT"), 0.6)
    assert sorted(model._token_merge.plan.schedule) == [0, 3, 5, 6, 9, 10]
