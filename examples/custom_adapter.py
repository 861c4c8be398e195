# Serves the model of custom_model.py: all that a new family takes.
from custom_model import CustomViT, Layer, SelfAttention

from token_merge_plugin.adapters.base import Adapter, PatchedAttention, PatchedBlock, attend, register_adapter


class MergingSelfAttention(PatchedAttention):
    parts = ("to_qkv", "to_out")  # child modules that merged_forward runs; any other is refused

    def merged_forward(self, x):  # as the layer's own forward, but by attend(): it counts sizes and notes evidence
        query, key, value = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(attend(self, query, key, value).transpose(1, 2).flatten(2))


class MergingLayer(PatchedBlock):
    parts = ("norm_attention", "attn", "norm_mlp", "mlp")

    def stage_forward(self, x, reduce):  # as the block's own forward, but with reduce() between attention and MLP
        x = reduce(x + self.attn(self.norm_attention(x)))
        return x + self.mlp(self.norm_mlp(x))


@register_adapter(CustomViT)
class CustomAdapter(Adapter):
    family = "Custom ViT"
    known_blocks = {Layer: MergingLayer}
    known_attention = {SelfAttention: MergingSelfAttention}

    def blocks(self, model):
        return list(model.layers)

    def num_prefix_tokens(self, model):
        return 1

    def num_class_tokens(self, model):
        return 1
