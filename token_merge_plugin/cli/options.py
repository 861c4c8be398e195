"""Options that several subcommands share, and what they ask for: a model, images, a config."""

import argparse
import os
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from token_merge_plugin.config import METHODS, MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, first_line
from token_merge_plugin.trial.data import DEFAULT_WORKERS, Data, open_data
from token_merge_plugin.trial.fusion import remembered, with_fusion
from token_merge_plugin.trial.models import data_config, load_model

BUILTIN = "the built-in ViT"
# As timm's validate.py takes them, apart from the first.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
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
    parser.set_defaults(run=run, command=name)
    return parser


def add_model_options(parser: Any, positional: bool = False) -> None:
    group = parser.add_argument_group("model (default: the built-in one)")
    name, few = ("model", {"nargs": "?"}) if positional else ("--model", {})
    group.add_argument(name, **few, metavar="NAME", help="timm's name, hf-hub:ID or local-dir:FOLDER")
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
    group.add_argument("--split", metavar="NAME", help="default: validation, if there are splits")
    group.add_argument("--class-map", type=Path, metavar="FILE", help="one folder name a line, in the classes' order")
    group.add_argument("--input-key", metavar="KEY", help="field of the image in hfds/ and wds/")
    group.add_argument("--target-key", metavar="KEY", help="field of the label in hfds/ and wds/")
    group.add_argument("--unlabelled", action="store_true", help="ignore the labels: compare with the unpatched model")
    group.add_argument("--num-images", type=positive, metavar="N", help="so many of them, chosen by --seed")
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="as timm's validate.py")
    group.add_argument("--interpolation", metavar="NAME", help="as timm's validate.py")
    group.add_argument(
        "--workers",
        type=not_negative,
        default=DEFAULT_WORKERS,
        metavar="N",
        help=f"processes that read images (default: {DEFAULT_WORKERS})",
    )


def add_device_options(parser: Any, batch_size: bool = True, amp: bool = True) -> None:
    group = parser.add_argument_group("running")
    if batch_size:
        group.add_argument("--batch-size", type=positive, metavar="N", help="default: 50, with CUDA 256")
    group.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:1 (default: cuda, if there is one)",
    )
    if amp:
        group.add_argument(
            "--amp", choices=[name for name in DTYPES if name != "float32"], help="autocast to this dtype"
        )
    group.add_argument("--seed", type=int, default=0, help="of random weights and of --num-images (default: 0)")


def add_contender_options(parser: Any) -> None:
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--keep-rate",
        "--keep-rates",
        dest="keep_rates",
        type=_rates,
        nargs="+",
        metavar="RATE",
        help=f"settings, each one rate or one a stage: 0.7 0.9,0.7,0.5 (default: {' '.join(map(str, KEEP_RATES))})",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        default=["merge"],
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}, at equal multiply-adds (default: merge)",
    )
    group.add_argument("--stages", type=_blocks, metavar="BLOCKS", help="in which merge reduces tokens, such as 2,5,8")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="of token-merge calibrate, instead of rates and stages"
    )


def add_config_options(parser: Any) -> None:
    group = parser.add_argument_group("what is applied (default: what the checkpoint was fine-tuned with, if anything)")
    group.add_argument(
        "--keep-rate", type=_rates, metavar="RATE", help="one, or one a stage: 0.9,0.7,0.5 (default: 0.7)"
    )
    group.add_argument("--method", choices=METHODS, help="default: merge")
    group.add_argument("--r", type=int, metavar="TOKENS", help="of tome, instead of --keep-rate: merged in each block")
    group.add_argument("--stages", type=_blocks, metavar="BLOCKS", help="that reduce tokens, such as 2,5,8")
    group.add_argument("--config", type=Path, metavar="FILE", help="of token-merge calibrate, instead of all these")


def _rates(text: str) -> float | tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no keep rate such as 0.7, nor one a stage: 0.9,0.7,0.5"
        ) from None
    return rates[0] if len(rates) == 1 else rates


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 0.67")
    return value


