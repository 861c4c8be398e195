"""What subcommands print of a result."""

from token_merge_plugin.trial.judging import verdict
from token_merge_plugin.trial.results import TrialResult
from token_merge_plugin.trial.table import format_table


def print_result(result: TrialResult) -> None:
    print(f"{result.model}, {result.data}, {result.dtype}, batch {result.batch_size}, {result.device}")
    print(", ".join(f"{name} {version}" for name, version in result.versions.items()) + "\n")
    print(format_table(result))
    for method, reason in result.refused.items():
        print(f"\n{method}: not on this model. {reason}")
    if result.unreadable:
        number = len(result.unreadable)
        print(f"\n{number} image{'s' if number > 1 else ''} could not be read: {', '.join(result.unreadable)}")
    print(f"\n{verdict(result)}")
