"""`token-merge bench`: speed alone."""

import argparse
from typing import Any

import torch

from token_merge_plugin.cli.options import (
    BUILTIN,
    DTYPES,
    add_command,
    add_contender_options,
    add_device_options,
    add_model_options,
    load,
    positive,
)
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.measuring import keep_freed_memory
from token_merge_plugin.trial.models import data_config
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
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[8], metavar="N")
    parser.add_argument("--rounds", type=positive, default=20, help="of each setting (default: 20)")


def _bench(args: argparse.Namespace) -> int:
    keep_freed_memory()
    model = load(args)
    size = data_config(model, img_size=args.img_size)["input_size"]
    print(f"{args.model or BUILTIN}, {args.amp or 'float32'}, {device_name(args.device)}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, *size, device=args.device)
        result = run_trial(
            model,
            Tensors(images, batch_size=batch_size),
            args.keep_rates,
            args.methods,
            dtype=DTYPES[args.amp or "float32"],
            accuracy=False,
            rounds=args.rounds,
            seconds=float("inf"),
            progress=not args.quiet,
            **({"stages": args.stages} if args.stages else {}),
        )
        print(f"\nbatch {result.batch_size}\n\n{format_table(result)}")
        if result.images < result.total_images:
            raise KeyboardInterrupt
    return 0
