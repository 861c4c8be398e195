"""LV-ViT, registered with timm: a ViT whose image tokens are classified, too.

After Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better Vision Transformers"
(arXiv 2104.10858). Parameters have the names and shapes of the published checkpoints:

    import timm, token_merge_plugin.models

    model = timm.create_model("lvvit_s", checkpoint_path="lvvit_s.pth.tar")
"""

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["LVViT"]

Box: TypeAlias = tuple[int, int, int, int]


class LVViTPatchEmbed(nn.Module):
    """Three convolutions and a projection to patches of 16x16 pixels: [B, 3, 16 * h, 16 * w] -> [B, h, w, C]."""

    patch_size = (16, 16)

    def __init__(self, img_size: int | tuple[int, int], in_chans: int, embed_dim: int, stem_chs: int):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, stem_chs, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chs)
        self.conv2 = nn.Conv2d(stem_chs, stem_chs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_chs)
        self.conv3 = nn.Conv2d(stem_chs, stem_chs, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_chs)
        self.act = nn.ReLU()
        self.proj = nn.Conv2d(stem_chs, embed_dim, kernel_size=8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        given = tuple(x.shape[2:])
        torch._assert(given == self.img_size, f"The images are {given}, and the model was made for {self.img_size}.")
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.act(self.bn3(self.conv3(x)))
        return self.proj(x).permute(0, 2, 3, 1)


class LVViTBlock(nn.Module):
    """Pre-norm transformer block, each of whose residual branches is divided by `skip_lam`: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, num_heads: int, skip_lam: float, drop_path: float):
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam


class LVViT(nn.Module):
    """LV-ViT: images [B, in_chans, height, width] -> logits [B, num_classes].

    In training it returns (class logits [B, num_classes], dense logits [B, N, num_classes], box), as the token
    labelling loss needs them. The box is what MixToken swapped, see `random_box`.

    Args:
        img_size: height and width, or both, in pixels; multiples of 16.
        in_chans: channels of the images.
        num_classes: outputs of both classifiers; 0 for none.
        global_pool: "token", or "" to leave the tokens unpooled where there is no classifier.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        stem_chs: channels of the convolutions in front of the patches.
        skip_lam: divisor of the residual branches.
        drop_rate: dropout in front of the classifiers.
        drop_path_rate: stochastic depth of the last block; falls linearly to 0 at the first.
        return_dense: dense logits in training; without them, training returns what inference does.
        mix_token: MixToken in training, if there are dense logits.
    """

    norm: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        stem_chs: int = 64,
        skip_lam: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        return_dense: bool = True,
        mix_token: bool = True,
    ):
        super().__init__()
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.return_dense = return_dense
        self.mix_token = mix_token
        self.grad_checkpointing = False
        self.patch_embed = LVViTPatchEmbed(img_size, in_chans, embed_dim, stem_chs)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[LVViTBlock(embed_dim, num_heads, skip_lam, rate) for rate in rates])
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": 16} for i in range(depth)]
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        self.apply(_init_linear)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are not decayed."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm sorts parameters into layers."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Return the classifiers of the class token and of the image tokens."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by new ones; `global_pool` as at construction."""
        self.num_classes = num_classes
        if global_pool is not None:
            if global_pool not in ("token", ""):
                raise ValueError(f"global_pool={global_pool!r}: LV-ViT pools by 'token', or not at all ('').")
            self.global_pool = global_pool
        self.head = self._new_classifier()
        self.aux_head = self._new_classifier()

    def _new_classifier(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        like = self.pos_embed
        linear = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        return linear.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need for these blocks; return their indices."""
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return features behind the blocks that `indices` names, as timm's `VisionTransformer` does.

        Args:
            x: [B, in_chans, height, width].
            indices: the last n blocks if an int, all if None.
            return_prefix_tokens: (image tokens, class token) of each block rather than image tokens alone.
            norm: apply the final norm to each.
            stop_early: do not run blocks behind the last one named.
            output_fmt: "NCHW" for [B, C, h, w], "NLC" for [B, N, C].
            intermediates_only: the list of intermediate features, without the final ones.
            output_dict: a dict with "image_features", "image_intermediates" and "image_intermediates_prefix".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: give 'NCHW' or 'NLC'.")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        x = self._pos_embed(self.patch_embed(x).flatten(1, 2))
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)
        prefix = [y[:, :1] for y in taken]
        images = [y[:, 1:] for y in taken]
        if output_fmt == "NCHW":
            images = [y.transpose(1, 2).unflatten(2, self.patch_embed.grid_size).contiguous() for y in images]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": images}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates = list(zip(images, prefix, strict=True)) if return_prefix_tokens else images
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens behind the final norm: [B, in_chans, height, width] -> [B, 1 + N, C]."""
        return self.forward_tokens(self.patch_embed(x).flatten(1, 2))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Run the blocks on embedded patches: [B, N, C] -> [B, 1 + N, C]."""
        x = self._pos_embed(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [B, num_classes]: the class token's, and half of the largest of the image tokens'.

        Args:
            x: [B, 1 + N, C], from `forward_features`.
            pre_logits: return the class token [B, C] instead.
        """
        if pre_logits or not self.num_classes:
            return x[:, 0] if self.global_pool else x
        x = self.head_drop(x)
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward(self, x: Tensor) -> Any:
        if not (self.training and self.return_dense):
            return self.forward_head(self.forward_features(x))
        grid_size = self.patch_embed.grid_size
        box = random_box(*grid_size) if self.mix_token else (0, 0, 0, 0)
        x = swap_box(self.patch_embed(x), box)
        x = self.head_drop(self.forward_tokens(x.flatten(1, 2)))
        dense = self.aux_head(x[:, 1:]).unflatten(1, grid_size)
        return self.head(x[:, 0]), swap_box(dense, box).flatten(1, 2), box

    def _pos_embed(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def random_box(height: int, width: int) -> Box:
    """Draw a box in a patch grid as CutMix does, its share of the grid uniform (Beta(1, 1)) before it is clipped.

    Returns:
        (x1, y1, x2, y2): x counts rows and y columns, as in CutMix's and token labelling's published code.
    """
    share, x, y = torch.rand(3, device="cpu").tolist()
    half = int(height * math.sqrt(share)) // 2, int(width * math.sqrt(share)) // 2
    x, y = int(height * x), int(width * y)
    return max(x - half[0], 0), max(y - half[1], 0), min(x + half[0], height), min(y + half[1], width)


def swap_box(x: Tensor, box: Box) -> Tensor:
    """Swap a box between each image and its mirror in the batch: [B, h, w, C] -> [B, h, w, C]. Undoes itself."""
    x1, y1, x2, y2 = box
    swapped = x.clone()
    swapped[:, x1:x2, y1:y2] = x[:, x1:x2, y1:y2].flip(0)
    return swapped


def mix_by_box(target: Tensor, box: Box, num_patches: int) -> Tensor:
    """Mix what belongs to each image [B, D] with its mirror's, by the shares of the patches that a swapped box left."""
    x1, y1, x2, y2 = box
    swapped = (x2 - x1) * (y2 - y1) / num_patches
    return target * (1 - swapped) + target.flip(0) * swapped


def token_labeling_loss(
    output: tuple[Tensor, Tensor, Box], target: Tensor, token_target: Tensor | None = None, weight: float = 0.5
) -> Tensor:
    """Return the token labelling loss (Jiang et al. 2021, equations 3 and 4), mean over the batch.

    It is the class token's cross entropy, plus `weight` times the mean of the image tokens' own. Where MixToken swapped
    a box, the class token saw both images, and its target is that of both by their shares of the patches.

    Args:
        output: what an LV-ViT returns in training: logits [B, num_classes], dense logits [B, N, num_classes] and the
            box that was swapped.
        target: probabilities [B, num_classes].
        token_target: probabilities for each patch [B, N, num_classes]; None for those of its image.
        weight: of the image tokens' part; 0.5 in the paper.
    """
    logits, dense, box = output
    mixed = mix_by_box(target, box, dense.shape[1])
    token_target = target[:, None, :].expand_as(dense) if token_target is None else token_target
    of_tokens = F.cross_entropy(dense.flatten(0, 1), token_target.flatten(0, 1))
    return F.cross_entropy(logits, mixed) + weight * of_tokens


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: LVViT) -> dict[str, Tensor]:
    """Resize the position embedding of a square checkpoint to the model's grid."""
    if "pos_embed" in state_dict and state_dict["pos_embed"].shape != model.pos_embed.shape:
        pos_embed = resample_abs_pos_embed(state_dict["pos_embed"], model.patch_embed.grid_size)
        state_dict = state_dict | {"pos_embed": pos_embed}
    return state_dict


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t": _cfg(),
        "lvvit_s": _cfg(),
        "lvvit_m": _cfg(crop_pct=1.0),
        "lvvit_l": _cfg(crop_pct=1.0),
    }
)


def _create_lvvit(variant: str, pretrained: bool, **kwargs: Any) -> LVViT:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No url of pretrained weights is known for {variant}. Download the checkpoint that its authors published, "
            "and give checkpoint_path='...' instead of pretrained=True. With another img_size, num_classes or "
            "in_chans, give pretrained=True and pretrained_cfg_overlay={'file': '...'}, and timm adapts it."
        )
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.5 M parameters."""
    args = {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}
    return _create_lvvit("lvvit_t", pretrained, **args | kwargs)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26 M parameters."""
    args = {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}
    return _create_lvvit("lvvit_s", pretrained, **args | kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 56 M parameters."""
    args = {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}
    return _create_lvvit("lvvit_m", pretrained, **args | kwargs)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: 150 M parameters."""
    args = {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem_chs": 128, "skip_lam": 3.0}
    return _create_lvvit("lvvit_l", pretrained, **args | kwargs)
