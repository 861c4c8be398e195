"""What the defaults are worth: the built-in model, or one trained alike, with options switched one at a time.

    python examples/accuracy.py --data /usr/share/datasets/fashion-mnist

Runs test images of Fashion-MNIST (the four IDX files; Debian package dataset-fashion-mnist) through the unpatched
model and, for each row, through the patched one, without any training, and prints the table of the README.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint
from tqdm import tqdm
from train_reference import MODELS, create_model

import token_merge_plugin
from token_merge_plugin.builtin import WEIGHTS, load_images
from token_merge_plugin.counting import count_macs
from token_merge_plugin.measuring import plan
from token_merge_plugin.trial import Counts, compare

CONFIGS = {
    "default": {},
    "class attention only": {"importance": "class_attention"},
    "mean query only": {"importance": "mean_query"},
    "no importance": {"importance": "uniform"},
    "no distinctiveness": {"distinctiveness": False},
    "no proportional attention": {"proportional_attention": False},
    "similarity of keys": {"similarity": "keys"},
    "similarity of values": {"similarity": "values"},
    "multi-scale importance": {"multi_scale": "importance"},
    "multi-scale descriptors": {"multi_scale": "descriptors"},
    "stages 2, 5, 8": {"stages": (2, 5, 8)},
}
# The Swin Transformer has 6 blocks on 14x14 tokens, which are the default stages, and 2 on 7x7.
SWIN_CONFIGS = {
    "default": {},
    "no proportional attention": {"proportional_attention": False},
    "all blocks": {"stages": range(8)},
    "7x7 only": {"stages": (6, 7)},
    "every other block": {"stages": (1, 3, 5, 7)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of examples/train_reference.py")
    parser.add_argument("--model", default="vit", choices=MODELS, help="as trained")
    parser.add_argument("--split", default="t10k", choices=["t10k", "train"])
    parser.add_argument("--images", type=int, default=2000, help="use the first so many")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--rows", nargs="+", help="names of the rows to measure (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = create_model(args.model)
    load_checkpoint(model, str(args.weights))
    configs = SWIN_CONFIGS if args.model == "swin" else CONFIGS
    for name in args.rows or ():
        if name not in configs:
            parser.error(f"--rows {name!r} is not one of {', '.join(map(repr, configs))}")
    configs = {name: configs[name] for name in args.rows or configs}
    images, labels = (x[: args.images].to(args.device) for x in load_images(args.data, args.split))
    model.to(args.device)
    contenders = [
        None,
        *(token_merge_plugin.MergeConfig(rate, **options) for options in configs.values() for rate in args.keep_rates),
    ]
    macs = [count_macs(plan(model, config), images[:1]) for config in contenders]
    sums = [Counts() for _ in contenders]
    for batch in tqdm(range(0, len(images), 50), desc="batches"):
        part = slice(batch, batch + 50)
        counts = compare(model.eval(), contenders, images[part], labels[part], batch_size=50)
        sums = [total.add(more) for total, more in zip(sums, counts, strict=True)]
    n = len(images)
    print(f"{n} images, unpatched: top-1 {sums[0].top1 / n:.2%}, {macs[0] / 1e9:.3f} GMACs")
    print(f"torch {torch.__version__}, timm {timm.__version__}, token_merge_plugin {token_merge_plugin.__version__}\n")
    heads = [f"{rate}: {what}" for rate in args.keep_rates for what in ("reduction", "top-1", "agreement", "KL")]
    print("| options | " + " | ".join(heads) + " |")
    print("|---" + "|---:" * len(heads) + "|")
    for i, name in enumerate(configs):
        rows = range(1 + i * len(args.keep_rates), 1 + (i + 1) * len(args.keep_rates))
        cells = [
            f"{1 - macs[row] / macs[0]:.1%} | {sums[row].top1 / n:.2%} | {sums[row].agree / n:.2%} | "
            f"{sums[row].kl / n:.1e}"
            for row in rows
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
