"""`token-merge trial`: is it worth it?"""

import argparse
import sys
from hashlib import sha256
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
    check_outputs,
    load,
    open_images,
)
from token_merge_plugin.cli.printing import print_result
from token_merge_plugin.errors import UnsupportedModelError
from token_merge_plugin.patching import apply, remove
from token_merge_plugin.trial.data import Data
from token_merge_plugin.trial.drawing import Picture, picture_stages
from token_merge_plugin.trial.judging import best_row
from token_merge_plugin.trial.measuring import keep_freed_memory
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
    group = parser.add_argument_group("results")
    group.add_argument("--html", type=Path, metavar="FILE", help="the report, one file")
    group.add_argument("--png", type=Path, metavar="FILE", help="the chart of accuracy against speed")
    group.add_argument("--json", type=Path, metavar="FILE")
    group.add_argument("--csv", type=Path, metavar="FILE")
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
    data = open_images(args, model)
    log = args.log or _unfinished_log(args)
    if log.exists():
        print(f"token-merge: going on behind the results in {log}.", file=sys.stderr)
    result = run_trial(
        model,
        data,
        args.keep_rates,
        args.methods,
        name=args.model or BUILTIN,
        dtype=DTYPES[args.amp or "float32"],
        log=log,
        command=args.command_line,
        progress=not args.quiet,
        **({"stages": args.stages} if args.stages else {}),
    )
    print_result(result)
    _write(args, model, data, result)
    if result.images < result.total_images:
        print(f"token-merge: interrupted. The same command goes on from here ({log}).", file=sys.stderr)
        return 130
    if not args.log:
        log.unlink()
    return 0


def _unfinished_log(args: argparse.Namespace) -> Path:
    """Return the file, in this folder, in which the same command finds what it measured before."""
    # `run` is a function: as text it has its address, which differs from process to process.
    others = ("html", "png", "json", "csv", "command_line", "run")
    settings = {name: str(value) for name, value in vars(args).items() if name not in others}
    return Path(f"token-merge-trial-{sha256(repr(settings).encode()).hexdigest()[:8]}.jsonl")


def _write(args: argparse.Namespace, model: nn.Module, data: Data, result: TrialResult) -> None:
    """Write the result into all the files that are asked for."""
    if args.json:
        args.json.write_text(to_json(result), encoding="utf-8")
    if args.csv:
        args.csv.write_text(to_csv(result), encoding="utf-8")
    if args.png:
        write_png(result, args.png)
    if args.html:
        write_html(result, _pictures(model, data, result, args.quiet), args.html)
    for path in filter(None, (args.html, args.png, args.json, args.csv)):
        print(f"Written: {path}")


def _pictures(model: nn.Module, data: Data, result: TrialResult, quiet: bool, number: int = 12) -> list[Picture]:
    """Draw what the recommended setting does to a dozen of the images; none if the model's tokens cannot be drawn."""
    row = best_row(result) or next((row for row in result.rows if row.keep_rate == 0.7), result.rows[-1])
    if row.keep_rate is None:
        return []
    apply(model, row.keep_rate, method=row.method)
    step = max(1, len(data) // number)
    chosen = data.subset(data.indices[::step][:number])
    pictures = []
    try:
        with tqdm(total=len(chosen), desc="pictures", unit="image", leave=False, disable=quiet) as bar:
            for batch in chosen:
                for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                    drawn = data.picture(index)
                    caption = f"{data.filename(index)}: {row.method} at {row.keep_rate:g}"
                    pictures.append(Picture(drawn, caption, picture_stages(drawn, trace(model, image[None]))))
                    bar.update()
    except UnsupportedModelError as error:
        print(f"No pictures in the report: {error}")
    finally:
        remove(model)
    return pictures
