"""`token-merge trial`: is it worth it?"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm  # a dependency of timm's own dependency huggingface_hub

from token_merge_plugin.cli.options import (
    BUILTIN,
    DTYPES,
    add_command,
    add_contender_options,
    add_data_options,
    add_device_options,
    add_model_options,
    asked_settings,
    check_outputs,
    is_trained,
    load,
    open_images,
    say_going_on,
    shows_progress,
    unfinished_log,
)
from token_merge_plugin.cli.printing import print_result
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import UnsupportedModelError
from token_merge_plugin.patching import remove
from token_merge_plugin.trial.data import Data
from token_merge_plugin.trial.drawing import Picture, picture_stages
from token_merge_plugin.trial.judging import best_row, setting_of
from token_merge_plugin.trial.measuring import keep_freed_memory, plan
from token_merge_plugin.trial.report import require_charts, write_html, write_png
from token_merge_plugin.trial.results import TrialResult, to_csv, to_json
from token_merge_plugin.trial.run import run_trial
from token_merge_plugin.trial.tracing import trace


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "trial",
        _trial,
        "is it worth it? what each keep rate saves and costs, on your model and your images",
        "Run a model unpatched and patched over the same images: compute, speed, memory, accuracy, in a table and, if\n"
        "asked for, in a report. Images without labels are fine: the unpatched model's predictions stand in for them.",
        "  token-merge trial --html report.html\n"
        "  token-merge trial --model deit_small_patch16_224.fb_in1k --data imagenet/validation \\\n"
        "      --methods merge tome evit prune --keep-rates 0.9 0.7 0.5 --amp bfloat16 --html report.html\n"
        "  token-merge trial --model vit_base_patch16_224 --checkpoint mine.safetensors --num-classes 12 --data photos",
    )
    add_contender_options(parser)
    add_model_options(parser)
    add_data_options(parser)
    add_device_options(parser)
    parser.add_argument("--compile", action="store_true", help="measure the speed of compiled models")
    group = parser.add_argument_group("results")
    group.add_argument("--html", type=Path, metavar="FILE", help="the report, one file")
    group.add_argument("--png", type=Path, metavar="FILE", help="the chart of accuracy against speed")
    group.add_argument("--json", type=Path, metavar="FILE", help="all of the result, for token-merge report")
    group.add_argument("--csv", type=Path, metavar="FILE", help="the table, a line for each row")
    group.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="results as they come, as JSON lines, from which the same command goes on (default: a file in this "
        "folder while the trial runs)",
    )


def _trial(args: argparse.Namespace) -> int:
    if args.html or args.png:
        require_charts()
    check_outputs(args.html, args.png, args.json, args.csv, args.log)
    keep_freed_memory()
    model = load(args)
    settings, methods = asked_settings(args, model)
    data = open_images(args, model)
    if args.log:
        say_going_on(args.log)
    log = args.log or unfinished_log(args)
    result = run_trial(
        model,
        data,
        settings,
        methods,
        name=args.model or BUILTIN,
        dtype=DTYPES[args.amp or "float32"],
        trained=is_trained(args),
        compiled=args.compile,
        log=log,
        command=args.command_line,
        progress=shows_progress(args),
    )
    result = replace(result, checkpoint=str(args.checkpoint or ""))
    print_result(result)
    _write(args, model, data, result)
    if result.images < result.total_images:
        print(f"token-merge: interrupted. The same command goes on from here ({log}).", file=sys.stderr)
        return 130
    if not args.log:
        log.unlink()
    return 0


def _write(args: argparse.Namespace, model: nn.Module, data: Data, result: TrialResult) -> None:
    """Write the result into all the files that are asked for."""
    if args.json:
        args.json.write_text(to_json(result), encoding="utf-8")
    if args.csv:
        args.csv.write_text(to_csv(result), encoding="utf-8")
    if args.png:
        write_png(result, args.png)
    if args.html:
        write_html(result, _pictures(model, data, result, shows_progress(args)), args.html)
    for path in filter(None, (args.html, args.png, args.json, args.csv)):
        print(f"Written: {path}")


def _pictures(model: nn.Module, data: Data, result: TrialResult, progress: bool, number: int = 12) -> list[Picture]:
    """Draw what the recommended setting does to a dozen of the images; none if the model's tokens cannot be drawn."""
    row = best_row(result) or next((row for row in result.rows if row.keep_rate == 0.7), result.rows[-1])
    if row.config is None:
        return []
    plan(model, MergeConfig.from_json(row.config))
    step = max(1, len(data) // number)
    chosen = data.subset(data.indices[::step][:number])
    pictures = []
    try:
        with tqdm(total=len(chosen), desc="pictures", unit="image", leave=False, disable=not progress) as bar:
            for batch in chosen:
                for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                    drawn = data.picture(index)
                    caption = f"{data.filename(index)}: {row.method} at {setting_of(row)}"
                    pictures.append(Picture(drawn, caption, picture_stages(drawn, trace(model, image[None]))))
                    bar.update()
    except UnsupportedModelError as error:
        print(f"No pictures in the report: {error}")
    finally:
        remove(model)
    return pictures
