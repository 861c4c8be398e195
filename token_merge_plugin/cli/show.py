"""`token-merge show`: which tokens are kept and merged, drawn over an image."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from token_merge_plugin.cli.options import (
    BUILTIN,
    add_command,
    add_config_options,
    add_device_options,
    add_model_options,
    asked_config,
    check_outputs,
    load,
)
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import DataError
from token_merge_plugin.trial.data import open_data
from token_merge_plugin.trial.drawing import LEGEND, Picture, contact_sheet, picture_stages
from token_merge_plugin.trial.measuring import check_images, plan
from token_merge_plugin.trial.models import class_name, data_config
from token_merge_plugin.trial.run import name_of
from token_merge_plugin.trial.tracing import trace


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "show",
        _show,
        "draw which tokens are kept and merged, over an image",
        "Draw for each stage what the tokens stand for: crucial patches keep their pixels, merged ones have the mean\n"
        "colour of their token, dropped ones are dark. Above: the prediction before and after.",
        "  token-merge show photo.jpg --model deit_small_patch16_224.fb_in1k --keep-rate 0.5 --output photo-tokens.png",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a file")
    parser.add_argument("--output", type=Path, default=Path("tokens.png"), metavar="FILE", help="default: tokens.png")
    add_config_options(parser)
    add_model_options(parser)
    add_device_options(parser, batch_size=False)


def _show(args: argparse.Namespace) -> int:
    check_outputs(args.output)
    model = load(args)
    data = open_data(args.image, data_config(model, img_size=args.img_size), workers=0, device=args.device)
    batch, drawn = next(iter(data)), data.picture(int(data.indices[0]))
    check_images(model, batch.images)
    config = asked_config(args, model)
    before = prediction(model, batch.images)
    plan(model, config)
    after = prediction(model, batch.images)
    heading = [f"{args.model or BUILTIN}, method {config.method}, {_setting(config)}"]
    if before and after:
        heading.append(f"Prediction: {before} unpatched, {after} patched.")
    stages = trace(model, batch.images)
    sheet = contact_sheet([Picture(drawn, args.image.name, picture_stages(drawn, stages))], [*heading, LEGEND])
    try:
        sheet.save(args.output)
    except (OSError, ValueError) as error:
        raise DataError(f"{args.output} cannot be written: {error}.") from error
    print("\n".join(heading))
    for stage in stages:
        print(f"block {stage.block}: {len(stage.representative)} of {len(stage.token_map)} tokens")
    print(f"Written: {args.output}")
    return 0


def _setting(config: MergeConfig) -> str:
    name = name_of(config)
    return f"keep rate {name}" if isinstance(config.keep_rate, float) and config.r is None else f"setting {name}"


@torch.inference_mode()
def prediction(model: Any, image: Tensor) -> str:
    """Return the most probable class of an image [1, C, H, W] and its probability; nothing for other outputs."""
    output = model(image)
    if not isinstance(output, Tensor) or output.ndim != 2 or not getattr(model, "num_classes", 0):
        return ""
    probability, index = output.float().softmax(1)[0].max(0)
    return f"{class_name(model, int(index))} ({probability:.0%})"
