"""MaxViT and CoAtNet: what the tests that every family shares do not show."""

import pytest
import torch
from families import FAMILIES, images, make

from token_merge_plugin import apply
from token_merge_plugin.adapters import find_adapter


def channel_axis(block):
    return 1 if type(block).__name__.endswith("2d") else 3


def blocks_and_inputs(model, kind):
    """Return the transformer blocks, each with the shape of its input."""
    shapes = []
    blocks = find_adapter(model).blocks(model)
    hooks = [block.register_forward_hook(lambda block, args, output: shapes.append(args[0].shape)) for block in blocks]
    model(images(kind))
    for hook in hooks:
        hook.remove()
    return list(zip(blocks, shapes, strict=True))


@pytest.mark.parametrize("kind", FAMILIES["maxxvit"])
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(kind):
    """A chessboard of two colours, in squares of two by two tokens, so that pooling leaves two colours."""
    model = make(kind)
    for name, parameter in model.named_parameters():
        if ".rel_pos." in name:  # without the bias, by which equal tokens at different positions differ
            parameter.zero_()
    cases = []
    for block, shape in blocks_and_inputs(model, kind):
        axis = channel_axis(block)
        batch, channels = shape[0], shape[axis]
        height, width = (size for i, size in enumerate(shape) if i not in (0, axis))
        colour = (torch.arange(height)[:, None] // 2 + torch.arange(width) // 2) % 2
        x = torch.randn(batch, 2, channels)[:, colour]  # [B, H, W, C]
        x = x.permute(0, 3, 1, 2) if axis == 1 else x
        cases.append((block, x, block(x)))
    apply(model, 0.6)
    for block, x, expected in cases:
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_that_pool_run_on_fewer_tokens_of_the_pooled_grid():
    model = make("CoAtNet")
    apply(model, 0.6)
    seen = []
    for block in find_adapter(model).blocks(model):
        for layer in (block.attn, block.mlp):
            layer.register_forward_hook(lambda layer, args, output: seen.append(args[0].shape[2:].numel()))
    model(images("CoAtNet"))
    assert seen == [39, 39, 39, 39, 10, 10]  # of 64, 64 and 16


@torch.no_grad()
def test_blocks_are_counted_without_convolution_blocks():
    model = make("MaxViT")
    assert find_adapter(model).default_stages(model) == tuple(range(2 * 5))
