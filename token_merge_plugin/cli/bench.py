"""`token-merge bench`: speed alone."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from token_merge_plugin.cli.options import (
    BUILTIN,
    DTYPES,
    add_command,
    add_contender_options,
    add_device_options,
    add_model_options,
    asked_settings,
    check_outputs,
    is_trained,
    load,
    positive,
    shows_progress,
    write_text,
)
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.measuring import keep_freed_memory
from token_merge_plugin.trial.models import data_config
from token_merge_plugin.trial.results import TrialResult, csv_of_all, json_of_all
from token_merge_plugin.trial.run import device_name, run_trial, versions
from token_merge_plugin.trial.table import format_table


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        _bench,
        "speed alone, on random images",
        "Time a model unpatched and patched, in turns, on random images. Weights do not matter: --no-pretrained does\n"
        "without them.",
        "  token-merge bench --model deit_small_patch16_224 --no-pretrained --batch-sizes 1 8 64\n"
        "  token-merge bench --model vit_large_patch16_224 --methods merge tome --device cuda --amp bfloat16",
    )
    add_contender_options(parser)
    add_model_options(parser)
    add_device_options(parser, batch_size=False)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[8], metavar="N", help="default: 8")
    parser.add_argument("--rounds", type=positive, default=20, help="of each setting (default: 20)")
    parser.add_argument("--compile", action="store_true", help="time compiled models")
    group = parser.add_argument_group("results")
    group.add_argument("--json", type=Path, metavar="FILE", help="a list with the result of each batch size")
    group.add_argument("--csv", type=Path, metavar="FILE", help="a line for each batch size and setting")


def _bench(args: argparse.Namespace) -> int:
    check_outputs(args.json, args.csv)
    keep_freed_memory()
    model = load(args)
    settings, methods = asked_settings(args, model)
    size = data_config(model, img_size=args.img_size)["input_size"]
    compiled = ", compiled" if args.compile else ""
    print(f"{args.model or BUILTIN}, {args.amp or 'float32'}, {device_name(args.device)}{compiled}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    results: list[TrialResult] = []
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, *size, device=args.device)
        result = run_trial(
            model,
            Tensors(images, batch_size=batch_size),
            settings,
            methods,
            name=args.model or BUILTIN,
            dtype=DTYPES[args.amp or "float32"],
            accuracy=False,
            trained=is_trained(args),
            compiled=args.compile,
            rounds=args.rounds,
            seconds=float("inf"),
            command=args.command_line,
            progress=shows_progress(args),
        )
        results.append(replace(result, checkpoint=str(args.checkpoint or "")))
        print(f"\nbatch {result.batch_size}\n\n{format_table(result)}")
        if result.images < result.total_images:
            break
    if args.json:
        write_text(args.json, json_of_all(results))
    if args.csv:
        write_text(args.csv, csv_of_all(results))
    return 130 if result.images < result.total_images else 0
