"""Run the fast part of the tests with older and newer versions of torch and timm, and write what came of it.

    python examples/versions.py                          every environment; writes examples/results/versions.md
    python examples/versions.py --only lowest            one of them, and nothing is written: for continuous integration
    python examples/versions.py --folder environments    make the environments there, and use those that are there

Each is a virtual environment of its own, of about 5 GB. It is made by pip, in a temporary folder if none is given, and
there is one at a time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "examples" / "results" / "versions.md"

# What is the same for every model, and what is not, on one small model of each kind of each family.
CONTRACTS = (
    "test_the_table_has_models_of_every_family",
    "test_patched_and_removed",
    "test_stages_that_keep_every_token_give_the_unpatched_output",
    "test_intermediate_features_keep_their_shapes",
    "test_feature_extractors_keep_their_shapes",
    "test_an_image_does_not_depend_on_the_others_of_its_batch",
)
FAST = (
    *(f"tests/method/test_{part}.py" for part in ("attention", "importance", "merging", "restoring")),
    "tests/test_config.py",
    *(f"tests/test_families.py::{test}" for test in CONTRACTS),
)
TOOLS = ("pytest", "pytest-xdist", "hypothesis")

# Prints what is installed, and which families are served: one line of JSON.
PROBE = """
import json, platform, timm, torch, wrapt
from token_merge_plugin.adapters import missing, registered_adapters
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__.split("+")[0], "timm": timm.__version__,
    "wrapt": wrapt.__version__,
    "served": list(dict.fromkeys(a.family for a in registered_adapters() if a.timm_modules)), "missing": missing,
}))
"""


class Environment(NamedTuple):
    """Versions to install; none of them: the newest."""

    name: str
    packages: tuple[str, ...]


ENVIRONMENTS = (
    Environment("lowest", ("torch==2.4.1", "torchvision==0.19.1", "timm==1.0.9", "wrapt==1.16.0")),
    Environment("older", ("torch==2.6.0", "torchvision==0.21.0", "timm==1.0.15", "wrapt==1.17.0")),
    Environment("newer", ("torch==2.8.0", "torchvision==0.23.0", "timm==1.0.27", "wrapt==1.17.3")),
    Environment("newest", ("torch", "torchvision", "timm", "wrapt")),
)


class Outcome(NamedTuple):
    """What came of an environment: what `PROBE` prints, and the numbers of tests by pytest's words."""

    name: str
    found: dict[str, Any]
    tests: dict[str, int]


def build(environment: Environment, folder: Path) -> Path:
    """Make the environment in a folder, unless it is there, and return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        # Compiling all of torch takes as long as the tests.
        install = [python, "-m", "pip", "install", "-q", "--no-compile", *environment.packages, *TOOLS]
        subprocess.run(install, check=True)
    return python


def run_tests(environment: Environment, python: Path) -> tuple[Outcome, int]:
    """Run the fast part of the tests on the repository as it is, and return what came of it, and pytest's status."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    probe = subprocess.run([python, "-c", PROBE], env=variables, check=True, stdout=subprocess.PIPE, text=True)
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *FAST]
    # Shown as it comes; read again for its last line.
    with subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return Outcome(environment.name, json.loads(probe.stdout.splitlines()[-1]), counts(lines)), process.returncode


def counts(lines: Sequence[str]) -> dict[str, int]:
    """Return the numbers of the closing line of pytest: {"passed": 500, "failed": 3}."""
    closing = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "")
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", closing)}


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page of results."""
    rows, reasons = [], []
    for name, found, tests in outcomes:
        failed = sum(number for word, number in tests.items() if word.startswith(("failed", "error")))
        missing = ", ".join(module.rpartition(".")[2] for module in found["missing"]) or "none"
        rows.append(
            f"| {name} | {found['torch']} | {found['timm']} | {found['wrapt']} | {found['python']} "
            f"| {len(found['served'])} | {missing} | {tests.get('passed', 0)} | {failed} | {tests.get('skipped', 0)} |"
        )
        reasons += [f"- timm {found['timm']}, `{module}`: {reason}" for module, reason in found["missing"].items()]
    return "\n".join(
        [
            "# Versions of torch and timm",
            "",
            "Written by `examples/versions.py`: the fast part of the tests in an environment of each, on a CPU. For",
            "every family that is served, one small model of each of its kinds: keep rate 1, merging, `remove` bit for",
            "bit, stages that keep every token, shapes, images on their own; and the tests of the method",
            "and of its options. Models that a timm does not have are left out: pytest says which.",
            "",
            "| environment | torch | timm | wrapt | Python | families | missing | passed | failed | skipped |",
            "|---|---|---|---|---|---:|---|---:|---:|---:|",
            *rows,
            "",
            "Missing, as `apply` and `token-merge list` say:",
            "",
            *reasons,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", choices=names, help="one environment, without writing the page")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept")
    parser.add_argument("--build", action="store_true", help="make the environments, and run nothing")
    args = parser.parse_args(arguments)
    outcomes, worst = [], 0
    for environment in ENVIRONMENTS:
        if args.only not in (None, environment.name):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            python = build(environment, (args.folder or Path(temporary)).resolve() / environment.name)
            if not args.build:
                outcome, status = run_tests(environment, python)
                outcomes.append(outcome)
                worst = max(worst, status)
    if not args.only and not args.build:
        PAGE.write_text(page(outcomes), encoding="utf-8")
    return worst


if __name__ == "__main__":
    sys.exit(main())
