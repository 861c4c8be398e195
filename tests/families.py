"""One table of small models, of each kind that is served, with random weights: it drives the checks of every family.

`FAMILIES` has a table for each file of adapters; an entry is the name of a timm model and options that make it small.
`test_families.py` holds all of them to the invariants; the tests of a family take its own. With an older timm than the
newest, `LEFT_OUT` has what is not in the tables, with the reason, which pytest prints above the tests.
"""

from functools import partial

import timm
import torch
from timm.layers import HybridEmbed, LayerNorm
from timm.models import vision_transformer
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

import token_merge_plugin  # noqa: F401  (registers LV-ViT with timm)
from token_merge_plugin import adapters

TIMM = adapters.numbers(timm.__version__)

DEPTH = 4
SMALL = {"embed_dim": 48, "depth": DEPTH, "num_heads": 4, "num_classes": 5}

# The ViTs that tests outside of the table take as well: 8 x 8 patches of 4 x 4 pixels.
IMAGE_SIZE = 32
SMALL_VIT = {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
GEMMA = {"head_dim": 12, "intermediate_size": 96, "position_embedding_size": 16, "img_size": 144}

TNT = {"embed_dim": 48, "depth": 4, "num_heads_outer": 4, "inner_dim": 12, "num_heads_inner": 2, "num_classes": 5}
STEPS = {"embed_dims": (48, 96), "depths": (1, 1), "num_heads": (2, 4)}

SMALL_SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "img_size": 112}
# A size that windows do not divide, which older versions of timm do not take.
SMALL_SWIN_V2 = SMALL_SWIN | {"img_size": 112 if TIMM >= [1, 0, 31] else 128}

SMALL_MAXX = {
    "embed_dim": (16, 16, 64, 64),
    "depths": (1, 1, 2, 1),
    "stem_width": (8, 16),
    "transformer_dim_head": 8,
    "conv_expand_ratio": 1,
    "num_classes": 5,
}


# Where timm lacks these, the models with them are left out below.
DiffAttention = getattr(vision_transformer, "DiffAttention", Attention)
DiffParallelScalingBlock = getattr(vision_transformer, "DiffParallelScalingBlock", ParallelScalingBlock)


class GatedAttention(Attention):
    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


class AttentionOfTwoLambdas(DiffAttention):
    def __init__(self, *args, **options):
        super().__init__(*args, dual_lambda=True, **options)


