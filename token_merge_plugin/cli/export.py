"""`token-merge export`: a patched model as a file for another runtime."""

import argparse
from pathlib import Path
from typing import Any

from token_merge_plugin.cli.options import (
    BUILTIN,
    add_command,
    add_config_options,
    add_data_options,
    add_device_options,
    add_model_options,
    asked_config,
    check_outputs,
    load,
    not_negative,
    open_images,
)
from token_merge_plugin.trial.exporting import BATCH_SIZES, TOLERANCE, check_place, export, random_images
from token_merge_plugin.trial.images import AnyImages
from token_merge_plugin.trial.measuring import keep_freed_memory
from token_merge_plugin.trial.runtimes import RUNTIMES, find_runtime


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        "write a patched model for ONNX Runtime, OpenVINO, torch.export or AOTInductor, and check it",
        "Export a model with token merging, run the file in its runtime, compare its outputs with the model's, and\n"
        "time it in turns with the unpatched model, exported likewise. There is no file where outputs differ.",
        "  token-merge export deit_small_patch16_224.fb_in1k --keep-rate 0.7 --to onnx --dynamic-batch -o deit.onnx\n"
        "  token-merge export vit_base_patch16_224 --checkpoint mine.safetensors --num-classes 12 --data photos \\\n"
        "      --config token-merge.json --to openvino -o mine.xml",
    )
    add_model_options(parser, positional=True)
    group = parser.add_argument_group("file")
    group.add_argument("--to", choices=RUNTIMES, default="onnx", help="default: onnx")
    group.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".onnx, .xml or .pt2")
    group.add_argument("--dynamic-batch", action="store_true", help="take batches of any size; else of one image")
    group.add_argument(
        "--dynamic-size", action="store_true", help="take images of any size that the model takes; else of one"
    )
    group.add_argument("--force", action="store_true", help="replace the output, whatever it is")
    group = parser.add_argument_group("check")
    group.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="SHARE",
        help=f"largest difference allowed, as a share of the largest output (default: {TOLERANCE:g})",
    )
    group.add_argument("--rounds", type=not_negative, default=20, help="that are timed; 0 for none (default: 20)")
    add_config_options(parser)
    add_data_options(parser)
    add_device_options(parser, batch_size=False, amp=False)
    parser.set_defaults(batch_size=BATCH_SIZES[-1], num_images=64, unlabelled=True)


def _export(args: argparse.Namespace) -> int:
    check_outputs(args.output)
    check_place(args.output, find_runtime(args.to), args.force)
    keep_freed_memory()
    model = load(args, dynamic_size=args.dynamic_size)
    config = asked_config(args, model)
    print(args.model or BUILTIN, flush=True)
    done = export(
        model,
        args.output,
        args.to,
        config,
        images=_images(args, model),
        dynamic_batch=args.dynamic_batch,
        dynamic_size=args.dynamic_size,
        replace=args.force,
        tolerance=args.tolerance,
        rounds=args.rounds,
    )
    print(done)
    print(f"Written: {', '.join(map(str, done.files))}")
    return 0


def _images(args: argparse.Namespace, model: Any) -> AnyImages:
    """Return the images that are given; random ones where the model is not the built-in one and none are."""
    if args.model is not None and args.data is None and not args.dataset:
        return random_images(model, args.img_size)
    return open_images(args, model)
