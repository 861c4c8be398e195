"""The command `token-merge`."""

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm  # a dependency of timm's own dependency huggingface_hub

from token_merge_plugin import __version__
from token_merge_plugin.calibration import BUDGETS, calibrate
from token_merge_plugin.config import METHODS, MergeConfig
from token_merge_plugin.data import DEFAULT_WORKERS, Data, data_config, load_model, open_data
from token_merge_plugin.drawing import Picture, contact_sheet, picture_stages
from token_merge_plugin.errors import ConfigError, DataError, TokenMergeError, UnsupportedModelError
from token_merge_plugin.listing import format_families, list_families
from token_merge_plugin.measuring import keep_freed_memory
from token_merge_plugin.patching import apply, models_by_adapter, remove
from token_merge_plugin.pipelines import run_script, uninstall
from token_merge_plugin.report import require_charts, write_html, write_png
from token_merge_plugin.results import TrialResult, best_row, format_table, to_csv, to_json, verdict
from token_merge_plugin.tracing import trace
from token_merge_plugin.trial import Tensors, device_name, evaluate, run_trial, versions

BUILTIN = "the built-in ViT"
# As timm's validate.py takes them, apart from the first.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXIT_CODES = "exit codes: 0 done, 1 a failure, 2 bad input, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; return its exit code: 0, 2 for bad input, or 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["token-merge", *argv])
    uninstall()  # what the environment asks for is for scripts; here it would patch the unpatched model
    logging.getLogger("timm").setLevel(logging.INFO if args.verbose else logging.ERROR)
    try:
        with _short_warnings():
            return args.run(args) or 0
    except TokenMergeError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"token-merge: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"token-merge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("token-merge: interrupted.", file=sys.stderr)
        return 130


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"token-merge: {message}", file=sys.stderr)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token-merge",
        description="Token pruning-and-merging for timm vision transformers, without training.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_trial, _add_evaluate, _add_calibrate, _add_bench, _add_show, _add_list, _add_run):
        add(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, help: str, description: str, examples: str) -> Any:
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


def _add_model_options(parser: Any) -> None:
    group = parser.add_argument_group("model (default: the built-in one)")
    group.add_argument("--model", metavar="NAME", help="timm's name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, instead of the pretrained ones")
    group.add_argument("--use-ema", action="store_true", help="the checkpoint's moving average of the weights")
    group.add_argument("--no-pretrained", action="store_true", help="random weights: for speed alone")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes of the classifier")
    group.add_argument("--img-size", type=_positive, metavar="PIXELS", help="side of the input")
    group.add_argument("--in-chans", type=_positive, metavar="N", help="channels of the input")


def _add_data_options(parser: Any) -> None:
    group = parser.add_argument_group("images (default: the built-in ones)")
    group.add_argument("--data", type=Path, metavar="FOLDER", help="images, in one folder a class or in none")
    group.add_argument("--dataset", default="", metavar="NAME", help="hfds/NAME, torch/NAME or wds/, as timm has them")
    group.add_argument("--split", default="validation", metavar="NAME")
    group.add_argument("--class-map", type=Path, metavar="FILE", help="one folder name a line, in the classes' order")
    group.add_argument("--input-key", metavar="KEY", help="field of the image in hfds/ and wds/")
    group.add_argument("--target-key", metavar="KEY", help="field of the label in hfds/ and wds/")
    group.add_argument("--unlabelled", action="store_true", help="ignore the labels: compare with the unpatched model")
    group.add_argument("--num-images", type=_positive, metavar="N", help="so many of them, chosen by --seed")
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="as timm's validate.py")
    group.add_argument("--interpolation", metavar="NAME", help="as timm's validate.py")
    group.add_argument(
        "--workers",
        type=int,
        default=DEFAULT_WORKERS,
        metavar="N",
        help=f"processes that read images (default: {DEFAULT_WORKERS})",
    )


def _add_device_options(parser: Any, batch_size: bool = True) -> None:
    group = parser.add_argument_group("running")
    if batch_size:
        group.add_argument("--batch-size", type=_positive, metavar="N", help="default: 50, with CUDA 256")
    group.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--amp", choices=[name for name in DTYPES if name != "float32"], help="autocast to this dtype")
    group.add_argument("--seed", type=int, default=0, help="of random weights and of --num-images (default: 0)")


def _add_contender_options(parser: Any) -> None:
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


def _add_config_options(parser: Any) -> None:
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text} is not available: {str(error).splitlines()[0]}") from error


