"""Token merging in transformers: an image classification pipeline on a timm ViT.

    pip install transformers
    python examples/integrations/transformers_timm_wrapper.py

The weights are random, so that it runs without a network. For pretrained ones, put this in the place of the config,
the model and the image processor:

    name = "timm/deit_tiny_patch16_224.fb_in1k"
    model = TimmWrapperForImageClassification.from_pretrained(name)
    image_processor = TimmWrapperImageProcessor.from_pretrained(name)
"""

import torch
from PIL import Image
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    pipeline,
)

import token_merge_plugin
from token_merge_plugin.trial.counting import count_macs


def main() -> None:
    config = TimmWrapperConfig(architecture="deit_tiny_patch16_224", num_labels=10)
    model = TimmWrapperForImageClassification(config)
    image_processor = TimmWrapperImageProcessor(model.timm_model.pretrained_cfg)
    pixel_values = torch.randn(1, 3, 224, 224)
    before = count_macs(model, pixel_values)

    token_merge_plugin.apply(model, keep_rate=0.7)

    print(f"{before / 1e9:.2f} -> {count_macs(model, pixel_values) / 1e9:.2f} GMACs")
    classify = pipeline("image-classification", model=model, image_processor=image_processor)
    print(classify(Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 100).convert("RGB"), top_k=1))


if __name__ == "__main__":
    main()
