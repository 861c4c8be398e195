"""Offsets: what a patch had beyond its merged token is given back where the grid is restored, and somebody reads it."""

from unittest import mock

import pytest
import torch
from checks import gradients, set_fused_attention
from families import images, make
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import apply
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.method import reduction
from token_merge_plugin.method.state import Evidence, Pass, Plan


@given(st.integers(1, 3), st.integers(2, 30), st.floats(0.2, 0.9), st.sampled_from(["merge", "tome", "evit"]))
@torch.no_grad()
def test_a_merge_leaves_the_restored_grid_as_it_is(batch, patches, rate, method):
    config = MergeConfig({0: rate, 1: rate}, method=method)
    plan = Plan(config, {0: rate, 1: rate}, (range(2),), 1, 1, None)
    state = Pass(patches, 1, keeps_offsets=True)
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
def test_a_head_that_reads_the_class_token_alone_does_not_pay_for_offsets(kind, changes, read):
    model, x = apply(make(kind, **changes), 0.6), images(kind)
    with mock.patch.object(reduction, "_offset", wraps=reduction._offset) as offset:
        model(x)
        assert offset.called is read
        model.forward_features(x)
        assert offset.called


@torch.no_grad()
def test_whether_the_head_reads_the_grid_is_seen_when_it_is_called():
    model, x = apply(make("ViT"), 0.6), images()
    with mock.patch.object(reduction, "_offset", wraps=reduction._offset) as offset:
        model(x)
        model.reset_classifier(3, "avg")
        assert not offset.called
        model(x)
        assert offset.called


@pytest.mark.parametrize("method", ["prune", "random", "ppt"])
@torch.no_grad()
def test_what_is_dropped_is_not_given_back(method):
    model, x = apply(make("ViT"), 0.6, method=method), images()
    with mock.patch.object(reduction, "_offset", side_effect=AssertionError):
        model.forward_features(x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"multi_scale": "learned"}])
def test_gradients_through_offsets_are_the_same_with_checkpointing(fused, options):
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
