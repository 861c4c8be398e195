"""NaFlexVit on batches of mixed sizes: padding is no token, and each image gets what it gets alone."""

import pytest
import torch
from checks import set_fused_attention, shapes
from families import FAMILIES, make
from timm.models.naflexvit import batch_patchify, create_attention_mask

from token_merge_plugin import apply, remove
from token_merge_plugin.trial.counting import count_macs

every_kind = pytest.mark.parametrize("kind", FAMILIES["naflexvit"])


def mixed(seed=0, number=4, length=64, noise=0.0):
    """Return a batch of patches of images of up to 8x8 patches, padded with noise to a common length."""
    generator = torch.Generator().manual_seed(seed)
    patches = noise * torch.randn(number, length, 768)
    patch_coord = torch.zeros(number, length, 2, dtype=torch.long)
    patch_valid = torch.zeros(number, length, dtype=torch.bool)
    for i in range(number):
        height, width = torch.randint(1, 9, (2,), generator=generator).tolist()
        count = height * width
        patches[i, :count] = torch.randn(count, 768, generator=generator)
        patch_coord[i, :count] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        patch_valid[i, :count] = True
    return {"patches": patches, "patch_coord": patch_coord, "patch_valid": patch_valid}


def alone(batch, i):
    """Return image i of the batch without its padding."""
    count = batch["patch_valid"][i].sum()
    return {name: tensor[i : i + 1, :count] for name, tensor in batch.items()}


def features(model, batch):
    """Return the features of the real tokens of each image: of the prefix tokens, and of the patches."""
    result = model.forward_features(**batch)
    tokens, prefix = result["patches"], model.num_prefix_tokens
    assert torch.equal(result["patch_valid"], batch["patch_valid"])
    return [torch.cat((x[:prefix], x[prefix:][valid])) for x, valid in zip(tokens, batch["patch_valid"], strict=True)]


@every_kind
@pytest.mark.parametrize("keep_rate", [0.6, 0.7])
@torch.no_grad()
def test_an_image_of_a_mixed_batch_gets_what_it_gets_alone(kind, keep_rate):
    model = apply(make(kind), keep_rate)
    for seed in range(4):
        batch = mixed(seed)
        output, tokens = model(batch), features(model, batch)
        for i in range(len(output)):
            single = alone(batch, i)
            torch.testing.assert_close(output[i : i + 1], model(single), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(tokens[i], features(model, single)[0], rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_neither_the_amount_of_padding_nor_what_is_in_it_matters(kind):
    model = apply(make(kind), 0.6)
    expected = features(model, mixed()), model(mixed())
    for length, noise in ((64, 30.0), (71, 30.0), (140, 1.0)):
        batch = mixed(length=length, noise=noise)
        torch.testing.assert_close((features(model, batch), model(batch)), expected, rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_an_image_gets_what_its_patches_get(kind):
    model = apply(make(kind), 0.6)
    images = torch.randn(2, 3, 64, 96)
    patches, (height, width) = batch_patchify(images, (16, 16))
    coord = torch.cartesian_prod(torch.arange(height), torch.arange(width)).expand(2, -1, -1)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(model(images), model(patches, coord, valid), rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_a_mask_for_all_pairs_hides_padding_as_well(kind):
    model = apply(make(kind), 0.6)
    batch = mixed(seed=1)
    expected = features(model, batch)
    mask = create_attention_mask(batch["patch_valid"], model.num_prefix_tokens)
    for attn_mask in (mask, mask == 0, mask.clamp(min=torch.finfo(torch.half).min)):
        torch.testing.assert_close(features(model, batch | {"attn_mask": attn_mask}), expected, rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_mixed_sizes_keep_the_shapes_and_the_unpatched_model_comes_back(kind):
    model, batch = make(kind), mixed()

    def outputs():
        options = {"output_fmt": "NLC", "output_dict": True, "return_prefix_tokens": True}
        return [model(batch), model.forward_features(**batch), model.forward_intermediates(batch, **options)]

    expected, macs = outputs(), count_macs(model, batch)
    apply(model, 1.0)
    torch.testing.assert_close(outputs(), expected, rtol=0, atol=0)
    apply(model, 0.6)
    merged = outputs()
    assert shapes(merged) == shapes(expected)
    assert not torch.equal(merged[0], expected[0])
    torch.testing.assert_close(merged[2]["image_features"], merged[1]["patches"])
    assert count_macs(model, batch) < 0.9 * macs
    remove(model)
    torch.testing.assert_close(outputs(), expected, rtol=0, atol=0)


@every_kind
def test_gradients_reach_all_real_patches_and_no_padding(kind):
    model, batch = apply(make(kind), 0.6), mixed(noise=1.0)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        patches = batch["patches"].clone().requires_grad_()
        model(batch | {"patches": patches}).square().sum().backward()
        gradients.append(patches.grad)
    torch.testing.assert_close(*gradients)
    assert torch.isfinite(gradients[0]).all()
    reached = gradients[0].abs().sum(dim=2) > 0
    assert not reached[~batch["patch_valid"]].any()
    assert reached[batch["patch_valid"]].float().mean() > 0.5  # a maximum does not read all patches


@every_kind
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_mixed_sizes_under_autocast_are_finite(kind, fused):
    model, batch = apply(make(kind), 0.6), mixed()
    expected = model(batch)
    set_fused_attention(model, fused)
    torch.testing.assert_close(model(batch), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(batch)).all()


@every_kind
@torch.no_grad()
def test_an_image_without_patches_leaves_the_others_alone(kind):
    model, batch = apply(make(kind), 0.6), mixed()
    expected = model(batch)
    batch["patch_valid"][-1] = False
    assert torch.isfinite(model.forward_features(**batch)["patches"]).all()
    torch.testing.assert_close(model(batch)[:-1], expected[:-1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_mixed_sizes_compile_without_a_graph_break():
    torch._dynamo.reset()
    model, batch = make("NaFlexViT"), mixed()
    model.embeds.pos_embed_use_grid_sample = True  # timm's own way around a break
    compiled = torch.compile(apply(model, 0.6), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-3, atol=1e-4)
