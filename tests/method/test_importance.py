"""Importance: the attention that tokens receive, from which tokens, against independent formulas."""

import math

import pytest
import torch
from checks import random_qkv
from families import make
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import apply
from token_merge_plugin.method import reduction
from token_merge_plugin.method.importance import evenly_spaced, query_row_attention, relative_importance


def test_query_row_attention_is_the_row_of_the_full_attention_matrix():
    query, key, _ = random_qkv()
    bias = torch.randn(2, 1, 1, 7).double()
    full = (query @ key.transpose(-2, -1) * 0.5 + bias).softmax(-1)
    row = query_row_attention(query[:, :, :2], key, 0.5, bias)
    torch.testing.assert_close(row.double(), full[:, :, :2].mean(1), rtol=1e-5, atol=1e-6)


def test_head_weights_subtract_heads_and_importance_is_the_magnitude():
    query, key, _ = random_qkv(heads=2)
    full = (query @ key.transpose(-2, -1)).softmax(-1)[:, :, 0]
    row = query_row_attention(query[:, :, :1], key, 1.0, head_weight=torch.tensor([1.0, -0.5]))
    expected = ((full[:, 0] - 0.5 * full[:, 1]) / 2).abs()
    torch.testing.assert_close(row[:, 0].double(), expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_importance_is_the_attention_that_tokens_receive_from_16_of_them(masked):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 2, 41, 8)  # a class token and 40 image tokens
    bias = torch.randn(2, 1, 41, 41) if masked else None
    attention = (query @ key.transpose(2, 3) * 0.5 + (0 if bias is None else bias)).softmax(3)
    rows = [1 + (2 * j + 1) * 40 // 32 for j in range(16)]
    expected = attention[:, :, rows, 1:].mean(dim=1)
    plan = apply(make(), 0.5)._token_merge.plan
    identity = torch.arange(40).expand(2, -1)
    before = reduction.Merged(torch.ones(2, 40), identity, identity)
    evidence = [reduction.Evidence(query, key, key, 0.5, bias)]
    stage = reduction.Stage(plan, reduction.Pass(40, 1), 2, torch.zeros(2, 40, 16), before, evidence)
    image_rows = reduction._image_rows(stage)
    torch.testing.assert_close(reduction._attention_received(stage, image_rows), expected)
    counted = (attention * key.norm(dim=3)[:, :, None])[:, :, rows, 1:].mean(dim=(1, 2))
    torch.testing.assert_close(reduction._attention_received(stage, image_rows, values=True).mean(dim=1), counted)
    by_class = attention[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(reduction._class_attention(stage), by_class)
    # The larger of two powers, of what is received relative to the mean of the image.
    by_class = (attention * key.norm(dim=3)[:, :, None])[:, :, 0, 1:].mean(dim=1)
    powers = [(x / x.mean(dim=1, keepdim=True)) ** power for x, power in ((by_class, 0.25), (counted, 0.5))]
    torch.testing.assert_close(reduction._importance(stage), torch.maximum(powers[0], 0.7 * powers[1]))


def test_relative_importance_is_that_of_a_patch():
    attention, size = torch.tensor([[[0.2, 0.6, 0.0]]]), torch.tensor([[1.0, 3.0, 0.0]])
    torch.testing.assert_close(relative_importance(attention, size, True), torch.tensor([[[1.0, 1.0, 0.0]]]))
    torch.testing.assert_close(relative_importance(attention, size, False), torch.tensor([[[0.4, 1.2, 0.0]]]))
    assert torch.equal(relative_importance(torch.zeros(1, 1, 3), size, True)[0, :, :1], torch.ones(1, 1))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_heads_that_share_values_count_by_their_norms(shared):
    query, key, value = random_qkv(heads=4)
    value = value[:, : 4 // shared]
    full = (query @ key.transpose(-2, -1)).softmax(-1)[:, :, 0]
    norm = value.norm(dim=3).repeat_interleave(shared, dim=1)
    row = query_row_attention(query[:, :, :1], key, 1.0, value=value)
    torch.testing.assert_close(row.double(), (full * norm).mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
