"""The invariants of token merging, over every kind of model that the ViT adapter serves."""

import copy

import pytest
import timm
import torch
from families import fingerprint
from models import DEPTH, IMAGE_SIZE, KINDS, TIMM_KINDS, images, make
from torch import nn

from token_merge_plugin import apply, remove
from token_merge_plugin.method import reduction
from token_merge_plugin.trial.counting import count_macs

ALL = [*KINDS, *TIMM_KINDS]
every_kind = pytest.mark.parametrize("kind", ALL)
every_small_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_kind
def test_keep_rate_one_is_the_unpatched_model(kind):
    model = make(kind)
    x = images(model)
    expected, before = model(x), fingerprint(model)
    apply(model, 1.0)
    assert torch.equal(model(x), expected)
    assert fingerprint(model) == before


@every_kind
def test_remove_brings_back_the_model_bit_for_bit(kind):
    model = make(kind)
    model.blocks[1].register_forward_hook(lambda *_: None)
    x = images(model)
    expected, before, tensors = model(x), fingerprint(model), copy.deepcopy(model.state_dict())
    apply(model, 0.5)
    assert fingerprint(model) != before
    model(x)
    assert remove(model) is model
    assert fingerprint(model) == before
    assert torch.equal(model(x), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


@every_kind
def test_the_patched_model_has_the_state_dict_keys_of_the_unpatched_one(kind):
    model = make(kind)
    keys = list(model.state_dict())
    assert list(apply(model, 0.5).state_dict()) == keys
    model.load_state_dict(make(kind, seed=1).state_dict(), strict=True)


@every_kind
def test_output_is_finite_and_shaped_like_the_unpatched_models(kind):
    model = make(kind)
    x = images(model)
    features, output = model.forward_features(x), model(x)
    apply(model, 0.6)
    merged_features, merged_output = model.forward_features(x), model(x)
    assert merged_features.shape == features.shape
    assert merged_output.shape == output.shape
    assert torch.isfinite(merged_output).all()
    assert not torch.equal(merged_output, output)
    assert torch.equal(model.forward_head(merged_features), merged_output)


@every_kind
def test_intermediate_features_keep_their_shapes_and_the_last_one_is_the_output(kind):
    model = make(kind)
    x = images(model)
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


@every_kind
def test_fewer_multiply_adds(kind):
    model = make(kind)
    x = images(model, batch=1)
    before = count_macs(model, x)
    assert count_macs(apply(model, 0.6), x) < 0.9 * before


@every_kind
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind):
    model = apply(make(kind), 0.6)
    x = images(model, batch=3)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


@every_small_kind
@pytest.mark.parametrize("option", ["importance", "similarity", "distinctiveness", "multi_scale"])
def test_merging_equal_tokens_changes_nothing(kind, option):
    """With patches of a few kinds and no position, tokens are equal in all layers: merging them loses nothing."""
    options = {
        "importance": {"importance": "uniform"},
        "similarity": {"similarity": "keys"},
        "distinctiveness": {},
        "multi_scale": {"multi_scale": "off"},
    }[option]
    model = make(kind)
    if kind == "hybrid":
        model.patch_embed.backbone = nn.Conv2d(3, 8, 2, 2)
    model.pos_embed.zero_()
    kinds = torch.randn(2, 3, 5, 4, 4)
    which = torch.cat([torch.randperm(5), torch.randint(0, 5, (59,))])[torch.randperm(64)]
    x = kinds[:, :, which].unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, IMAGE_SIZE, IMAGE_SIZE)
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


@every_small_kind
@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_unfused_attention_agree(kind, fused):
    model = apply(make(kind), 0.6)
    x = images(model)
    expected = model(x)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def padded(model, x):
    """Return a key mask that hides the lower half of the images, and images that differ there."""
    tokens = model.num_prefix_tokens + 64
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    mask[..., -32:] = False
    other = x.clone()
    other[:, :, IMAGE_SIZE // 2 :] += 5
    return mask, other


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dynamic", "hybrid")])
@pytest.mark.parametrize("as_bool", [True, False])
@pytest.mark.parametrize("proportional_attention", [True, False])
def test_patches_that_a_mask_hides_do_not_reach_the_others(kind, as_bool, proportional_attention):
    model = apply(make(kind), 0.7, proportional_attention=proportional_attention)
    x = images(model)
    mask, other = padded(model, x)
    if not as_bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    seen = slice(0, model.num_prefix_tokens + 32)
    features = [model.forward_features(y, attn_mask=mask)[:, seen] for y in (x, other)]
    rows = model.forward_features(x, attn_mask=mask[:, :, :1])  # the same for every query
    torch.testing.assert_close(rows[:, seen], features[0])
    assert torch.isfinite(features[0]).all()
    torch.testing.assert_close(features[0], features[1])


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dynamic", "hybrid")])
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
    x = images(model)
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
    x = images(model)
    other = x.clone()
    other[..., -1, -1] += 10
    last, changed = (model.forward_features(y, is_causal=True)[:, -1] for y in (x, other))
    assert (changed - last).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 16), (4, 8), (4, 4)])
