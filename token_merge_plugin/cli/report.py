"""`token-merge report`: the report of results that were measured before, drawn anew."""

import argparse
from pathlib import Path
from typing import Any

from token_merge_plugin.cli.options import add_command, check_outputs
from token_merge_plugin.errors import DataError
from token_merge_plugin.trial.report import require_charts, write_html, write_png
from token_merge_plugin.trial.results import from_json


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "draw the report of a trial's JSON anew",
        "Write the report of results that `token-merge trial --json` or `token-merge evaluate --json` wrote. Pictures\n"
        "are not in these results, and so not in the report.",
        "  token-merge report results.json --html report.html --png chart.png",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="JSON of a trial")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: the name of RESULTS, with .html")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the chart of accuracy against speed")


def _report(args: argparse.Namespace) -> int:
    require_charts()
    html = args.html or (None if args.png else args.results.with_suffix(".html"))
    check_outputs(html, args.png)
    try:
        result = from_json(args.results.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{args.results} cannot be read: {error}. Give a file of token-merge trial --json.") from error
    if html:
        write_html(result, [], html)
    if args.png:
        write_png(result, args.png)
    for path in filter(None, (html, args.png)):
        print(f"Written: {path}")
    return 0
