"""What holds for CaiT and ConViT, whose first blocks see patches only: `test_families.py` holds the rest."""

import pytest
import torch
from checks import equal_patches
from families import images, make

from token_merge_plugin import ConfigError, apply, remove
from token_merge_plugin.method.merging import restore, take

both = pytest.mark.parametrize("kind", ["CaiT", "ConViT"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@both
def test_merging_equal_tokens_changes_nothing(kind):
    """With patches of a few kinds and no position, tokens are equal in all layers: merging them loses nothing."""
    model = make(kind)
    model.pos_embed.zero_()
    for block in model.blocks:
        if hasattr(block.attn, "pos_proj"):  # each patch attends to all alike, wherever it lies
            block.attn.pos_proj.weight.zero_()
    x = equal_patches(patch_size=16)
    expected = model.forward_features(x)
    apply(model, {0: 0.5, 1: 0.5, 3: 0.35})  # 64 -> 32 -> 16 -> 6 tokens
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-3, atol=1e-4)


@both
def test_a_token_attends_as_its_representative_to_all_patches(kind):
    """Heads that talk, attention by position: both are what they would be over the patches, each like its token."""
    model, x = make(kind), images(kind)
    for block in model.blocks:
        for parameter in block.attn.parameters():
            parameter.mul_(2)
    seen = []
    apply(model, {0: 0.6, 1: 0.6})
    attention = model.blocks[2].attn
    hook = attention.register_forward_hook(
        lambda layer, tokens, out: seen.append((tokens[0], out, layer._token_merge.plan.current().merged))
    )
    model(x)
    tokens, out, merged = seen.pop()
    assert tokens.shape[1] == 24
    hook.remove()
    remove(model)
    expected = take(attention(restore(tokens, merged.token_map)), merged.representative)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@both
def test_no_class_token_attends_where_tokens_are_reduced(kind):
    with pytest.raises(ConfigError, match="choose 'uniform'"):
        apply(make(kind), 0.6, importance="class_attention")


def test_the_class_attention_blocks_of_cait_are_no_stages():
    with pytest.raises(ConfigError, match="has 4 blocks"):
        apply(make("CaiT"), {4: 0.6})


@both
def test_a_model_cut_off_before_its_class_token_returns_the_grid(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    model.prune_intermediate_layers([1], prune_head=True)
    assert model.forward_features(x).shape == (2, 64, 48)