def _config(args: argparse.Namespace) -> MergeConfig:
    if args.config is not None:
        try:
            return MergeConfig.from_json(args.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.config} cannot be read: {error}. Give a file of token-merge calibrate.") from error
    return MergeConfig(args.keep_rate, method=args.method, r=args.r, stages=args.stages)


def _load(args: argparse.Namespace) -> nn.Module:
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


def _open(args: argparse.Namespace, model: nn.Module, **shard: int) -> Data:
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
        batch_size=_batch_size(args),
        workers=args.workers,
        device=args.device,
        **shard,
    )


def _batch_size(args: argparse.Namespace) -> int:
    return args.batch_size or (256 if args.device.type == "cuda" else 50)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _add_trial(commands: Any) -> None:
    parser = _add_command(
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
    _add_contender_options(parser)
    _add_model_options(parser)
    _add_data_options(parser)
    _add_device_options(parser)
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
        require_charts()  # not only after all the work
    for path in (args.html, args.png, args.json, args.csv, args.log):
        if path is not None and not path.resolve().parent.is_dir():
            raise DataError(f"{path} cannot be written: there is no folder {path.parent}.")
    keep_freed_memory()
    model = _load(args)
    data = _open(args, model)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("html", "png", "json", "csv", "command_line")}
    unfinished = Path(f"token-merge-trial-{sha256(repr(settings).encode()).hexdigest()[:8]}.jsonl")
    log = args.log or unfinished
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
    interrupted = result.images < result.total_images
    _print_result(result)
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
    if interrupted:
        print(f"token-merge: interrupted. The same command goes on from here ({log}).", file=sys.stderr)
        return 130
    if not args.log:
        log.unlink()
    return 0


def _print_result(result: TrialResult) -> None:
    print(f"{result.model}, {result.data}, {result.dtype}, batch {result.batch_size}, {result.device}")
    print(", ".join(f"{name} {version}" for name, version in result.versions.items()) + "\n")
    print(format_table(result))
    for method, reason in result.refused.items():
        print(f"\n{method}: not on this model. {reason}")
    if result.unreadable:
        number = len(result.unreadable)
        print(f"\n{number} image{'s' if number > 1 else ''} could not be read: {', '.join(result.unreadable)}")
    print(f"\n{verdict(result)}")


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


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        _evaluate,
        "accuracy of one setting; several processes under torchrun",
        "Compare the unpatched model with one setting over all images. Under torchrun each process takes its share.",
        "  token-merge evaluate --keep-rate 0.7\n"
        "  token-merge evaluate --model deit_small_patch16_224.fb_in1k --data imagenet/val --method tome --r 13\n"
        "  torchrun --nproc-per-node 8 -m token_merge_plugin.cli evaluate --model ... --data ... --keep-rate 0.7",
    )
    _add_config_options(parser)
    _add_model_options(parser)
    _add_data_options(parser)
    _add_device_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")


def _evaluate(args: argparse.Namespace) -> int:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    try:
        model = _load(args)
        result = evaluate(
            model,
            _open(args, model, rank=rank, world_size=world_size),
            _config(args),
            name=args.model or BUILTIN,
            dtype=DTYPES[args.amp or "float32"],
            command=args.command_line,
            progress=not args.quiet and rank == 0,
        )
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()
    if rank == 0:
        _print_result(result)
        if args.json:
            args.json.write_text(to_json(result), encoding="utf-8")
    return 130 if result.images < result.total_images else 0


def _add_calibrate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "calibrate",
        _calibrate,
        "choose the stages and keep rates for your model and a budget, without labels",
        "Find the schedule that moves the model's output the least, for a share of its work, on some of your images.\n"
        "The file that is written is for --config of the other commands, and for MergeConfig.from_json.",
        "  token-merge calibrate --target 0.67 --output config.json && token-merge evaluate --config config.json\n"
        "  token-merge calibrate --model deit_small_patch16_224.fb_in1k --data photos --budget latency --target 0.7",
    )
    group = parser.add_argument_group("what is looked for")
    group.add_argument("--target", type=float, default=0.67, metavar="SHARE", help="of the work (default: 0.67)")
    group.add_argument("--budget", choices=BUDGETS, default="compute", help="what work is: multiply-adds, or time")
    group.add_argument("--output", type=Path, default=Path("config.json"), metavar="FILE", help="default: config.json")
    _add_model_options(parser)
    _add_data_options(parser)
    _add_device_options(parser)
    parser.set_defaults(num_images=300, unlabelled=True)


