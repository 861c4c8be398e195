r"""Train the built-in reference model on Fashion-MNIST, or a relative of it, from scratch, on unmerged tokens.

    python examples/train_reference.py --data /usr/share/datasets/fashion-mnist --output vit_fashion_mnist.safetensors

The data are the four IDX files of Fashion-MNIST (Debian package dataset-fashion-mnist). Most epochs see a random
quarter of the patches (Li et al. 2023, "Scaling Language-Image Pre-training via Masking"), which is four times
cheaper; the last one sees all of them. No token is merged. Progress is saved beside the output: run the same command
again to go on after an interruption.

An average-pooled model, from the built-in one:

    python examples/train_reference.py --data ... --output vit_avg.safetensors --model vit_avg \
        --init token_merge_plugin/builtin/vit_fashion_mnist.safetensors --schedule 1x0.75 --lr 2e-3

A small Swin Transformer and a small LV-ViT, which need every patch:

    python examples/train_reference.py --data ... --output swin.safetensors --model swin --schedule 5x0
    python examples/train_reference.py --data ... --output lvvit.safetensors --model lvvit --schedule 2x0

A ViT of DeiT-S's shape, trained briefly, in bfloat16:

    python examples/train_reference.py --data ... --output deit_small.safetensors --model deit_small --schedule 1x0.75 \
        --bfloat16 --batch-size 128

With --images 55000, the last 5,000 training images are held out, to choose options on.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchDropout
from timm.models import load_checkpoint
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from token_merge_plugin.builtin import ConvStem, create_reference_model, load_images
from token_merge_plugin.models.lvvit import LVViT, token_labeling_loss
from token_merge_plugin.trial.measuring import keep_freed_memory

SCHEDULE = "6x0.75 1x0.5 1x0"
MODELS = ("vit", "vit_avg", "vit_rope", "deit_small", "lvvit", "swin")


class GridStem(ConvStem):
    """The built-in model's patch embedding, with its output as LV-ViT wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)  # [B, h, w, C]


def create_model(name: str) -> torch.nn.Module:
    """Build one of `MODELS` with random weights, for 28x28 grey images and 10 classes.

    "vit" is the built-in model, "vit_avg" the same with average pooling, "vit_rope" an average-pooled one whose only
    positions are rotary, "deit_small" the built-in one in DeiT-S's width, with 384 channels and 6 heads; "lvvit" has 64
    channels, "swin" has 14x14 patches in windows of 7x7.
    """
    shared: dict[str, Any] = {"img_size": 28, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    if name == "swin":
        return SwinTransformer(
            **shared, embed_dim=64, depths=(6, 2), num_heads=(2, 4), window_size=7, drop_path_rate=0.0
        )
    if name == "vit_rope":
        return Eva(
            **shared,
            embed_dim=96,
            depth=12,
            num_heads=3,
            patch_drop_rate=0.5,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            head_init_scale=1.0,
        )
    if name == "lvvit":
        # Made for patches of 16x16 pixels: 14x14 patches are 224x224 pixels to it.
        model = LVViT(224, in_chans=1, num_classes=10, embed_dim=64, depth=12, num_heads=2, skip_lam=1.0)
        model.patch_embed = GridStem(embed_dim=64)
        return model
    if name == "deit_small":
        return create_reference_model(pretrained=False, patch_drop_rate=0.5, embed_dim=384, num_heads=6)
    pool = "avg" if name == "vit_avg" else "token"
    return create_reference_model(pretrained=False, patch_drop_rate=0.5, global_pool=pool, fc_norm=False)


def read_schedule(text: str) -> list[float]:
    """Return the share of the patches dropped in each epoch: "2x0.5 1x0" -> [0.5, 0.5, 0.0]."""
    pairs = [phase.split("x") for phase in text.split()]
    return [float(drop) for epochs, drop in pairs for _ in range(int(epochs))]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(200, steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return probabilities [B, num_classes] for class indices [B]."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def label_loss(output: Any, target: Tensor, token_target: Tensor | None = None) -> Tensor:
    """Return the cross entropy with probabilities [B, num_classes]; of an LV-ViT, the token labelling loss."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output.float(), target)
    return token_labeling_loss((output[0].float(), output[1].float(), output[2]), target, token_target)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent."""
    correct = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * correct / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--output", type=Path, required=True, help="weights, written as fp16 safetensors")
    parser.add_argument("--schedule", default=SCHEDULE, help="epochs x share of the patches dropped, phase by phase")
    parser.add_argument("--model", default="vit", choices=MODELS)
    parser.add_argument("--init", type=Path, help="weights to start from (default: random)")
    parser.add_argument("--images", type=int, default=60_000, help="train on the first so many")
    parser.add_argument("--bfloat16", action="store_true", help="autocast to it (always done on CUDA)")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images, labels = (t[: args.images].to(device) for t in load_images(args.data, "train"))
    drops = read_schedule(args.schedule)
    model = create_model(args.model).to(device)
    if args.init:
        load_checkpoint(model, str(args.init))
    patch_drop = getattr(model, "patch_drop", PatchDropout())  # its rate is set epoch by epoch
    if any(drops) and not hasattr(model, "patch_drop"):
        parser.error(f"--model {args.model} cannot drop patches: give a schedule such as 5x0")
    # Orthogonalised momentum (Muon) for the matrices, AdamW for the rest: fewer epochs than AdamW alone.
    optimizer = create_optimizer_v2(model, "muon", lr=args.lr, weight_decay=0.05, fallback_lr_scale=0.25)

    per_epoch = len(images) // args.batch_size
    steps = per_epoch * len(drops)
    first = 0
    checkpoint = args.output.with_suffix(".checkpoint")
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16 or device.type == "cuda")
    model.train()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step")
    for step in progress:
        # Seeded by the step, so that a resumed run draws what an uninterrupted one would have drawn.
        epoch, batch = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        torch.manual_seed(args.seed * steps + step)
        index = order[batch * args.batch_size :][: args.batch_size]
        x, y = images[index], labels[index]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        patch_drop.prob = drops[epoch]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        with autocast:
            loss = label_loss(model(x), soft_labels(y, model.num_classes, smoothing=0.1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", patches=f"{1 - drops[epoch]:.0%}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)

    model.eval()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, args.output)
    model.load_state_dict(weights)
    test_images, test_labels = (t.to(device) for t in load_images(args.data, "t10k"))
    with autocast:
        top1 = accuracy(model, test_images, test_labels)
    print(f"top-1 on {len(test_labels)} test images: {top1:.2f} %")


if __name__ == "__main__":
    main()
