"""The command `token-merge`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from token_merge_plugin import __version__
from token_merge_plugin.builtin import FOLDER, create_reference_model, load_images
from token_merge_plugin.errors import TokenMergeError
from token_merge_plugin.listing import format_families, list_families
from token_merge_plugin.patching import models_by_adapter
from token_merge_plugin.trial import format_table, run_trial


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; return its exit code: 0, or 2 for bad input, or 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except TokenMergeError as error:
        print(f"token-merge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("token-merge: interrupted.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token-merge", description="Token pruning-and-merging for timm vision transformers, without training."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    trial = commands.add_parser(
        "trial",
        help="measure what each keep rate saves and costs",
        description="Classify real images with a trained ViT, unpatched and patched at several keep rates.",
        epilog="example: token-merge trial --keep-rates 0.8 0.6 --data /usr/share/datasets/fashion-mnist",
    )
    trial.add_argument("--keep-rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5], metavar="RATE")
    trial.add_argument(
        "--data",
        type=Path,
        default=FOLDER,
        help="folder of Fashion-MNIST's IDX files, for all 10,000 test images (default: the built-in 1,000)",
    )
    trial.add_argument("--batch-size", type=_positive, default=50)
    trial.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    trial.set_defaults(run=_trial)
    families = commands.add_parser(
        "list",
        help="list the families of models that are served",
        description="List the families of models that are served, what is reduced in each, where the grid is restored, "
        "and the share of the multiply-adds that is left.",
        epilog="example: token-merge list --keep-rate 0.5",
    )
    families.add_argument("--keep-rate", type=float, default=0.7, metavar="RATE")
    families.add_argument(
        "--all", action="store_true", help="count for every model, not for a typical one of each family (minutes)"
    )
    families.set_defaults(run=_list)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text} is not available: {str(error).splitlines()[0]}") from error


def _trial(args: argparse.Namespace) -> None:
    from tqdm import tqdm  # a dependency of timm's own dependency huggingface_hub

    images, labels = load_images(args.data)
    model = create_reference_model().to(args.device)
    images, labels = images.to(args.device), labels.to(args.device)
    passes = (1 + len(args.keep_rates)) * -(-len(images) // args.batch_size)
    with tqdm(total=passes, desc="trial", unit="batch", leave=False) as bar:
        rows = run_trial(model, images, labels, args.keep_rates, batch_size=args.batch_size, progress=bar.update)
    device = torch.cuda.get_device_name(args.device) if images.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"Built-in ViT on {len(images)} test images of Fashion-MNIST, torch {torch.__version__}, {device}.\n")
    print(format_table(rows))
    print("\nagreement, KL: with the unpatched model's outputs. speed-up: median over batches, measured in turns.")


def _list(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    served = models_by_adapter()
    models = sum(map(len, served.values()))
    with tqdm(total=models if args.all else len(served), desc="counting", unit="model", leave=False) as bar:
        rows = list_families(args.keep_rate, every_model=args.all, progress=bar.update)
    print(format_families(rows, args.keep_rate))
    print(
        f"\n{models} models, timm {timm.__version__}. GMACs: of {'all' if args.all else 'a typical one'} of the models."
    )


if __name__ == "__main__":
    sys.exit(main())
