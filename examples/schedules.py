"""What calibration is worth: its schedule against fixed ones, at equal multiply-adds, on images that it has not seen.

    python examples/schedules.py --data /usr/share/datasets/fashion-mnist

Calibrates the built-in model, or one of examples/train_reference.py, on training images of Fashion-MNIST without their
labels, and compares schedules on its test images (the four IDX files; Debian package dataset-fashion-mnist).
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint
from tqdm import tqdm
from train_reference import MODELS, create_model

import token_merge_plugin
from token_merge_plugin import MergeConfig
from token_merge_plugin.builtin import WEIGHTS, load_images
from token_merge_plugin.counting import count_macs, equal_compute
from token_merge_plugin.measuring import plan
from token_merge_plugin.trial import Counts, compare, paired_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of examples/train_reference.py")
    parser.add_argument("--model", default="vit", choices=MODELS, help="as trained")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.67, 0.5], help="of the multiply-adds")
    parser.add_argument("--calibration-images", type=int, default=300)
    parser.add_argument("--images", type=int, default=10_000, help="test on the first so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = create_model(args.model).to(args.device).eval()
    load_checkpoint(model, str(args.weights))
    training = load_images(args.data, "train")[0][: args.calibration_images].to(args.device)
    images, labels = (x[: args.images].to(args.device) for x in load_images(args.data))
    full = count_macs(model, images[:1])

    contenders: dict[tuple[str, float], MergeConfig | None] = {("unpatched", 1.0): None}
    for share in args.shares:
        target = int(share * full)
        for name, stages in (("default stages", None), ("one block earlier", (2, 5, 8)), ("every block", range(12))):
            config = equal_compute(model, images[:1], "merge", target, stages=stages)
            contenders[name, share] = config
        contenders["calibrated", share] = token_merge_plugin.calibrate(model, training, share, progress=True)
    macs = [count_macs(plan(model, config), images[:1]) for config in contenders.values()]
    sums = [Counts() for _ in contenders]
    for part in tqdm(range(0, len(images), 50), desc="batches"):
        batch = slice(part, part + 50)
        counts = compare(model, list(contenders.values()), images[batch], labels[batch], batch_size=50)
        sums = [total.add(more) for total, more in zip(sums, counts, strict=True)]

    print(f"{len(images)} images, torch {torch.__version__}, timm {timm.__version__}\n")
    print("| schedule | GMACs | share | top-1 | difference [95 %], points | agreement | KL |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (name, _), cost, total in zip(contenders, macs, sums, strict=True):
        n = total.images
        low, high = (100 * end for end in paired_interval(total.gained, total.lost, n))
        print(
            f"| {name} | {cost / 1e9:.3f} | {cost / full:.3f} | {total.top1 / n:.2%} | "
            f"{100 * (total.gained - total.lost) / n:+.2f} [{low:+.2f}, {high:+.2f}] | {total.agree / n:.2%} | "
            f"{total.kl / n:.1e} |"
        )
    for (name, share), config in contenders.items():
        if name == "calibrated" and config is not None:
            print(f"\ncalibrated for {share}: {config.to_json()}")


if __name__ == "__main__":
    main()
