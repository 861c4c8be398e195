"""Token merging in a model from torch.hub, whose repository builds on timm.

    python examples/integrations/torch_hub.py

The repository is a folder written here, and the weights are random, so that it runs without a network. For pretrained
weights from timm's own repository:

    model = torch.hub.load("huggingface/pytorch-image-models", "deit_tiny_patch16_224", pretrained=True)
"""

import tempfile
from pathlib import Path

import torch

import token_merge_plugin
from token_merge_plugin.trial.counting import count_macs

HUBCONF = """
dependencies = ["timm"]

from timm.models.deit import deit_tiny_patch16_224
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hubconf.py").write_text(HUBCONF)
        model = torch.hub.load(folder, "deit_tiny_patch16_224", source="local", pretrained=False).eval()
    images = torch.randn(1, 3, 224, 224)
    before = count_macs(model, images)

    token_merge_plugin.apply(model, keep_rate=0.7)

    print(f"{before / 1e9:.2f} -> {count_macs(model, images) / 1e9:.2f} GMACs")


if __name__ == "__main__":
    main()