def stem(**options):
    """Return an embedding with convolutions in front of the patches."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    backbone.num_features = 8
    feature_size = (IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    return HybridEmbed(backbone, feature_size=feature_size, feature_ratio=2, **options | {"patch_size": 2})


def vit(name="vit_tiny_patch16_224", **options):
    return name, SMALL_VIT | options


SMALL_VITS = {
    "ViT": vit(),
    "ViT, layer scale": vit(init_values=0.1),
    "ViT, norms of queries and keys": vit(qk_norm=True),
    "ViT, norms within attention and MLP": vit(scale_attn_norm=True, scale_mlp_norm=True),
    "ViT, gated attention": vit(attn_layer=GatedAttention),
    "ViT, post-norm": vit(block_fn=ResPostBlock, init_values=0.5),
    "ViT, parallel": vit(block_fn=ParallelScalingBlock),
    "ViT, parallel, no bias, fused projection": vit(
        block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False, qk_norm=True
    ),
    "ViT, parallel pairs": vit(block_fn=ParallelThingsBlock, init_values=0.1),
    "ViT, parallel, differential attention": vit(block_fn=DiffParallelScalingBlock, qk_norm=True),
    "ViT, differential attention": vit(attn_layer="diff"),
    "ViT, differential attention, two lambdas": vit(attn_layer=AttentionOfTwoLambdas, qk_norm=True),
    "ViT, registers": vit(reg_tokens=4, no_embed_class=True),
    "ViT, no class token, average": vit(class_token=False, global_pool="avg"),
    "ViT, no class token, attention pool": vit(class_token=False, global_pool="map"),
    "ViT, no class token, no pool": vit(class_token=False, global_pool="", num_classes=0),
    "ViT, no class token, prr pool": vit(class_token=False, global_pool="prr"),
    "ViT, average": vit(global_pool="avg"),
    "ViT, no pool": vit(global_pool=""),
    "ViT, pre-norm": vit(pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5)),
    "ViT, any image size": vit(dynamic_img_size=True),
    "ViT, hybrid": vit(embed_layer=stem),
    "DeiT, distilled": vit("deit_tiny_distilled_patch16_224"),
}

# In the order of `token_merge_plugin.adapters.FAMILIES`.
FAMILIES = {
    "vit": SMALL_VITS
    | {
        "EVA": ("eva_large_patch14_196", SMALL | {"img_size": 112}),
        "ViTamin": ("vitamin_small_224", {"img_size": 64, "depth": DEPTH}),
        "ViT behind a ResNet": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 6}),
        "test_vit": ("test_vit", {"img_size": 160}),
        "test_vit2": ("test_vit2", {"img_size": 160}),
        "test_vit3": ("test_vit3", {"img_size": 160}),
        "test_vit4": ("test_vit4", {"img_size": 160}),
    },
    "eva": {
        "EVA-02": ("eva02_tiny_patch14_224", SMALL | {"img_size": 112}),
        "EVA-02 CLIP": ("eva02_base_patch16_clip_224", SMALL | {"img_size": 128}),
        "EVA-02, separate qkv": ("eva02_large_patch14_224", SMALL | {"img_size": 112}),
        "RoPE ViT, axial": ("vit_small_patch16_rope_224", SMALL | {"img_size": 128}),
        "RoPE ViT, mixed": ("vit_small_patch16_rope_mixed_224", SMALL | {"img_size": 128}),
        "RoPE ViT, mixed and absolute": ("vit_small_patch16_rope_mixed_ape_224", SMALL | {"img_size": 128}),
        "RoPE ViT, registers, gap": ("vit_mediumd_patch16_rope_reg1_gap_256", SMALL | {"img_size": 128}),
        "DINOv3": ("vit_small_patch16_dinov3", SMALL | {"img_size": 128}),
        "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3", SMALL | {"img_size": 128}),
        "Sapiens": ("vit_base_patch16_sapiens2", SMALL | {"img_size": 128, "num_kv_heads": (None, 2, 2, None)}),
        "Perception Encoder": ("vit_pe_core_tiny_patch16_384", SMALL | {"img_size": 128}),
        "Perception Encoder, spatial": ("vit_pe_spatial_tiny_patch16_512", SMALL | {"img_size": 128}),
    },
    "beit": {
        "BEiT": ("beit_base_patch16_224", SMALL | {"img_size": 128}),
        "BEiT-2": ("beitv2_base_patch16_224", SMALL | {"img_size": 128}),
        "BEiT, shared bias": (
            "beit_base_patch16_224",
            SMALL | {"img_size": 128, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        ),
    },
    "relpos": {
        "relative position, MLP": ("vit_relpos_small_patch16_224", SMALL | {"img_size": 128}),
        "relative position, post-norm": ("vit_relpos_base_patch16_rpn_224", SMALL | {"img_size": 128}),
        "relative position, shared": ("vit_srelpos_small_patch16_224", SMALL | {"img_size": 128}),
        "relative position, class token": ("vit_relpos_medium_patch16_cls_224", SMALL | {"img_size": 128}),
        "relative position, class token, avg": ("vit_relpos_base_patch16_clsgap_224", SMALL | {"img_size": 128}),
    },
    "naflexvit": {
        "NaFlexViT": ("naflexvit_base_patch16_gap", SMALL | {"img_size": 128}),
        "NaFlexViT, attention pool": ("naflexvit_base_patch16_map", SMALL | {"img_size": 128}),
        "NaFlexViT, class token, all pooled": (
            "naflexvit_base_patch16_map",
            SMALL | {"img_size": 128, "class_token": True, "pool_include_prefix": True},
        ),
        "NaFlexViT, no prefix tokens, factorized, maximum": (
            "naflexvit_base_patch16_parfac_gap",
            SMALL | {"img_size": 128, "reg_tokens": 0, "global_pool": "max"},
        ),
        "NaFlexViT, RoPE alone": (
            "naflexvit_base_patch16_gap",
            SMALL | {"img_size": 128, "rope_type": "axial", "pos_embed": "none"},
        ),
        "NaFlexViT, differential attention": (
            "naflexvit_base_patch16_gap",
            SMALL | {"img_size": 128, "attn_layer": "diff"},
        ),
        "NaFlexViT, grouped queries, RoPE, gated": (
            "naflexvit_base_patch16_gap",
            SMALL | {"img_size": 128, "rope_type": "axial", "qkv_fused": False, "num_kv_heads": 2, "attn_gated": True},
        ),
        "RADIO": ("naflexvit_base_patch16_radio_v3", SMALL | {"img_size": 128, "pos_embed_grid_size": (16, 16)}),
        "NaFlexViT of a ViT": ("vit_small_patch16_224", SMALL | {"img_size": 128, "use_naflex": True}),
        "NaFlexViT of a RoPE ViT, mixed": (
            "vit_small_patch16_rope_mixed_224",
            SMALL | {"img_size": 128, "use_naflex": True},
        ),
    },
    "cait": {
        "CaiT": ("cait_xxs24_224", SMALL | {"img_size": 128}),
    },
    "convit": {
        "ConViT": ("convit_tiny", SMALL | {"embed_dim": 12, "local_up_to_layer": 3, "img_size": 128}),
    },
    "gemma4_vit": {
        "Gemma 4": ("gemma4_vit_167m", SMALL | GEMMA),
        "Gemma 4, encoder": ("gemma4_vit_570m_enc", SMALL | GEMMA | {"num_kv_heads": 2}),
    },
    "qwen3_vit": {
        "Qwen3": ("qwen3_vit_88m", SMALL | {"img_size": 128}),
        "Qwen3, merger": ("qwen3_vit_88m_merge", SMALL | {"img_size": 128, "out_features": 16}),
        "Qwen3, encoder": ("qwen3_vit_88m_enc", SMALL | {"img_size": 128, "out_features": 16}),
    },
    "deepseek_vit": {
        "DeepSeek": ("deepseek_vit_412m", SMALL | {"img_size": 126}),
        "DeepSeek, aligner": ("deepseek_vit_412m_align", SMALL | {"img_size": 126, "out_features": 16}),
        "DeepSeek, encoder": ("deepseek_vit_412m_enc", SMALL | {"img_size": 126, "out_features": 16}),
    },
    "lvvit": {
        "LV-ViT": (
            "lvvit_s",
            {"img_size": 128, "num_classes": 5, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "stem_chs": 4},
        ),
    },
    "volo": {
        "VOLO": ("volo_d1_224", {"img_size": 64, "mlp_ratio": 1.0, "stem_hidden_dim": 16, "num_classes": 5}),
    },
    "pit": {
        "PiT": ("pit_ti_224", {"img_size": 112, "base_dims": (8, 8, 8), "num_classes": 5}),
        "PiT, distilled": ("pit_ti_distilled_224", {"img_size": 112, "base_dims": (8, 8, 8), "num_classes": 5}),
    },
    "hiera": {
        "Hiera": ("hiera_tiny_224", {"img_size": 128, "embed_dim": 24, "stages": (1, 1, 6, 2), "num_classes": 5}),
        "Hiera, absolute windows": (
            "hiera_small_abswin_256",
            {"img_size": 128, "embed_dim": 24, "stages": (1, 2, 5, 1), "num_classes": 5},
        ),
    },
    "crossvit": {
        "CrossViT": (
            "crossvit_9_240",
            {
                "embed_dim": (48, 96),
                "depth": ((1, 3, 0), (1, 2, 0)),
                "num_heads": (2, 4),
                "num_classes": 5,
                "img_size": 120,
            },
        ),
    },
    "swin": {
        "Swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
        "Swin V2": ("swinv2_tiny_window8_256", SMALL_SWIN_V2),
        "Swin V2 cr": ("swinv2_cr_tiny_224", SMALL_SWIN_V2),
        "Swin V2 cr, norms in the residual stream": ("swinv2_cr_tiny_ns_224", SMALL_SWIN_V2 | {"extra_norm_period": 1}),
    },
    "maxxvit": {
        "MaxViT": ("maxvit_nano_rw_256", SMALL_MAXX | {"img_size": 64}),
        "MaxViT, TF": ("maxvit_tiny_tf_224", SMALL_MAXX | {"img_size": 128}),
        "MaxViT, NCHW": (
            "maxvit_rmlp_pico_rw_256",
            SMALL_MAXX | {"img_size": 128, "transformer_use_nchw_attn": True, "transformer_init_values": 0.5},
        ),
        "MaxViT, parallel": ("maxvit_tiny_pm_256", SMALL_MAXX | {"img_size": 128}),
        "MaxxViT": ("maxxvit_rmlp_nano_rw_256", SMALL_MAXX | {"img_size": 128}),
        "MaxxViT V2": ("maxxvitv2_nano_rw_256", SMALL_MAXX | {"img_size": 128}),
        "CoAtNet": ("coatnet_nano_rw_224", SMALL_MAXX | {"img_size": 128}),
        "CoAtNet, of the paper": ("coatnet_0_224", SMALL_MAXX | {"img_size": 128, "head_hidden_size": 16}),
        "CoAtNet, MLP bias": ("coatnet_rmlp_1_rw_224", SMALL_MAXX | {"img_size": 128}),
        "CoAtNet, batch norm": ("coatnet_bn_0_rw_224", SMALL_MAXX | {"img_size": 128}),
        "CoAtNeXt": ("coatnext_nano_rw_224", SMALL_MAXX | {"img_size": 128}),
    },
    "davit": {
        "DaViT": ("davit_tiny", STEPS | {"num_classes": 5}),
        "DaViT of Florence-2": ("davit_base_fl", STEPS | {"num_classes": 5}),
    },
    "gcvit": {
        "GCViT": ("gcvit_xxtiny", {"embed_dim": 16, "layer_scale": 0.5, "num_classes": 5, "img_size": 128}),
    },
    "nest": {
        "NesT": ("nest_tiny_jx", {"num_classes": 5, "img_size": 64}),
    },
    "sam": {
        "SAM": (
            "samvit_base_patch16",
            SMALL | {"img_size": 160, "window_size": 7, "global_attn_indexes": (1, 3), "neck_chans": 16},
        ),
        "SAM, whole windows": (
            "samvit_base_patch16_224",
            SMALL | {"img_size": 128, "window_size": 4, "global_attn_indexes": (1, 3)},
        ),
        "SAM, RoPE": (
            "samvit_base_patch16_224",
            SMALL | {"img_size": 128, "window_size": 6, "use_rel_pos": False, "use_rope": True, "init_values": 0.1},
        ),
    },
    "tnt": {
        "TNT": ("tnt_s_patch16_224", TNT | {"img_size": 128}),
        "TNT, legacy": ("tnt_s_legacy_patch16_224", TNT | {"img_size": 128}),
    },
    "twins": {
        "Twins-PCPVT": (
            "twins_pcpvt_small",
            {"img_size": 128, "embed_dims": (16, 32, 80, 64), "depths": (2, 2, 2, 2), "num_classes": 5},
        ),
        "Twins-SVT": (
            "twins_svt_small",
            {
                "img_size": 128,
                "embed_dims": (16, 32, 64, 128),
                "wss": (8, 8, 4, 4),
                "depths": (2, 2, 2, 2),
                "num_classes": 5,
            },
        ),
    },
    "xcit": {
        "XCiT": ("xcit_nano_12_p16_224", SMALL | {"embed_dim": 96, "img_size": 128}),
        "XCiT, small patches": ("xcit_tiny_12_p8_224", SMALL | {"embed_dim": 96, "img_size": 64}),
    },
}

# {kind: the oldest timm that has such a model}, in families that older ones have as well.
NEEDS_TIMM = {
    "test_vit2": "1.0.10",
    "test_vit3": "1.0.10",
    "test_vit4": "1.0.13",
    "ViT, norms within attention and MLP": "1.0.16",
    "TNT, legacy": "1.0.16",
    "RoPE ViT, axial": "1.0.17",
    "RoPE ViT, mixed": "1.0.17",
    "RoPE ViT, mixed and absolute": "1.0.17",
    "Perception Encoder": "1.0.18",
    "Perception Encoder, spatial": "1.0.18",
    "DINOv3": "1.0.20",
    "DINOv3, SwiGLU": "1.0.20",
    "ViT, parallel, no bias, fused projection": "1.0.23",
    "ViT, parallel, differential attention": "1.0.23",
    "ViT, differential attention": "1.0.23",
    "ViT, differential attention, two lambdas": "1.0.23",
    "ViT, no class token, prr pool": "1.0.26",
    "ViT, gated attention": "1.0.28",
    "Sapiens": "1.0.30",
    "RADIO": "1.0.31",
}


def why_not(kind, adapter):
    """Return why a kind of a table is left out with this timm, or None."""
    for family, reason in adapters.missing.items():
        if adapters.FAMILIES[family] == adapter:
            return f"{family} is not served. {reason}"
    needs = NEEDS_TIMM.get(kind)
    if needs is not None and adapters.numbers(needs) > TIMM:
        return f"It needs timm {needs} or newer, and this is {timm.__version__}."
    return None


LEFT_OUT = {kind: why for name, table in FAMILIES.items() for kind in table if (why := why_not(kind, name))}
FAMILIES = {
    name: served
    for name, table in FAMILIES.items()
    if (served := {kind: entry for kind, entry in table.items() if kind not in LEFT_OUT})
}
KINDS = {kind: entry for table in FAMILIES.values() for kind, entry in table.items()}

# Of each family one, and those whose forward is another than its: for checks that take seconds a model.
DIFFERENT = [next(iter(table)) for table in FAMILIES.values()] + [
    "ViT, parallel, differential attention",
    "ViT, no class token, average",
    "ViT, any image size",
    "DeiT, distilled",
    "RoPE ViT, mixed",
    "DINOv3",
    "NaFlexViT, grouped queries, RoPE, gated",
    "Swin V2",
    "CoAtNet",
    "SAM, RoPE",
    "Twins-SVT",
]


def make(kind="ViT", seed=0, **changes):
    """Build a model of the table, in eval mode, with other options where they are given."""
    torch.manual_seed(seed)
    name, options = KINDS[kind]
    return randomize(timm.create_model(name, **options | changes)).eval()


@torch.no_grad()
def randomize(model):
    """Change every parameter and statistic: some start at zero or one, which would hide what they do."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(kind="ViT", batch=2, seed=1):
    torch.manual_seed(seed)
    size = KINDS[kind][1].get("img_size", 112)  # the others take any size
    return torch.randn(batch, 3, size, size)


class Opaque(nn.Module):
    """A linear layer as LoRA, quantisation and the like leave it: it can be called, and has no weight to be read."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return self.base(x)


def wrap_linears(model):
    """Make the linear layers of a model opaque, also where timm would read their weights unless told not to."""
    for module in list(model.modules()):
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "input_proj":  # Gemma's, which timm asks for its dtype
                setattr(module, name, Opaque(child))
    return model


def fingerprint(model):
    """Everything that `remove` has to bring back."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [(name, list(module._forward_hooks)) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "buffers": [name for name, _ in model.named_buffers()],
    }
