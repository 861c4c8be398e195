"""What subcommands print of a result."""

from token_merge_plugin.errors import counted
from token_merge_plugin.trial.judging import verdict
from token_merge_plugin.trial.results import TrialResult
from token_merge_plugin.trial.table import format_table

UNREADABLE_SHOWN = 10


def print_result(result: TrialResult) -> None:
    print(f"{result.model}, {result.data}, {result.dtype}, batch {result.batch_size}, {result.device}")
    print(", ".join(f"{name} {version}" for name, version in result.versions.items()) + "\n")
    print(format_table(result))
    for method, reason in result.refused.items():
        print(f"\n{method}: not on this model. {reason}")
    if result.unreadable:
        print(f"\n{counted(len(result.unreadable), 'image')} could not be read:")
        for line in result.unreadable[:UNREADABLE_SHOWN]:
            print(f"  {printable(line)}")
        if len(result.unreadable) > UNREADABLE_SHOWN:
            print(f"  and {len(result.unreadable) - UNREADABLE_SHOWN:,} more")
    print(f"\n{verdict(result)}")


def printable(text: str) -> str:
    """Return the text without bytes that are none: file names may have them."""
    return text.encode("utf-8", "replace").decode("utf-8")
