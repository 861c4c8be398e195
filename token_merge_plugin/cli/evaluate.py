"""`token-merge evaluate`: the accuracy of one setting."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from token_merge_plugin.cli.options import (
    BUILTIN,
    DTYPES,
    add_command,
    add_config_options,
    add_data_options,
    add_device_options,
    add_model_options,
    asked_config,
    check_outputs,
    is_trained,
    load,
    open_images,
    shows_progress,
    unfinished_log,
    write_text,
)
from token_merge_plugin.cli.printing import print_result
from token_merge_plugin.trial.results import to_json
from token_merge_plugin.trial.run import evaluate


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "accuracy of one setting; several processes under torchrun",
        "Compare the unpatched model with one setting over all images. Under torchrun each process takes its share.",
        "  token-merge evaluate --keep-rate 0.7\n"
        "  token-merge evaluate --model deit_small_patch16_224.fb_in1k --data imagenet/val --method tome --r 13\n"
        "  torchrun --nproc-per-node 8 -m token_merge_plugin evaluate --model ... --data ... --keep-rate 0.7",
    )
    add_config_options(parser)
    add_model_options(parser)
    add_data_options(parser)
    add_device_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of the result, for token-merge report")


def _evaluate(args: argparse.Namespace) -> int:
    check_outputs(args.json)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    try:
        model = load(args)
        config = asked_config(args, model)
        data = open_images(args, model, rank=rank, world_size=world_size)
        log = unfinished_log(args, rank, world_size)
        result = evaluate(
            model,
            data,
            config,
            name=args.model or BUILTIN,
            dtype=DTYPES[args.amp or "float32"],
            trained=is_trained(args),
            log=log,
            command=args.command_line,
            progress=shows_progress(args) and rank == 0,
        )
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()
    result = replace(result, checkpoint=str(args.checkpoint or ""))
    interrupted = result.images < result.total_images
    if rank == 0:
        print_result(result)
        if args.json:
            write_text(args.json, to_json(result))
        if interrupted:
            print(f"token-merge: interrupted. The same command goes on from here ({log}).", file=sys.stderr)
    if interrupted:
        return 130
    log.unlink()
    return 0
