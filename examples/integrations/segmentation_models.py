"""Token merging in segmentation_models_pytorch: a dense prediction transformer on a timm ViT.

    pip install segmentation_models_pytorch
    python examples/integrations/segmentation_models.py

The weights are random, so that it runs without a network. For a pretrained encoder: encoder_weights="imagenet". Other
heads take a windowed encoder, such as smp.Unet("tu-swin_tiny_patch4_window7_224", img_size=224). The mask has the same
shape as without merging, since tokens that were merged are back on the full grid wherever the decoder reads it.
"""

import segmentation_models_pytorch as smp
import torch

import token_merge_plugin
from token_merge_plugin.trial.counting import count_macs


def main() -> None:
    model = smp.DPT("tu-deit_tiny_patch16_224", encoder_weights=None, classes=3).eval()
    images = torch.randn(1, 3, 224, 224)
    before = count_macs(model.encoder, images)

    token_merge_plugin.apply(model, keep_rate=0.7)

    print(f"encoder: {before / 1e9:.2f} -> {count_macs(model.encoder, images) / 1e9:.2f} GMACs")
    with torch.inference_mode():
        print(f"mask: {tuple(model(images).shape)}")


if __name__ == "__main__":
    main()
