"""The command `token-merge`: one file a subcommand."""

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from token_merge_plugin import __version__
from token_merge_plugin.cli import bench, calibrate, evaluate, export, list, report, run, show, trial
from token_merge_plugin.cli.options import EXIT_CODES
from token_merge_plugin.errors import TokenMergeError
from token_merge_plugin.pipelines import uninstall


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; return its exit code, see `EXIT_CODES`."""
    argv = sys.argv[1:] if argv is None else [*argv]
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["token-merge", *argv])
    uninstall()  # what the environment asks for is for scripts; here it would patch the unpatched model
    logging.getLogger("timm").setLevel(logging.INFO if args.verbose else logging.ERROR)
    if int(os.environ.get("RANK", 0)) and args.command not in ("evaluate", "run"):
        return 0  # one of several processes: these two share their work out, the others are done by the first
    try:
        # The warnings of a script are its own.
        with nullcontext() if args.command == "run" else _short_warnings():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell has it of a program that SIGPIPE ended
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token-merge",
        description="Token pruning-and-merging for timm vision transformers, without training.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (trial, evaluate, report, calibrate, export, bench, show, list, run):
        command.add(commands)
    return parser