def _calibrate(args: argparse.Namespace) -> int:
    keep_freed_memory()
    model = _load(args)
    images = torch.cat([batch.images for batch in _open(args, model)])
    with torch.autocast(args.device.type, DTYPES[args.amp or "float32"], enabled=args.amp is not None):
        config = calibrate(
            model,
            images,
            args.target,
            budget=args.budget,
            batch_size=_batch_size(args),
            seed=args.seed,
            progress=not args.quiet,
        )
    args.output.write_text(config.to_json() + "\n", encoding="utf-8")
    assert isinstance(config.keep_rate, Mapping)
    for block, rate in config.keep_rate.items():
        print(f"block {block}: keep rate {rate:.3f}")
    print(f"Written: {args.output}")
    return 0


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bench",
        _bench,
        "speed alone, on random images",
        "Time a model unpatched and patched, in turns, on random images. Weights do not matter: --no-pretrained does\n"
        "without them.",
        "  token-merge bench --model deit_small_patch16_224 --no-pretrained --batch-sizes 1 8 64\n"
        "  token-merge bench --model vit_large_patch16_224 --methods merge tome --device cuda --amp bfloat16",
    )
    _add_contender_options(parser)
    _add_model_options(parser)
    _add_device_options(parser, batch_size=False)
    parser.add_argument("--batch-sizes", type=_positive, nargs="+", default=[8], metavar="N")
    parser.add_argument("--rounds", type=_positive, default=20, help="of each setting (default: 20)")


def _bench(args: argparse.Namespace) -> int:
    keep_freed_memory()
    model = _load(args)
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


def _add_show(commands: Any) -> None:
    parser = _add_command(
        commands,
        "show",
        _show,
        "draw which tokens are kept and merged, over an image",
        "Draw for each stage what the tokens stand for: crucial patches keep their pixels, merged ones have the mean\n"
        "colour of their token, dropped ones are dark.",
        "  token-merge show photo.jpg --model deit_small_patch16_224.fb_in1k --keep-rate 0.5 --output photo-tokens.png",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=Path("tokens.png"), metavar="FILE", help="default: tokens.png")
    _add_config_options(parser)
    _add_model_options(parser)
    _add_device_options(parser, batch_size=False)


def _show(args: argparse.Namespace) -> int:
    model = _load(args)
    data = open_data(args.image, data_config(model, img_size=args.img_size), workers=0, device=args.device)
    apply(model, _config(args))
    batch, drawn = next(iter(data)), data.picture(int(data.indices[0]))
    stages = trace(model, batch.images)
    try:
        contact_sheet([Picture(drawn, args.image.name, picture_stages(drawn, stages))]).save(args.output)
    except (OSError, ValueError) as error:
        raise DataError(f"{args.output} cannot be written: {error}.") from error
    for stage in stages:
        print(f"block {stage.block}: {len(stage.representative)} of {len(stage.token_map)} tokens")
    print(f"Written: {args.output}")
    return 0


def _add_list(commands: Any) -> None:
    parser = _add_command(
        commands,
        "list",
        _list,
        "the families of models that are served",
        "List the families of models that are served, what is reduced in each, where the grid is restored, and the\n"
        "share of the multiply-adds that is left.",
        "  token-merge list --keep-rate 0.5",
    )
    parser.add_argument("--keep-rate", type=float, default=0.7, metavar="RATE")
    parser.add_argument("--all", action="store_true", help="count for every model, not a typical one of each (minutes)")
    parser.add_argument("--names", action="store_true", help="print timm's names of the models, and nothing else")


def _list(args: argparse.Namespace) -> int:
    served = models_by_adapter()
    if args.names:
        print("\n".join(sorted(name for names in served.values() for name in names)))
        return 0
    models = sum(map(len, served.values()))
    total = models if args.all else len(served)
    with tqdm(total=total, desc="counting", unit="model", leave=False, disable=args.quiet) as bar:
        rows = list_families(args.keep_rate, every_model=args.all, progress=bar.update)
    print(format_families(rows, args.keep_rate))
    print(
        f"\n{models} models, timm {timm.__version__}. GMACs: of {'all' if args.all else 'a typical one'} of the models."
    )
    return 0


def _add_run(commands: Any) -> None:
    parser = _add_command(
        commands,
        "run",
        _run,
        "run an unmodified script whose timm models are to be patched",
        "Run a Python script, or a module, with timm.create_model wrapped: every supported model that it creates is\n"
        "patched. Others pass with a warning. What follows the script's name is the script's own.",
        "  token-merge run --keep-rate 0.7 validate.py --model deit_small_patch16_224 --data-dir imagenet\n"
        "  token-merge run --method tome --r 13 -m my_package.train --epochs 3",
    )
    _add_config_options(parser)
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")


def _run(args: argparse.Namespace) -> int:
    run_script(args.script, args.arguments, _config(args), module=args.module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
