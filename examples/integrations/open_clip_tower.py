"""Token merging in open_clip: a CLIP model whose image tower is a timm ViT.

    pip install open_clip_torch
    python examples/integrations/open_clip_tower.py

The weights are random, so that it runs without a network. For pretrained ones: create_model(name, pretrained="meta"),
or what `open_clip.list_pretrained()` lists for another model. The tower has to be timm's, as those of SigLIP, EVA,
ViTamin and PE-Core are (`open_clip.get_model_config(name)["vision_cfg"]` has a "timm_model_name"). open_clip's own
vision transformer, as in "ViT-B-32", is refused.
"""

import open_clip
import torch

import token_merge_plugin
from token_merge_plugin.trial.counting import count_macs


def main() -> None:
    model = open_clip.create_model("PE-Core-T-16-384").eval()
    images = torch.randn(1, 3, *model.visual.image_size)
    before = count_macs(model.visual, images)

    token_merge_plugin.apply(model, keep_rate=0.7)

    print(f"image tower: {before / 1e9:.2f} -> {count_macs(model.visual, images) / 1e9:.2f} GMACs")
    with torch.inference_mode():
        features = model.encode_image(images, normalize=True)
    print(f"features of {len(features)} image: {tuple(features.shape)}")


if __name__ == "__main__":
    main()