def _blocks(text: str) -> list[int]:
    try:
        return [int(block) for block in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no indices of blocks, such as 2,5,8") from None


def positive(text: str) -> int:
    return _whole_number(text, 1)


def not_negative(text: str) -> int:
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text} is not available: {first_line(error)}") from error


def asked_config(args: argparse.Namespace, model: nn.Module | None = None) -> MergeConfig:
    """Return the config that is asked for: by --config, by the options, or by the model's checkpoint.

    Args:
        model: whose checkpoint counts; None for none.
    """
    options = {name: getattr(args, name) for name in ("keep_rate", "method", "r", "stages")}
    given = {name: value for name, value in options.items() if value is not None}
    config = MergeConfig(0.7) if model is None else remembered(model).config or MergeConfig(0.7)
    if args.config is not None:
        _refuse_beside_config(args, given)
        config = _read_config(args.config)
    elif given:
        config = MergeConfig(given.pop("keep_rate", 0.7), **given)
    return config if model is None else with_fusion(config, model)


def asked_settings(args: argparse.Namespace, model: nn.Module) -> tuple[list[MergeConfig], list[str]]:
    """Return the settings that methods are to be compared at, and the methods."""
    if args.config is None:
        stages = args.stages
        settings = [MergeConfig(rate, stages=stages) for rate in args.keep_rates or KEEP_RATES]
        methods = args.methods
    else:
        _refuse_beside_config(args, [name for name in ("keep_rates", "stages") if getattr(args, name) is not None])
        settings = [_read_config(args.config)]
        methods = [*dict.fromkeys([settings[0].method, *args.methods])]
    return [with_fusion(setting, model) for setting in settings], methods


def _refuse_beside_config(args: argparse.Namespace, given: Iterable[str]) -> None:
    names = ["--keep-rate" if name.startswith("keep_rate") else f"--{name}" for name in given]
    if names:
        raise ConfigError(f"--config {args.config} says all of it: leave {' and '.join(names)} out, or leave it out.")


def _read_config(path: Path) -> MergeConfig:
    try:
        return MergeConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a file of token-merge calibrate.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} Give a file of token-merge calibrate.") from error


def load(args: argparse.Namespace, dynamic_size: bool = False) -> nn.Module:
    torch.manual_seed(args.seed)
    return load_model(
        args.model,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        pretrained=not args.no_pretrained,
        num_classes=args.num_classes,
        img_size=args.img_size,
        in_chans=args.in_chans,
        dynamic_size=dynamic_size,
    ).to(args.device)


def is_trained(args: argparse.Namespace) -> bool:
    return not args.no_pretrained or args.checkpoint is not None


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


def shows_progress(args: argparse.Namespace) -> bool:
    """Return whether bars are shown: on a terminal, unless --quiet is given."""
    return not args.quiet and sys.stderr.isatty()


# What may differ when the same work is taken up again.
_NOT_OF_THE_WORK = ("html", "png", "json", "csv", "output", "force", "log", "command_line", "run", "quiet", "verbose")


def unfinished_log(args: argparse.Namespace, rank: int = 0, world_size: int = 1) -> Path:
    """Return the file, in this folder, in which the same command finds what it measured before; say if it is there.

    Args:
        rank, world_size: each of several processes has a file of its own.
    """
    # `run` is a function: as text it has its address, which differs from process to process.
    settings = {name: str(value) for name, value in vars(args).items() if name not in _NOT_OF_THE_WORK}
    process = f"-{rank}-of-{world_size}" if world_size > 1 else ""
    log = Path(f"token-merge-{args.command}-{sha256(repr(settings).encode()).hexdigest()[:8]}{process}.jsonl")
    check_outputs(log)
    say_going_on(log)
    return log


def say_going_on(log: Path) -> None:
    if log.exists():
        print(f"token-merge: going on from the results in {log}.", file=sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Write a file of results, and say so."""
    path.write_text(text, encoding="utf-8")
    print(f"Written: {path}")


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
