import pytest
import torch
from families import images, make
from timm.models.vision_transformer import VisionTransformer

from token_merge_plugin import MergeConfig, apply
from token_merge_plugin.trial.counting import count_macs, vit_macs


@pytest.mark.parametrize("keep_rate", [1.0, 0.9, 0.7, 0.5, (0.9, 0.6, 0.3), {0: 0.5, 5: 0.5}, 0.01])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 4])
def test_the_closed_formula_is_what_torch_counts(keep_rate, class_token, reg_tokens):
    model = VisionTransformer(
        img_size=48,
        patch_size=4,
        embed_dim=24,
        depth=6,
        num_heads=2,
        mlp_ratio=3,
        num_classes=7,
        class_token=class_token,
        reg_tokens=reg_tokens,
        no_embed_class=True,
        global_pool="token" if class_token else "avg",
    ).eval()
    counted = count_macs(apply(model, keep_rate), torch.randn(1, 3, 48, 48))
    formula = vit_macs(
        num_patches=144,
        embed_dim=24,
        depth=6,
        schedule=MergeConfig(keep_rate).amounts(6),
        num_prefix_tokens=class_token + reg_tokens,
        num_class_tokens=int(class_token),
        mlp_ratio=3,
        patch_dim=48,
        num_classes=7,
    )
    assert counted == formula


def test_macs_are_per_image():
    model = make()
    assert count_macs(model, images(batch=1)) == count_macs(model, images(batch=3))


def test_counting_leaves_the_model_as_it_was():
    model = make().train()
    model.blocks[0].eval()
    parameters = dict(model.named_parameters())
    count_macs(model, images())
    assert model.training
    assert not model.blocks[0].training
    assert model.blocks[1].training
    assert all(p is parameters[name] and p.requires_grad for name, p in model.named_parameters())
