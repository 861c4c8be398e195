"""Attention over tokens that stand for several patches, against independent formulas."""

import pytest
import torch
import torch.nn.functional as F
from checks import random_qkv
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin.method.attention import _size_as_channel, additive_mask, attention, causal_mask


def repeated(x, size, dim):
    return x.repeat_interleave(size, dim=dim)


@pytest.mark.parametrize("fused", [True, False])
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_proportional_attention_is_attention_over_all_patches(fused, sizes):
    query, key, value = random_qkv(tokens=len(sizes))
    size = torch.tensor(sizes)
    log_size = size.double().log().expand(2, -1)
    out = attention(query, key, value, scale=0.5, log_size=log_size, fused=fused)
    expected = F.scaled_dot_product_attention(query, repeated(key, size, 2), repeated(value, size, 2), scale=0.5)
    torch.testing.assert_close(out, expected)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8).filter(any), st.integers(1, 20), st.integers(1, 20))
def test_sizes_as_a_channel_give_what_sizes_as_a_mask_give(sizes, head_dim, value_dim):
    query, key, _ = random_qkv(tokens=len(sizes), head_dim=head_dim)
    value = random_qkv(tokens=len(sizes), head_dim=value_dim)[2]
    log_size = torch.tensor(sizes).double().log().expand(2, -1)
    padded = _size_as_channel(query, key, value, 0.3, log_size)
    assert padded[0].shape == padded[1].shape == padded[2].shape
    assert padded[0].shape[-1] % 8 == 0
    out = F.scaled_dot_product_attention(*padded[:3], scale=0.3)[..., : padded[3]]
    torch.testing.assert_close(out, attention(query, key, value, scale=0.3, log_size=log_size, fused=False))


@pytest.mark.parametrize("fused", [True, False])
def test_a_bias_and_sizes_add_up(fused):
    query, key, value = random_qkv()
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
