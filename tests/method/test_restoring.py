"""Restoring: where somebody reads the grid, patches get back what was their own, and updates in between."""

from unittest import mock

import pytest
import torch
from checks import gradients, set_fused_attention
from families import images, make
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from token_merge_plugin import apply
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.method import reduction
from token_merge_plugin.method.merging import interpolation
from token_merge_plugin.method.state import Evidence, Pass, Plan


@given(st.integers(1, 3), st.integers(2, 30), st.floats(0.2, 0.9), st.sampled_from(["merge", "tome", "evit"]))
@torch.no_grad()
def test_a_merge_leaves_the_restored_grid_as_it_is(batch, patches, rate, method):
    config = MergeConfig({0: rate, 1: rate}, method=method)
    plan = Plan(config, {0: rate, 1: rate}, (range(2),), 1, 1, None)
    state = Pass(patches, 1, reads_grid=True)
    x = torch.randn(batch, 1 + patches, 6)
    for block in range(2):
        grid = plan.restore(state, x)
        query, key, value = torch.randn(3, batch, 2, x.shape[1], 3)
        state.evidence.append(Evidence(query, key, value, 1.0))
        x = reduction.reduce_tokens(plan, state, x, block)
        torch.testing.assert_close(plan.restore(state, x), grid, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.take_tokens(plan.restore(state, x)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "read"),
    [
        ("ViT", {}, False),
        ("ViT", {"num_classes": 0}, False),
        ("DeiT, distilled", {}, False),
        ("ViT, average", {}, True),
        ("ViT, no class token, average", {}, True),
        ("PiT", {}, True),
        ("CaiT", {}, True),
        ("LV-ViT", {}, True),
    ],
)
@torch.no_grad()
def test_a_head_that_reads_the_class_token_alone_does_not_pay_for_restoring(kind, changes, read):
    model, x = apply(make(kind, **changes), 0.6), images(kind)
    with mock.patch.object(reduction, "interpolation", wraps=interpolation) as noted:
        model(x)
        assert noted.called is read
        model.forward_features(x)
        assert noted.called


@torch.no_grad()
def test_whether_the_head_reads_the_grid_is_seen_when_it_is_called():
    model, x = apply(make("ViT"), 0.6), images()
    with mock.patch.object(reduction, "interpolation", wraps=interpolation) as noted:
        model(x)
        model.reset_classifier(3, "avg")
        assert not noted.called
        model(x)
        assert noted.called


@pytest.mark.parametrize("method", ["prune", "random", "ppt"])
@torch.no_grad()
def test_what_is_dropped_is_not_given_back(method):
    model, x = apply(make("ViT"), 0.6, method=method), images()
    with mock.patch.object(reduction, "interpolation", side_effect=AssertionError):
        model.forward_features(x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"multi_scale": "learned"}])
def test_gradients_through_what_is_restored_are_the_same_with_checkpointing(fused, options):
    model = apply(make("ViT, average", num_classes=0).train(), 0.5, **options)
    set_fused_attention(model, fused)
    x = images()
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(model, x), expected)


@torch.no_grad()
def test_every_patch_of_an_intermediate_grid_has_a_value_of_its_own_and_the_last_one_is_the_output():
    model, x = apply(make("ViT"), 0.4), images()
    final, intermediates = model.forward_intermediates(x, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(x))
    for tokens in intermediates:
        assert len(tokens[0].unique(dim=0)) == tokens.shape[1]


CLASS_TOKEN_READ = ("ViT", "DeiT, distilled", "ViT, registers", "ViT, parallel pairs", "ViT, post-norm")


def mlp_tokens(model, x):
    """How many tokens the MLP of the last block sees when the model is called."""
    block = model.blocks[-1]
    mlp = block.ffns[-1].mlp if hasattr(block, "ffns") else block.mlp
    with mock.patch.object(type(mlp), "forward", autospec=True, side_effect=type(mlp).forward) as forward:
        model(x)
        seen = [call.args[1].shape[1] for call in forward.call_args_list if call.args[0] is mlp]
    return seen[0]


@pytest.mark.parametrize("kind", CLASS_TOKEN_READ)
def test_image_tokens_that_nobody_reads_are_left_out_behind_the_last_attention(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model.forward_head(model.forward_features(x))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    assert mlp_tokens(model, x) == model.num_prefix_tokens
    output = model(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), list(model.parameters())), expected_gradients, rtol=1e-4, atol=1e-5
    )
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("path", ["", "norm", "blocks.3", "blocks.3.mlp.fc1", "all"])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_hook_behind_the_last_attention_sees_the_image_tokens(path, compiled):
    model, x = apply(make("ViT"), 0.6), images()
    module = torch.nn.modules.module if path == "all" else model.get_submodule(path)
    register = module.register_module_forward_hook if path == "all" else module.register_forward_hook
    seen = {}
    handle = register(lambda module, _, output: seen.update({type(module).__name__: output.shape[1]}))
    try:
        (torch.compile(model, backend="eager") if compiled else model)(x)
    finally:
        handle.remove()
        torch.compiler.reset()
    grid, merged = 1 + model.patch_embed.num_patches, model.blocks[3].mlp.fc1
    if path in ("norm", "all"):
        assert seen["LayerNorm"] == grid
    elif path == "blocks.3":
        assert seen["Block"] == grid
    elif path:
        assert 1 < seen[type(merged).__name__] < grid
    else:
        assert mlp_tokens(model, x) == 1


@torch.no_grad()
def test_a_model_with_a_forward_of_its_own_finds_the_grid():
    class Mine(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return x[:, 1:].mean(dim=1)

    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    model, x = apply(Mine(**options).eval(), 0.6), torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), model.forward_features(x)[:, 1:].mean(dim=1))
    replaced = apply(VisionTransformer(**options).eval(), 0.6)
    replaced.forward_head = lambda x: x[:, 1:].mean(dim=1)
    assert torch.equal(replaced(x), replaced.forward_features(x)[:, 1:].mean(dim=1))


def test_a_block_that_is_run_twice_for_its_gradients_gives_the_same_grid_both_times():
    model, x = apply(make("ViT"), 0.6), images()
    expected = gradients(model, x)
    blocks, segment = model.blocks, torch.nn.Identity()
    blocks_forward = torch.nn.Sequential(*blocks).forward
    segment.forward = lambda x: torch.utils.checkpoint.checkpoint(blocks_forward, x, use_reentrant=True)
    with mock.patch.object(type(blocks), "forward", lambda self, x: segment(x)):
        torch.testing.assert_close(gradients(model, x), expected)
