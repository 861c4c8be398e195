"""Grad-CAM on a patched model: a hook on a block sees the whole patch grid.

    python examples/grad_cam.py IMAGE --model deit_small_patch16_224.fb_in1k --output cam.png
    python examples/grad_cam.py            # the built-in model, on the first of its images

Grad-CAM (Selvaraju et al. 2017) weighs the channels of a block's output by the mean of their gradients. Hooks on the
blocks of a patched model, and on their norms, see all patches, so nothing here is of token merging but the line that
applies it.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import token_merge_plugin
from token_merge_plugin.builtin import create_reference_model, load_images


def grad_cam(model: nn.Module, block: nn.Module, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Return where the evidence for the predicted class is, [B, height, width] of the patch grid, between 0 and 1.

    Args:
        model: patched or not, in eval mode.
        block: one of its blocks, whose output is read.
        images: [B, C, H, W].
        grid_size: (height, width) of the patch grid.
    """
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = model(images)
    finally:
        hook.remove()
    (tokens,) = seen
    (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), tokens)
    patches = grid_size[0] * grid_size[1]
    tokens, gradient = tokens[:, -patches:], gradient[:, -patches:]
    cam = (gradient.mean(dim=1, keepdim=True) * tokens).sum(dim=2).relu().unflatten(1, grid_size)
    return (cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", help="a picture; none for one of the built-in ones")
    parser.add_argument("--model", default="deit_small_patch16_224.fb_in1k", help="timm's name, for a picture")
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--block", type=int, default=-2, help="index of the block")
    parser.add_argument("--output", type=Path, default=Path("cam.png"))
    args = parser.parse_args()
    if args.image is None:
        model, images = create_reference_model(), load_images()[0][:1]
    else:
        model = timm.create_model(args.model, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        images = transform(Image.open(args.image).convert("RGB"))[None]
    token_merge_plugin.apply(model, args.keep_rate)
    cam = grad_cam(model, model.blocks[args.block], images, tuple(model.patch_embed.grid_size))
    large = F.interpolate(cam[:, None], size=images.shape[2:], mode="bilinear")[0, 0]
    Image.fromarray((255 * large).round().to(torch.uint8).numpy()).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
