"""What is particular to grids, on Swin Transformers: windows, shifts, padding."""

import pytest
import torch
from families import FAMILIES, make

from token_merge_plugin import ConfigError, apply
from token_merge_plugin.cli.list import on_meta
from token_merge_plugin.config import tokens_kept
from token_merge_plugin.method.merging import windows
from token_merge_plugin.trial.counting import count_macs

every_model = pytest.mark.parametrize("kind", FAMILIES["swin"])


@every_model
@pytest.mark.parametrize("size", [112, 120, (72, 104)])
@torch.no_grad()
def test_a_keep_rate_that_merges_nothing_gives_the_unpatched_output(kind, size):
    """Windows, shifts, masks, padding and bias as the unpatched block has them: 120 px are padded to windows."""
    model = make(kind, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width)
    features, output = model.forward_features(x), model(x)
    apply(model, 1 - 1e-9, stages=range(4))
    assert len([m for m in model.modules() if hasattr(m, "_token_merge")]) == 9  # model, blocks and attention layers
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    apply(model, 0.6, stages=range(4))
    assert model.forward_features(x).shape == features.shape
    assert (model(x) - output).abs().max() > 1e-4


@torch.no_grad()
def test_image_sizes_that_change_from_call_to_call():
    model = make("Swin", strict_img_size=False)
    expected = [model(torch.full((1, 3, *size), 0.5)) for size in ((112, 112), (100, 140), (56, 64))]
    apply(model, 1 - 1e-9)
    for size, output in zip(((112, 112), (100, 140), (56, 64)), expected, strict=True):
        torch.testing.assert_close(model(torch.full((1, 3, *size), 0.5)), output, rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(kind):
    """Blocks of patches of 4 kinds and no position: each window has at most 4 different tokens, padding included."""
    model = make(kind, img_size=120)
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name or "cpb_mlp" in name or "meta_mlp" in name:
            parameter.zero_()
    kinds = torch.randn(4, 3, 4, 4)
    x = kinds[torch.arange(900) % 4].view(30, 30, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 120, 120)
    stage = (model.stages if hasattr(model, "stages") else model.layers)[0]
    tokens = model.patch_embed(x)
    tokens = tokens.permute(0, 2, 3, 1) if tokens.shape[1] == 32 else tokens
    expected = stage.blocks[0](tokens)
    apply(model, 0.4)
    torch.testing.assert_close(stage.blocks[0](tokens), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_token_keeps_a_value_of_its_own():
    model = apply(make("Swin").double(), 0.3)
    tokens = torch.randn(1, 28, 28, 32).double()
    block = model.layers[0].blocks[1]
    block.shift_size = (0, 0)
    block.attn_mask = None
    update = windows(block(tokens) - tokens, 7, 7)
    for window in update:  # 15 different updates for 49 tokens
        assert len(window.round(decimals=9).unique(dim=0)) <= 15
    assert len(windows(block(tokens), 7, 7)[0].unique(dim=0)) == 49


def test_whole_images_drop_their_path_in_training():
    model = apply(make("Swin", drop_path_rate=0.999), 0.5, stages=(3,)).train()
    block = model.layers[1].blocks[1]
    tokens = torch.randn(8, 14, 14, 64)
    changed = (block(tokens) != tokens).flatten(1)
    for image in changed:
        assert image.all() or not image.any()


def test_options_that_need_attention_are_refused():
    for options in (
        {"similarity": "keys"},
        {"importance": "class_attention"},
        {"multi_scale": "importance"},
    ):
        with pytest.raises(ConfigError, match="merge tokens on entry"):
            apply(make("Swin"), 0.5, **options)


def test_stages_choose_the_blocks_that_are_reduced():
    model = apply(make("Swin"), 0.5, stages=(2, 3))
    patched = [hasattr(block, "_token_merge") for stage in model.layers for block in stage.blocks]
    assert patched == [False, False, True, True]


def test_the_last_stage_of_the_network_is_not_reduced_by_default():
    model = apply(make("Swin", depths=(2, 4)), 0.5)
    patched = [hasattr(block, "_token_merge") for stage in model.layers for block in stage.blocks]
    assert patched == [True, True, False, False, False, False]
    single = apply(make("Swin", depths=(2,), num_heads=(2,)), 0.5)
    assert all(hasattr(block, "_token_merge") for block in single.layers[0].blocks)


def test_a_swin_of_full_size_merges_where_it_is_wide_and_not_in_its_last_stage():
    model, image = on_meta("swin_tiny_patch4_window7_224")
    full = count_macs(model, image)
    assert round(full / 1e9, 1) == 4.5
    apply(model, 0.7)
    assert list(model._token_merge.plan.schedule) == list(range(2, 10))  # 96 channels in blocks 0 and 1
    assert 0.8 * full < count_macs(model, image) <= 0.83 * full
    assert count_macs(apply(model, 0.7, stages=range(10)), image) <= 0.8 * full
    assert tokens_kept(49, 0.7) == 35
