"""`token-merge run`: an unmodified script with its timm models patched."""

import argparse
from typing import Any

from token_merge_plugin.cli.options import add_command, add_config_options, asked_config
from token_merge_plugin.pipelines import run_script


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        _run,
        "run an unmodified script whose timm models are to be patched",
        "Run a Python script, or a module, with timm.create_model wrapped: every supported model that it creates is\n"
        "patched. Others pass as they are; one line at the end tells which. What follows the script's name is its own.",
        "  token-merge run --keep-rate 0.7 validate.py --model deit_small_patch16_224 --data-dir imagenet\n"
        "  token-merge run --method tome --r 13 -m my_package.train --epochs 3",
    )
    add_config_options(parser)
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if no model was patched")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own")


def _run(args: argparse.Namespace) -> int:
    run_script(args.script, args.arguments, asked_config(args), module=args.module, strict=args.strict)
    return 0
