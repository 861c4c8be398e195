"""What holds for the ViTs of timm, on a grid of 8 x 8 patches: `test_families.py` holds the rest."""

import pickle

import pytest
import timm
import torch
from checks import equal_patches
from families import DEPTH, FAMILIES, IMAGE_SIZE, SMALL_VITS, images, make
from torch import nn

from token_merge_plugin import MergeConfig, PatchStateError, apply
from token_merge_plugin.patching import plans_of
from token_merge_plugin.trial.counting import count_macs

every_kind = pytest.mark.parametrize("kind", FAMILIES["vit"])
every_small_kind = pytest.mark.parametrize("kind", SMALL_VITS)
# A hybrid's convolutions see the neighbours of a patch.
every_kind_of_separate_patches = pytest.mark.parametrize("kind", [kind for kind in SMALL_VITS if kind != "ViT, hybrid"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_kind
def test_intermediate_features_keep_their_shapes_and_the_last_one_is_the_output(kind):
    model = make(kind)
    x = images(kind)
    expected = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
    shapes = [tuple(part.shape for part in pair) for pair in zip(*expected[1], strict=True)]
    apply(model, 0.6)
    final, intermediates = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
    assert [tuple(part.shape for part in pair) for pair in zip(*intermediates, strict=True)] == shapes
    torch.testing.assert_close(final, model.forward_features(x))
    for only in ([0], [1, 2], 1):
        maps = model.forward_intermediates(x, indices=only, intermediates_only=True, stop_early=True)
        assert all(m.dim() == 4 for m in maps)
    layers = model.get_intermediate_layers(x, n=2, reshape=True, norm=True)
    assert [layer.shape for layer in layers] == [maps[0].shape] * 2
    torch.testing.assert_close(model.forward_features(x), final)


@every_small_kind
@pytest.mark.parametrize("option", ["importance", "similarity", "multi_scale"])
def test_merging_equal_tokens_changes_nothing(kind, option):
    """With patches of a few kinds and no position, tokens are equal in all layers: merging them loses nothing."""
    options = {
        "importance": {"importance": "uniform"},
        "similarity": {"similarity": "keys"},
        "multi_scale": {"multi_scale": "off"},
    }[option]
    model = make(kind)
    if kind == "ViT, hybrid":
        model.patch_embed.backbone = nn.Conv2d(3, 8, 2, 2)
    model.pos_embed.zero_()
    x = equal_patches(patch_size=4)
    expected = model.forward_features(x)
    apply(model, {0: 0.5, 1: 0.5, 3: 0.35}, **options)  # 64 -> 32 -> 16 -> 6 tokens
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-3, atol=1e-4)


def test_without_proportional_attention_merging_equal_tokens_does_change_the_output():
    model = make()
    model.pos_embed.zero_()
    for parameter in model.parameters():
        parameter.mul_(3)
    x = torch.randn(1, 3, 4, 4).repeat(1, 1, 8, 8)
    x[:, :, 16:, :4] = 1
    expected = model(x)
    apply(model, {1: 0.1}, proportional_attention=False)
    assert (model(x) - expected).abs().max() > 1e-3
    apply(model, {1: 0.1})
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def padded(model, x):
    """Return a key mask that hides the lower half of the images, and images that differ there."""
    tokens = model.num_prefix_tokens + 64
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    mask[..., -32:] = False
    other = x.clone()
    other[:, :, IMAGE_SIZE // 2 :] += 5
    return mask, other


@every_kind_of_separate_patches
@pytest.mark.parametrize("as_bool", [True, False])
@pytest.mark.parametrize("proportional_attention", [True, False])
def test_patches_that_a_mask_hides_do_not_reach_the_others(kind, as_bool, proportional_attention):
    model = apply(make(kind), 0.7, proportional_attention=proportional_attention)
    x = images(kind)
    mask, other = padded(model, x)
    if not as_bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    seen = slice(0, model.num_prefix_tokens + 32)
    features = [model.forward_features(y, attn_mask=mask)[:, seen] for y in (x, other)]
    rows = model.forward_features(x, attn_mask=mask[:, :, :1])  # the same for every query
    torch.testing.assert_close(rows[:, seen], features[0])
    assert torch.isfinite(features[0]).all()
    torch.testing.assert_close(features[0], features[1])


@every_kind_of_separate_patches
def test_a_mask_on_equal_tokens_gives_what_it_gives_unpatched(kind):
    model = make(kind)
    model.pos_embed.zero_()
    x = torch.randn(2, 3, 4, 4).repeat(1, 1, 8, 8)
    x[:, :, 8:20] = torch.randn(2, 3, 4, 4).repeat(1, 1, 3, 8)
    mask, _ = padded(model, x)
    mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    prefix = model.num_prefix_tokens
    mask[..., prefix : prefix + 8] = 0.5  # a bias that is the same for all of a few patches
    seen = slice(0, prefix + 32)
    expected = model.forward_features(x, attn_mask=mask)[:, seen]
    apply(model, 0.5)
    torch.testing.assert_close(model.forward_features(x, attn_mask=mask)[:, seen], expected, rtol=1e-3, atol=1e-4)


@every_small_kind
def test_causal_attention_is_what_a_causal_mask_gives(kind):
    model = make(kind)
    x = images(kind)
    shape = model.forward_features(x).shape
    apply(model, 0.6)
    tokens = model.num_prefix_tokens + 64
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    features = model.forward_features(x, is_causal=True)
    assert features.shape == shape
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features, model.forward_features(x, attn_mask=mask))
    assert (features - model.forward_features(x)).abs().max() > 1e-3


@every_small_kind
def test_the_last_patch_counts_under_a_causal_mask_though_no_other_sees_it(kind):
    model = apply(make(kind), 0.6)
    x = images(kind)
    other = x.clone()
    other[..., -1, -1] += 10
    last, changed = (model.forward_features(y, is_causal=True)[:, -1] for y in (x, other))
    assert (changed - last).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 16), (4, 8), (4, 4)])
