import os

import torch
from families import LEFT_OUT
from hypothesis import settings

# No deadline: the time that a test takes is the machine's, not the code's.
settings.register_profile("tensors", deadline=None, max_examples=50)
settings.load_profile("tensors")

# The models are small: on one thread they run as fast. Two threads that wait for each other while another process has
# their core are many times slower. The variable is for the programs that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_terminal_summary(terminalreporter):
    """Print what tests have counted, as a table: (what, cases, seconds, failures)."""
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [value for report in called for name, value in report.user_properties if name == "figures"]
    if rows:
        print("\n\n| what | cases | seconds | failures |\n|---|---:|---:|---:|")
    for what, cases, seconds, failures in rows:
        print(f"| {what} | {cases:,} | {seconds:.0f} | {failures} |")


def pytest_report_header():
    return [f"left out of the families: {kind}: {reason}" for kind, reason in LEFT_OUT.items()]
