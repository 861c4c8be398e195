"""XCiT, NesT, DaViT, GCViT, TNT and CrossViT: what the tests that every family shares do not show."""

import pytest
import torch
from families import images, make
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from timm.models.xcit import XCA

from token_merge_plugin import apply
from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.adapters.base import Place, patched_class
from token_merge_plugin.adapters.davit import MergingChannelAttention, MergingChannelAttentionV2
from token_merge_plugin.adapters.xcit import MergingXCA
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.method.state import Merged, Pass, Plan

CHANNEL_ATTENTION = {
    "XCA": (lambda: XCA(24, num_heads=3), MergingXCA),
    "ChannelAttention": (lambda: ChannelAttention(24, num_heads=3), MergingChannelAttention),
    "ChannelAttentionV2": (lambda: ChannelAttentionV2(24, num_heads=3), MergingChannelAttentionV2),
    "ChannelAttentionV2, static": (
        lambda: ChannelAttentionV2(24, num_heads=3, dynamic_scale=False),
        MergingChannelAttentionV2,
    ),
}


def patched(layer, mixin, **options):
    plan = Plan(MergeConfig(0.5, **options), {0: 0.5}, (range(1),), 0, 0, False, None)
    layer._token_merge = Place(plan, 0)
    layer.__class__ = patched_class(mixin, type(layer))
    return plan


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", CHANNEL_ATTENTION)
@torch.no_grad()
def test_attention_between_channels_is_exact_for_equal_tokens(kind, fused):
    """Six patches of three values, in one token for each value: the sums over the tokens are those over the patches."""
    torch.manual_seed(0)
    make_layer, mixin = CHANNEL_ATTENTION[kind]
    layer = make_layer().eval()
    layer.fused_attn = fused
    tokens = torch.randn(2, 3, 24)
    token_map = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 2, 1]])
    size = torch.tensor([[2.0, 1.0, 3.0], [1.0, 4.0, 1.0]])
    image = torch.arange(2)[:, None]
    expected = layer(tokens[image, token_map])

    plan = patched(layer, mixin)
    plan.install(Pass(6, 0, (2, 3), Merged(size, token_map, torch.tensor([[0, 2, 3], [0, 1, 4]]))))
    try:
        torch.testing.assert_close(layer(tokens)[image, token_map], expected, rtol=1e-5, atol=1e-6)
    finally:
        plan.install(None)


@torch.no_grad()
def test_without_proportional_attention_each_token_counts_once_between_channels():
    torch.manual_seed(0)
    layer = XCA(24, num_heads=3).eval()
    tokens = torch.randn(1, 3, 24)
    expected = layer(tokens)
    plan = patched(layer, MergingXCA, proportional_attention=False)
    token_map = torch.tensor([[0, 0, 1, 2]])
    plan.install(Pass(4, 0, (2, 2), Merged(torch.tensor([[2.0, 1.0, 1.0]]), token_map, torch.tensor([[0, 2, 3]]))))
    try:
        torch.testing.assert_close(layer(tokens), expected)
    finally:
        plan.install(None)


def blocks_with_equal_tokens():
    """Yield a model, a block of it, and the block's inputs: 64 tokens with 8 different values."""
    value = torch.arange(64) % 8
    xcit, nest, tnt = make("XCiT"), make("NesT"), make("TNT")
    xcit.blocks[0].gamma3.data.zero_()  # without the convolution, under which equal tokens have unequal neighbours
    yield xcit, xcit.blocks[0], (torch.randn(2, 8, 96)[:, value], 8, 8)
    yield nest, nest.levels[0].transformer_encoder[0], (torch.randn(2, 4, 8, 96)[:, :, value],)
    pixels = torch.randn(2, 8, 16, 12)[:, value].flatten(0, 1)
    yield tnt, tnt.blocks[0], (pixels, torch.cat((torch.randn(2, 1, 48), torch.randn(2, 8, 48)[:, value]), dim=1))


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing():
    torch.manual_seed(0)
    for model, block, inputs in blocks_with_equal_tokens():
        expected = block(*inputs)
        apply(model, 0.6)
        torch.testing.assert_close(block(*inputs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_davit_merges_no_padding_into_the_image():
    """In windows of 7x7, 5 of 14 rows are padding; equal patches are then exact, for no zero is mixed into them."""
    model = make("DaViT")
    block = model.stages[0].blocks[0][0]
    x = torch.randn(1, 48, 1, 1).expand(1, 48, 9, 9)
    for cpe in (block.cpe1, block.cpe2):  # without the convolutions, whose padding makes the patches unequal
        cpe.proj.weight.zero_()
    expected = block(x)
    apply(model, 0.6)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_crossvit_merges_in_the_branch_with_several_blocks_and_restores_before_the_branches_meet():
    model, x = make("CrossViT"), images("CrossViT")
    apply(model, 0.6)
    adapter = find_adapter(model)
    assert adapter.sections(model) == [range(1), range(1, 4), range(4, 5), range(5, 7)]
    assert adapter.default_stages(model) == (1, 2, 5, 6)
    seen = []
    for block in adapter.blocks(model):
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    features = model.forward_features(x)
    assert seen == [101, 1 + 30, 1 + 18, 1 + 18, 101, 1 + 30, 1 + 18]
    assert [f.shape[1] for f in features] == [101, 50]


@torch.no_grad()
def test_crossvit_is_pruned_by_multi_scale_blocks():
    model, x = make("CrossViT"), images("CrossViT")
    apply(model, 0.6)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    model.prune_intermediate_layers([0, 2])
    assert len(model.blocks) == 1
    pruned = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], expected[0])