def test_dynamic_image_sizes_down_to_one_token(size):
    model = make("ViT, any image size")
    x = torch.randn(2, 3, *size)
    expected = model.forward_features(x)
    merged = apply(model, 0.5).forward_features(x)
    assert merged.shape == expected.shape
    assert torch.isfinite(merged).all()
    if size == (4, 4):  # one token: nothing to merge
        torch.testing.assert_close(merged, expected)


def test_convolutions_without_positions_take_other_sizes_than_the_models():
    """As the largest ViTamins: timm counts `vitamin_xlarge_336` at 256 px."""
    model = timm.create_model("vitamin_small_224", pos_embed="none", depth=4, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    torch.testing.assert_close(apply(model, 1 - 1e-9)(x), expected, rtol=1e-3, atol=1e-4)
    assert apply(model, 0.6)(x).shape == expected.shape
    model.blocks[0].register_forward_pre_hook(lambda module, args: (torch.cat((args[0][:, :2], *args), dim=1),))
    with pytest.raises(PatchStateError, match="num_prefix_tokens"):
        model(torch.randn(2, 3, 224, 224))


def test_patch_dropout_in_training_leaves_the_sequence_as_long_as_unpatched():
    model, x = make("ViT", patch_drop_rate=0.5).train(), images()
    shape = model.forward_features(x).shape
    assert apply(model, 0.5).forward_features(x).shape == shape == (2, 33, 32)


def test_both_prefix_tokens_of_a_distilled_deit_count():
    plan = apply(make("DeiT, distilled"), 0.5)._token_merge.plan
    assert plan.num_prefix_tokens == plan.num_class_tokens == 2


def test_register_tokens_are_neither_scored_nor_merged():
    model = apply(make("ViT, registers"), 0.5, stages=(1, 2))
    seen = []
    model.blocks[DEPTH - 2].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model(images("ViT, registers"))
    assert seen == [5 + 16]  # a class token, 4 registers, and 64 patches halved twice


@pytest.mark.parametrize("kind", ["ViT", "ViT, no class token, average"])
@pytest.mark.parametrize("importance", ["auto", "uniform"])
@pytest.mark.parametrize("similarity", ["tokens", "mean_keys", "keys", "values"])
@pytest.mark.parametrize("multi_scale", ["off", "importance", "descriptors"])
def test_every_option_runs(kind, importance, similarity, multi_scale):
    model = make(kind)
    x = images(kind)
    shape = model(x).shape
    for schedule in ("equal_numbers", "equal_rates"):
        options = {"similarity": similarity, "multi_scale": multi_scale, "schedule": schedule}
        out = apply(model, 0.5, importance=importance, **options)(x)
        assert out.shape == shape
        assert torch.isfinite(out).all()


def plan_of(kind, img_size, **options):
    (plan,) = plans_of(apply(make(kind, depth=12, img_size=img_size), 0.7, **options))
    return plan


def test_many_patches_are_compared_by_mean_keys():
    few, plan = plan_of("ViT", 108), plan_of("ViT", 112)  # 27 x 27 and 28 x 28 patches
    assert (few.similarity, list(few.schedule)) == ("tokens", [1, 3, 5, 7])
    assert (plan.similarity, list(plan.schedule)) == ("mean_keys", [1, 3, 5, 7])
    assert plan.config == MergeConfig(0.7)
    assert pickle.loads(pickle.dumps(plan)).similarity == "mean_keys"
    for options, expected in (
        ({"similarity": "tokens"}, ("tokens", [1, 3, 5, 7])),
        ({"schedule": "equal_rates"}, ("mean_keys", [3, 6, 9])),
        ({"multi_scale": "learned"}, ("mean_keys", [3, 6, 9])),
    ):
        plan = plan_of("ViT", 112, **options)
        assert (plan.similarity, list(plan.schedule)) == expected


@pytest.mark.parametrize(
    ("kind", "size"), [("ViT, any image size", 112), ("DINOv3", 448), ("BEiT", 448), ("relative position, MLP", 448)]
)
def test_positions_in_keys_and_biases_and_unknown_grids_leave_tokens_to_be_compared(kind, size):
    plan = plan_of(kind, size)
    assert (plan.similarity, list(plan.schedule)) == ("tokens", [1, 3, 5, 7])


def test_a_plan_of_a_former_version_compares_what_its_config_says():
    plan = plan_of("ViT", IMAGE_SIZE)
    object.__setattr__(plan.config, "similarity", "keys")
    del plan.__dict__["similarity"]
    assert pickle.loads(pickle.dumps(plan)).similarity == "keys"


def test_a_full_sized_deit_has_the_published_counts():
    model = timm.create_model("deit_small_patch16_224")
    x = torch.randn(1, 3, 224, 224)
    full = count_macs(model, x)
    assert round(full / 1e9, 1) == 4.6
    for rate, most in ((0.9, 4.1), (0.8, 3.6), (0.7, 3.1), (0.6, 2.7), (0.5, 2.4)):
        assert count_macs(apply(model, rate), x) / 1e9 <= most
    assert count_macs(apply(model, 0.7), x) <= 0.67 * full
