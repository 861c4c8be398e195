"""Options that several subcommands share, and what they ask for: a model, images, a config."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from token_merge_plugin.config import METHODS, MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, first_line
from token_merge_plugin.trial.data import DEFAULT_WORKERS, Data, open_data
from token_merge_plugin.trial.models import data_config, load_model

BUILTIN = "the built-in ViT"
# As timm's validate.py takes them, apart from the first.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXIT_CODES = "exit codes: 0 done, 1 a failure, 2 bad input, 130 interrupted"


def add_command(commands: Any, name: str, run: Any, help: str, description: str, examples: str) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    volume.add_argument("-v", "--verbose", action="store_true", help="timm's log, and tracebacks of errors")
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: Any) -> None:
    group = parser.add_argument_group("model (default: the built-in one)")
    group.add_argument("--model", metavar="NAME", help="timm's name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, instead of the pretrained ones")
    group.add_argument("--use-ema", action="store_true", help="the checkpoint's moving average of the weights")
    group.add_argument("--no-pretrained", action="store_true", help="random weights: for speed alone")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes of the classifier")
    group.add_argument("--img-size", type=positive, metavar="PIXELS", help="side of the input")
    group.add_argument("--in-chans", type=positive, metavar="N", help="channels of the input")


def add_data_options(parser: Any) -> None:
    group = parser.add_argument_group("images (default: the built-in ones)")
    group.add_argument("--data", type=Path, metavar="FOLDER", help="images, in one folder a class or in none")
    group.add_argument("--dataset", default="", metavar="NAME", help="hfds/NAME, torch/NAME or wds/, as timm has them")
    group.add_argument("--split", default="validation", metavar="NAME")
    group.add_argument("--class-map", type=Path, metavar="FILE", help="one folder name a line, in the classes' order")
    group.add_argument("--input-key", metavar="KEY", help="field of the image in hfds/ and wds/")
    group.add_argument("--target-key", metavar="KEY", help="field of the label in hfds/ and wds/")
    group.add_argument("--unlabelled", action="store_true", help="ignore the labels: compare with the unpatched model")
    group.add_argument("--num-images", type=positive, metavar="N", help="so many of them, chosen by --seed")
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="as timm's validate.py")
    group.add_argument("--interpolation", metavar="NAME", help="as timm's validate.py")
    group.add_argument(
        "--workers",
        type=int,
        default=DEFAULT_WORKERS,
        metavar="N",
        help=f"processes that read images (default: {DEFAULT_WORKERS})",
    )


def add_device_options(parser: Any, batch_size: bool = True) -> None:
    group = parser.add_argument_group("running")
    if batch_size:
        group.add_argument("--batch-size", type=positive, metavar="N", help="default: 50, with CUDA 256")
    group.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--amp", choices=[name for name in DTYPES if name != "float32"], help="autocast to this dtype")
    group.add_argument("--seed", type=int, default=0, help="of random weights and of --num-images (default: 0)")


def add_contender_options(parser: Any) -> None:
    group = parser.add_argument_group("what is compared")
    group.add_argument("--keep-rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5], metavar="RATE")
    group.add_argument(
        "--methods",
        nargs="+",
        default=["merge"],
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}, at equal multiply-adds (default: merge)",
    )
    group.add_argument("--stages", type=_blocks, metavar="BLOCKS", help="in which merge reduces tokens, such as 2,5,8")


def add_config_options(parser: Any) -> None:
    group = parser.add_argument_group("what is applied")
    group.add_argument(
        "--keep-rate", type=_rates, default=0.7, metavar="RATE", help="one, or one a stage: 0.9,0.7,0.5 (default: 0.7)"
    )
    group.add_argument("--method", default="merge", choices=METHODS)
    group.add_argument("--r", type=int, metavar="TOKENS", help="of tome, instead of --keep-rate: merged in each block")
    group.add_argument("--stages", type=_blocks, metavar="BLOCKS", help="that reduce tokens, such as 2,5,8")
    group.add_argument("--config", type=Path, metavar="FILE", help="of token-merge calibrate, instead of all these")


def _rates(text: str) -> float | list[float]:
    rates = [float(rate) for rate in text.split(",")]
    return rates[0] if len(rates) == 1 else rates


def _blocks(text: str) -> list[int]:
    return [int(block) for block in text.split(",")]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text} is not available: {first_line(error)}") from error


def asked_config(args: argparse.Namespace) -> MergeConfig:
    if args.config is not None:
        try:
            return MergeConfig.from_json(args.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.config} cannot be read: {error}. Give a file of token-merge calibrate.") from error
    return MergeConfig(args.keep_rate, method=args.method, r=args.r, stages=args.stages)


def load(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    return load_model(
        args.model,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        pretrained=not args.no_pretrained,
        num_classes=args.num_classes,
        img_size=args.img_size,
        in_chans=args.in_chans,
    ).to(args.device)


def open_images(args: argparse.Namespace, model: nn.Module, **shard: int) -> Data:
    if args.model is not None and args.data is None and not args.dataset:
        raise ConfigError(f"--model {args.model} needs images to look at: give --data FOLDER, or --dataset NAME.")
    config = data_config(model, img_size=args.img_size, crop_pct=args.crop_pct, interpolation=args.interpolation)
    return open_data(
        args.data,
        config,
        dataset=args.dataset,
        split=args.split,
        class_map=args.class_map,
        input_key=args.input_key,
        target_key=args.target_key,
        num_classes=getattr(model, "num_classes", None),
        unlabelled=args.unlabelled,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=asked_batch_size(args),
        workers=args.workers,
        device=args.device,
        **shard,
    )


def check_outputs(*paths: Path | None) -> None:
    """Raise now what would keep results from being written when all the work is done.

    Args:
        paths: of files that will be written, or replaced; None for none.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.resolve().parent
        reason = None
        if not folder.is_dir():
            reason = f"there is no folder {path.parent}"
        elif path.is_dir():
            reason = "it is a folder"
        elif not os.access(path if path.exists() else folder, os.W_OK):
            reason = "there is no permission to"
        if reason is not None:
            raise DataError(f"{path} cannot be written: {reason}. Give another file.")


def asked_batch_size(args: argparse.Namespace) -> int:
    return args.batch_size or (256 if args.device.type == "cuda" else 50)


def given_options(args: argparse.Namespace) -> list[str]:
    """Return the options of model, images and device that were given, as they are written on a command line.

    Without which and how many of the images were to be looked at.
    """
    parser = argparse.ArgumentParser()
    for add in (add_model_options, add_data_options, add_device_options):
        add(parser)
    words = []
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if value != default and name not in ("num_images", "unlabelled"):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words
