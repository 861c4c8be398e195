"""`token-merge calibrate`: the schedule for a model and a budget."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from token_merge_plugin.cli.options import (
    DTYPES,
    add_command,
    add_data_options,
    add_device_options,
    add_model_options,
    asked_batch_size,
    check_outputs,
    given_options,
    load,
    open_images,
    share,
    shows_progress,
    unfinished_log,
)
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError, DataError
from token_merge_plugin.trial.budgets import WORK
from token_merge_plugin.trial.calibration import Calibration, calibrate
from token_merge_plugin.trial.fusion import remembered
from token_merge_plugin.trial.measuring import keep_freed_memory


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "calibrate",
        _calibrate,
        "choose the stages, keep rates and options for your model and a budget, without labels",
        "Find the schedule that moves the model's output the least, for a share of its work, on some of your images.\n"
        "The file that is written is for --config of the other commands, and for MergeConfig.from_json.",
        "  token-merge calibrate --target 0.67 && token-merge evaluate --config token-merge.json\n"
        "  token-merge calibrate --model deit_small_patch16_224.fb_in1k --data photos --budget latency --target 0.7",
    )
    group = parser.add_argument_group("what is looked for")
    group.add_argument(
        "--target", type=share, default=0.67, metavar="SHARE", help="of the work that is left (default: 0.67)"
    )
    group.add_argument("--budget", choices=WORK, default="compute", help="what work is: multiply-adds, or time")
    group.add_argument(
        "--output", type=Path, default=Path("token-merge.json"), metavar="FILE", help="default: token-merge.json"
    )
    group.add_argument("--force", action="store_true", help="replace the output, whatever it is")
    add_model_options(parser)
    add_data_options(parser)
    add_device_options(parser)
    parser.set_defaults(num_images=300, unlabelled=True)


def _calibrate(args: argparse.Namespace) -> int:
    check_outputs(args.output)
    if not args.force:
        _check_is_ours(args.output)
    keep_freed_memory()
    model = load(args)
    if remembered(model).fusion:
        raise ConfigError(
            f"{args.checkpoint} has a learned fusion, trained for stages of its own: others cannot be chosen. "
            "Calibrate before fine-tuning."
        )
    images = open_images(args, model)
    log = unfinished_log(args)
    reached: list[Calibration] = []
    try:
        with torch.autocast(args.device.type, DTYPES[args.amp or "float32"], enabled=args.amp is not None):
            config = calibrate(
                model,
                images,
                args.target,
                budget=args.budget,
                num_images=None,  # that many were opened
                batch_size=asked_batch_size(args),
                seed=args.seed,
                progress=shows_progress(args),
                log=log,
                report=reached.append,
            )
    except KeyboardInterrupt:
        print(f"token-merge: interrupted. The same command goes on from here ({log}).", file=sys.stderr)
        return 130
    assert isinstance(config.keep_rate, Mapping)
    for block, rate in config.keep_rate.items():
        print(f"block {block}: keep rate {rate:.3f}")
    print(f"importance: {config.importance}")
    if not config.proportional_attention:
        print("proportional attention: off")
    print(*reached)
    text = config.to_json() + "\n"
    print(text, end="", flush=True)  # in front of the file, which may fail after all
    args.output.write_text(text, encoding="utf-8")
    log.unlink(missing_ok=True)
    print(f"Written: {args.output}. To try it on all images:")
    print(shlex.join(["token-merge", "evaluate", "--config", str(args.output), *given_options(args)]))
    return 0


def _check_is_ours(path: Path) -> None:
    """Refuse to replace a file that is no config of this package: a model's own config.json, for example."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        ours = MergeConfig.from_json(text) != MergeConfig()
    except (ConfigError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise DataError(f"{path} is there already, and was not written by this command. Name another, or add --force.")
