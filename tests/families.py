"""One small model of each kind that timm builds from the served families, with random weights.

Entries: name of a timm model, options that make it small. `test_families.py` holds all of them to the invariants.
"""

import timm
import torch

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 5}
GEMMA = {"head_dim": 12, "intermediate_size": 96, "position_embedding_size": 16, "img_size": 144}

TNT = {"embed_dim": 48, "depth": 4, "num_heads_outer": 4, "inner_dim": 12, "num_heads_inner": 2, "num_classes": 5}
STEPS = {"embed_dims": (48, 96), "depths": (1, 1), "num_heads": (2, 4)}

SMALL_SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "img_size": 112}

SMALL_MAXX = {
    "embed_dim": (16, 16, 64, 64),
    "depths": (1, 1, 2, 1),
    "stem_width": (8, 16),
    "transformer_dim_head": 8,
    "conv_expand_ratio": 1,
    "num_classes": 5,
}

KINDS = {
    # eva.py
    "EVA": ("eva_large_patch14_196", SMALL | {"img_size": 112}),
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
    # swin_transformer.py, swin_transformer_v2.py, swin_transformer_v2_cr.py
    "Swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "Swin V2": ("swinv2_tiny_window8_256", SMALL_SWIN),
    "Swin V2 cr": ("swinv2_cr_tiny_ns_224", SMALL_SWIN),
    # beit.py, vision_transformer_relpos.py
    "BEiT": ("beit_base_patch16_224", SMALL | {"img_size": 128}),
    "BEiT-2": ("beitv2_base_patch16_224", SMALL | {"img_size": 128}),
    "BEiT, shared bias": (
        "beit_base_patch16_224",
        SMALL | {"img_size": 128, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "relative position, MLP": ("vit_relpos_small_patch16_224", SMALL | {"img_size": 128}),
    "relative position, post-norm": ("vit_relpos_base_patch16_rpn_224", SMALL | {"img_size": 128}),
    "relative position, shared": ("vit_srelpos_small_patch16_224", SMALL | {"img_size": 128}),
    "relative position, class token": ("vit_relpos_medium_patch16_cls_224", SMALL | {"img_size": 128}),
    "relative position, class token, avg": ("vit_relpos_base_patch16_clsgap_224", SMALL | {"img_size": 128}),
    # cait.py, convit.py
    "CaiT": ("cait_xxs24_224", SMALL | {"img_size": 128}),
    "ConViT": ("convit_tiny", SMALL | {"embed_dim": 12, "local_up_to_layer": 3, "img_size": 128}),
    # gemma4_vit.py, qwen3_vit.py, deepseek_vit.py
    "Gemma 4": ("gemma4_vit_167m", SMALL | GEMMA),
    "Gemma 4, encoder": ("gemma4_vit_570m_enc", SMALL | GEMMA | {"num_kv_heads": 2}),
    "Qwen3": ("qwen3_vit_88m", SMALL | {"img_size": 128}),
    "Qwen3, merger": ("qwen3_vit_88m_merge", SMALL | {"img_size": 128, "out_features": 16}),
    "Qwen3, encoder": ("qwen3_vit_88m_enc", SMALL | {"img_size": 128, "out_features": 16}),
    "DeepSeek": ("deepseek_vit_412m", SMALL | {"img_size": 126}),
    "DeepSeek, aligner": ("deepseek_vit_412m_align", SMALL | {"img_size": 126, "out_features": 16}),
    "DeepSeek, encoder": ("deepseek_vit_412m_enc", SMALL | {"img_size": 126, "out_features": 16}),
    # xcit.py, nest.py, davit.py, gcvit.py, tnt.py, crossvit.py
    "XCiT": ("xcit_nano_12_p16_224", SMALL | {"embed_dim": 96, "img_size": 128}),
    "XCiT, small patches": ("xcit_tiny_12_p8_224", SMALL | {"embed_dim": 96, "img_size": 64}),
    "NesT": ("nest_tiny_jx", {"num_classes": 5, "img_size": 64}),
    "DaViT": ("davit_tiny", STEPS | {"num_classes": 5}),
    "DaViT of Florence-2": ("davit_base_fl", STEPS | {"num_classes": 5}),
    "GCViT": ("gcvit_xxtiny", {"embed_dim": 32, "layer_scale": 0.5, "num_classes": 5, "img_size": 128}),
    "TNT": ("tnt_s_patch16_224", TNT | {"img_size": 128}),
    "TNT, legacy": ("tnt_s_legacy_patch16_224", TNT | {"img_size": 128}),
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
    # volo.py, pit.py, twins.py
    "VOLO": ("volo_d1_224", {"img_size": 64, "mlp_ratio": 1.0, "stem_hidden_dim": 16, "num_classes": 5}),
    "PiT": ("pit_ti_224", {"img_size": 112, "base_dims": (8, 8, 8), "num_classes": 5}),
    "PiT, distilled": ("pit_ti_distilled_224", {"img_size": 112, "base_dims": (8, 8, 8), "num_classes": 5}),
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
    # naflexvit.py
    "NaFlexViT": ("naflexvit_base_patch16_gap", SMALL | {"img_size": 128}),
    "NaFlexViT, factorized, attention pool": (
        "naflexvit_base_patch16_parfac_gap",
        SMALL | {"img_size": 128, "global_pool": "map"},
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
    # vision_transformer_sam.py, hiera.py
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
    "Hiera": ("hiera_tiny_224", {"img_size": 128, "embed_dim": 24, "stages": (1, 1, 6, 2), "num_classes": 5}),
    "Hiera, absolute windows": (
        "hiera_small_abswin_256",
        {"img_size": 128, "embed_dim": 24, "stages": (1, 2, 5, 1), "num_classes": 5},
    ),
    # maxxvit.py
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
}


def make(kind, seed=0, **changes):
    torch.manual_seed(seed)
    name, options = KINDS[kind]
    model = timm.create_model(name, **options | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, which would hide what they do
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(kind, batch=2, seed=1):
    torch.manual_seed(seed)
    size = KINDS[kind][1].get("img_size", 112)  # the others take any size
    return torch.randn(batch, 3, size, size)


def fingerprint(model):
    """Everything that `remove` has to bring back."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [(name, list(module._forward_hooks)) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "buffers": [name for name, _ in model.named_buffers()],
    }
