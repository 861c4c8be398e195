"""SAM and Hiera, beyond what `test_families.py` asks of every family."""

import pytest
import timm
import timm.models.vision_transformer_sam as sam
import torch
from families import images, make

from token_merge_plugin import ConfigError, UnsupportedModelError, apply
from token_merge_plugin.trial.counting import count_macs


@torch.no_grad()
def test_sam_takes_images_of_other_sizes():
    """Positions are then interpolated, and the padding of the windows differs between height and width."""
    model, x = make("SAM"), torch.randn(2, 3, 112, 192)
    expected, features, macs = model(x), model.forward_features(x), count_macs(model, x)
    torch.testing.assert_close(apply(model, 0.99999)(x), expected, rtol=1e-5, atol=1e-5)
    apply(model, 0.6)
    assert model.forward_features(x).shape == features.shape
    assert count_macs(model, x) < 0.8 * macs


@torch.no_grad()
def test_sam_position_bias_is_that_of_the_representatives():
    model, x = make("SAM"), images("SAM")
    attention = model.blocks[1].attn
    seen = []

    def compare(module, args):
        state = module._token_merge.plan.current()
        query = torch.randn(2, module.num_heads, 100, module.head_dim)
        position = state.merged.representative
        taken = query.gather(2, position[:, None, :, None].expand(-1, module.num_heads, -1, module.head_dim))
        bias = sam.get_decomposed_rel_pos_bias(
            query.flatten(0, 1), module.rel_pos_h, module.rel_pos_w, (10, 10), (10, 10)
        )
        expected = state.position_bias(bias.unflatten(0, (2, -1)))
        torch.testing.assert_close(module.position_bias(taken, state.grid_size, position), expected)
        seen.append(position.shape)

    apply(model, 0.6)
    attention.register_forward_pre_hook(compare)
    model(x)
    assert seen == [(2, 60)]


@torch.no_grad()
def test_hiera_merges_only_where_attention_is_over_all_tokens():
    model = make("Hiera")  # stages of 1, 1, 6 and 2 blocks, of which all but the first begin with a pooling
    for block in (0, 1, 2, 8):
        with pytest.raises(ConfigError, match="Choose from blocks 3, 4, 5, 6, 7, 9"):
            apply(model, 0.7, stages=(block,))
    apply(model, {5: 0.7, 9: 0.5})
    tokens = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    model(images("Hiera"))
    assert tokens == [1024, 256, 64, 64, 64, 45, 45, 45, 16, 8]


@torch.no_grad()
def test_hiera_without_some_mask_units():
    """As in masked pretraining: what is there is merged."""
    model, x = make("Hiera"), images("Hiera")
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, ::2] = mask[1, :8] = True
    expected, intermediates = model.forward_features(x, mask=mask, return_intermediates=True)
    unmerged = apply(model, 0.99999)(x, mask=mask)
    torch.testing.assert_close(unmerged, expected, rtol=1e-5, atol=1e-5)
    output, merged = apply(model, 0.6).forward_features(x, mask=mask, return_intermediates=True)
    assert output.shape == expected.shape
    assert [part.shape for part in merged] == [part.shape for part in intermediates]
    assert not torch.equal(output, expected)


@torch.no_grad()
def test_hiera_intermediates_within_a_section_are_whole_grids():
    model, x = make("Hiera"), images("Hiera")
    expected = model.forward_intermediates(x, coarse=False, intermediates_only=True)
    merged = apply(model, 0.6).forward_intermediates(x, coarse=False, intermediates_only=True)
    assert [part.shape for part in merged] == [part.shape for part in expected]
    for part, whole in zip(merged[:3], expected, strict=False):
        assert torch.equal(part, whole)  # nothing is merged yet


@torch.no_grad()
def test_hiera_cut_within_a_section_can_be_patched():
    model, x = make("Hiera"), images("Hiera")
    model.prune_intermediate_layers([5], coarse=False)
    shape = model.forward_features(x).shape
    assert apply(model, 0.6).forward_features(x).shape == shape
    assert model._token_merge.plan.sections == (range(3, 6),)


def test_hiera_with_mask_unit_attention_throughout_is_refused():
    options = {"img_size": 128, "embed_dim": 24, "stages": (1, 1, 2, 1), "mask_unit_attn": (True,) * 4}
    model = timm.create_model("hiera_tiny_224", **options)
    with pytest.raises(UnsupportedModelError, match="within mask units"):
        apply(model, 0.7)


def test_hiera_does_not_tell_which_tokens_are_neighbours():
    with pytest.raises(ConfigError, match="neighbours"):
        apply(make("Hiera"), 0.7, multi_scale="importance")