def test_dynamic_image_sizes_down_to_one_token(size):
    model = make("dynamic")
    x = torch.randn(2, 3, *size)
    expected = model.forward_features(x)
    merged = apply(model, 0.5).forward_features(x)
    assert merged.shape == expected.shape
    assert torch.isfinite(merged).all()
    if size == (4, 4):  # one token: nothing to merge
        torch.testing.assert_close(merged, expected)


def test_patch_dropout_in_training_leaves_the_sequence_as_long_as_unpatched():
    model = make("Block", patch_drop_rate=0.5).train()
    x = images(model)
    shape = model.forward_features(x).shape
    assert apply(model, 0.5).forward_features(x).shape == shape == (2, 33, 32)


def test_both_prefix_tokens_of_a_distilled_deit_count():
    plan = apply(make("distilled"), 0.5, importance="class_attention")._token_merge.plan
    assert plan.num_prefix_tokens == plan.class_queries == 2


@pytest.mark.parametrize(
    ("kind", "class_tokens"),
    [("Block", 1), ("distilled", 2), ("register tokens", 1), ("class token, avg", 1)],
)
def test_the_class_tokens_say_what_matters_only_where_that_is_asked_for(kind, class_tokens):
    def queries(**options):
        return apply(make(kind), 0.5, **options)._token_merge.plan.class_queries

    assert queries() == 0
    assert queries(importance="class_attention") == queries(method="evit") == queries(method="prune") == class_tokens
    assert queries(importance="uniform") == queries(method="tome") == 0


@pytest.mark.parametrize("masked", [False, True])
def test_importance_is_the_attention_that_tokens_receive_from_16_of_them(masked):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 2, 41, 8)  # a class token and 40 image tokens
    bias = torch.randn(2, 1, 41, 41) if masked else None
    attention = (query @ key.transpose(2, 3) * 0.5 + (0 if bias is None else bias)).softmax(3)
    rows = [1 + (2 * j + 1) * 40 // 32 for j in range(16)]
    expected = attention[:, :, rows, 1:].mean(dim=(1, 2))
    plan = apply(make(), 0.5)._token_merge.plan
    identity = torch.arange(40).expand(2, -1)
    before = reduction.Merged(torch.ones(2, 40), identity, identity)
    evidence = [reduction.Evidence(query, key, key, 0.5, bias)]
    stage = reduction.Stage(plan, reduction.Pass(40, 1), 2, torch.zeros(2, 40, 16), before, evidence)
    torch.testing.assert_close(reduction._attention_received(stage), expected)


def test_register_tokens_are_neither_scored_nor_merged():
    model = apply(make("register tokens"), 0.5)
    seen = []
    model.blocks[DEPTH - 2].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model(images(model))
    assert seen == [5 + 16]  # a class token, 4 registers, and 64 patches halved twice


@pytest.mark.parametrize("kind", ["Block", "no class token, avg"])
@pytest.mark.parametrize("importance", ["auto", "uniform"])
@pytest.mark.parametrize("similarity", ["tokens", "keys", "values"])
@pytest.mark.parametrize("multi_scale", ["off", "importance", "descriptors"])
def test_every_option_runs(kind, importance, similarity, multi_scale):
    model = make(kind)
    x = images(model)
    shape = model(x).shape
    for distinctiveness in (True, False):
        options = {"similarity": similarity, "multi_scale": multi_scale, "distinctiveness": distinctiveness}
        out = apply(model, 0.5, importance=importance, **options)(x)
        assert out.shape == shape
        assert torch.isfinite(out).all()


def test_a_full_sized_deit_has_the_published_counts():
    model = timm.create_model("deit_small_patch16_224")
    x = torch.randn(1, 3, 224, 224)
    full = count_macs(model, x)
    assert round(full / 1e9, 1) == 4.6
    for rate, most in ((0.9, 4.1), (0.8, 3.6), (0.7, 3.1), (0.6, 2.7), (0.5, 2.4)):
        assert count_macs(apply(model, rate), x) / 1e9 <= most
    assert count_macs(apply(model, 0.7), x) <= 0.67 * full
