"""Small models of every kind that the ViT adapter serves, with random weights."""

from functools import partial

import timm
import torch
from timm.layers import Attention, HybridEmbed, LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffAttention,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

IMAGE_SIZE = 32
PATCHES = 64
DEPTH = 4


def stem(**kwargs):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    backbone.num_features = 8
    return HybridEmbed(
        backbone,
        feature_size=(IMAGE_SIZE // 2, IMAGE_SIZE // 2),
        feature_ratio=2,
        **kwargs | {"patch_size": 2},
    )


KINDS = {
    "Block": {},
    "LayerScale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "gated": {"attn_layer": partial(Attention, gated=True)},
    "ResPostBlock": {"block_fn": ResPostBlock, "init_values": 0.5},
    "ParallelScalingBlock": {"block_fn": ParallelScalingBlock},
    "ParallelScalingBlock, no bias, fused": {
        "block_fn": partial(ParallelScalingBlock, fuse_out_proj=True),
        "qkv_bias": False,
        "qk_norm": True,
    },
    "ParallelThingsBlock": {"block_fn": ParallelThingsBlock, "init_values": 0.1},
    "DiffParallelScalingBlock": {"block_fn": DiffParallelScalingBlock, "qk_norm": True},
    "DiffAttention": {"attn_layer": "diff"},
    "DiffAttention, two lambdas": {"attn_layer": partial(DiffAttention, dual_lambda=True), "qk_norm": True},
    "register tokens": {"reg_tokens": 4, "no_embed_class": True},
    "no class token, avg": {"class_token": False, "global_pool": "avg"},
    "no class token, map": {"class_token": False, "global_pool": "map"},
    "no class token, no pool": {"class_token": False, "global_pool": "", "num_classes": 0},
    "no class token, prr": {"class_token": False, "global_pool": "prr"},
    "class token, avg": {"global_pool": "avg"},
    "class token, no pool": {"global_pool": ""},
    "pre_norm": {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)},
    "dynamic": {"dynamic_img_size": True},
    "hybrid": {"embed_layer": stem},
    "distilled": {"model_class": VisionTransformerDistilled},
}

TIMM_KINDS = {
    "ViTamin": ("vitamin_small_224", {"img_size": 64}),
    "ResNet hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
    "test_vit": ("test_vit", {}),
    "test_vit2": ("test_vit2", {}),
    "test_vit3": ("test_vit3", {}),
    "test_vit4": ("test_vit4", {}),
}


def attn_layer_as_class(options):
    """timm asks for a class as attn_layer: make a subclass of a partial."""
    layer = options.get("attn_layer")
    if isinstance(layer, partial):
        fixed, base = layer.keywords, layer.func

        def init(self, *args, **kwargs):
            base.__init__(self, *args, **kwargs, **fixed)

        options = options | {"attn_layer": type(base.__name__, (base,), {"__init__": init})}
    return options


def make(kind="Block", seed=0, **changes):
    torch.manual_seed(seed)
    if kind in TIMM_KINDS:
        name, options = TIMM_KINDS[kind]
        return timm.create_model(name, **options | changes).eval()
    options = {
        "img_size": IMAGE_SIZE,
        "patch_size": 4,
        "num_classes": 5,
        "embed_dim": 32,
        "depth": DEPTH,
        "num_heads": 2,
        "block_fn": Block,
    } | attn_layer_as_class(KINDS[kind] | changes)
    model = options.pop("model_class", VisionTransformer)(**options)
    return model.eval()


def images(model, batch=2, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, *getattr(model.patch_embed, "img_size", (IMAGE_SIZE, IMAGE_SIZE)))
