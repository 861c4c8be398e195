"""Attention, importance and multi-scale fusion against independent formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin.method.attention import _size_as_channel, additive_mask, attention, causal_mask
from token_merge_plugin.method.importance import evenly_spaced, query_row_attention
from token_merge_plugin.method.multiscale import SCALES, fuse


def qkv(batch=2, heads=3, tokens=7, head_dim=4, seed=0):
    return torch.randn(3, batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)).double()


def repeated(x, size, dim):
    return x.repeat_interleave(size, dim=dim)


@pytest.mark.parametrize("fused", [True, False])
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_proportional_attention_is_attention_over_all_patches(fused, sizes):
    query, key, value = qkv(tokens=len(sizes))
    size = torch.tensor(sizes)
    log_size = size.double().log().expand(2, -1)
    out = attention(query, key, value, scale=0.5, log_size=log_size, fused=fused)
    expected = F.scaled_dot_product_attention(query, repeated(key, size, 2), repeated(value, size, 2), scale=0.5)
    torch.testing.assert_close(out, expected)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8).filter(any), st.integers(1, 20), st.integers(1, 20))
def test_sizes_as_a_channel_give_what_sizes_as_a_mask_give(sizes, head_dim, value_dim):
    query, key, _ = qkv(tokens=len(sizes), head_dim=head_dim)
    value = qkv(tokens=len(sizes), head_dim=value_dim)[2]
    log_size = torch.tensor(sizes).double().log().expand(2, -1)
    padded = _size_as_channel(query, key, value, 0.3, log_size)
    assert padded[0].shape == padded[1].shape == padded[2].shape
    assert padded[0].shape[-1] % 8 == 0
    out = F.scaled_dot_product_attention(*padded[:3], scale=0.3)[..., : padded[3]]
    torch.testing.assert_close(out, attention(query, key, value, scale=0.3, log_size=log_size, fused=False))


@pytest.mark.parametrize("fused", [True, False])
def test_a_bias_and_sizes_add_up(fused):
    query, key, value = qkv()
    bias, log_size = torch.randn(7, 7).double(), torch.rand(2, 7).double()
    out = attention(query, key, value, scale=0.5, bias=bias, log_size=log_size, fused=fused)
    logits = query @ key.transpose(-2, -1) * 0.5 + bias + log_size[:, None, None, :]
    torch.testing.assert_close(out, logits.softmax(-1) @ value)


def test_bool_masks_become_zero_and_minus_infinity():
    mask = additive_mask(torch.tensor([True, False]), torch.float)
    assert mask.tolist() == [0, float("-inf")]
    assert additive_mask(torch.tensor([0.5]), torch.half).dtype == torch.half


def test_a_causal_mask_lets_a_token_see_itself_and_those_before_it():
    assert causal_mask(3, torch.device("cpu")).tolist() == [[True, False, False], [True, True, False], [True] * 3]


def test_query_row_attention_is_the_row_of_the_full_attention_matrix():
    query, key, _ = qkv()
    bias = torch.randn(2, 1, 1, 7).double()
    full = (query @ key.transpose(-2, -1) * 0.5 + bias).softmax(-1)
    row = query_row_attention(query[:, :, :2], key, 0.5, bias)
    torch.testing.assert_close(row.double(), full[:, :, :2].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_head_weights_subtract_heads_and_importance_is_the_magnitude():
    query, key, _ = qkv(heads=2)
    full = (query @ key.transpose(-2, -1)).softmax(-1)[:, :, 0]
    row = query_row_attention(query[:, :, :1], key, 1.0, head_weight=torch.tensor([1.0, -0.5]))
    expected = ((full[:, 0] - 0.5 * full[:, 1]) / 2).abs()
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 200), st.integers(1, 40))
def test_evenly_spaced_positions_cut_the_tokens_into_equal_parts(tokens, count):
    positions = evenly_spaced(tokens, count, None, torch.device("cpu"))[0].tolist()
    assert positions == [math.floor((j + 0.5) * tokens / count + 1e-9) for j in range(count)]
    assert all(0 <= position < tokens for position in positions)


@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any), st.integers(1, 20))
def test_evenly_spaced_positions_pass_over_padding(real, count):
    positions = evenly_spaced(len(real), count, torch.tensor([real]), torch.device("cpu"))[0].tolist()
    mine = [position for position, is_real in enumerate(real) if is_real]
    alone = evenly_spaced(len(mine), count, None, torch.device("cpu"))[0].tolist()
    assert positions == [mine[position] for position in alone]


def test_an_image_of_nothing_but_padding_has_positions_too():
    real = torch.zeros(1, 5, dtype=torch.bool)
    assert evenly_spaced(5, 3, real, real.device).max() < 5


def test_multi_scale_fusion_is_the_mean_of_a_patch_and_of_its_neighbourhoods():
    height, width = 4, 6
    features = torch.randn(2, height * width, 3)
    fused = fuse(features, (height, width)).reshape(2, height, width, 3)
    grid = features.reshape(2, height, width, 3)
    for y in range(height):
        for x in range(width):
            means = [grid[:, y, x]]
            for scale in SCALES:
                r = scale // 2
                square = grid[:, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
                means.append(square.flatten(1, 2).mean(1))
            torch.testing.assert_close(fused[:, y, x], torch.stack(means).mean(0))


def test_multi_scale_fusion_leaves_a_constant_map_as_it_is():
    features = torch.ones(1, 20, 2) * torch.tensor([1.0, -3.0])
    torch.testing.assert_close(fuse(features, (4, 5)), features)
