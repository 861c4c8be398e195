"""The layout of the package: imports run one way, and what users import is there."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import run_program

import token_merge_plugin
from token_merge_plugin import trial

ROOT = Path(token_merge_plugin.__file__).parent
# Each may import those behind it.
ORDER = ("cli", "trial", "patching", "adapters", "method", "config", "errors")
MAY_IMPORT = {wing: {*ORDER[place + 1 :]} for place, wing in enumerate(ORDER)}
MAY_IMPORT["cli"].add("pipelines")
MAY_IMPORT["trial"].add("builtin")
MAY_IMPORT |= {
    "__init__": {"trial", "patching", "pipelines", "adapters", "models", "config", "errors"},
    "__main__": {"cli"},
    "pipelines": {"patching", "config", "errors"},
    "builtin": {"errors"},
    "models": {"errors"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Go through the package's modules: (wing, syntax tree)."""
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).parts
        if place[0] != "site_packages":  # which belongs into the folder of that name
            yield place[0].removesuffix(".py"), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Go through everything that a module imports, wherever it does so: full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def run(*arguments: str) -> str:
    """Return what Python prints in a fresh interpreter."""
    done = run_program(sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_part_of_the_package_has_its_place_in_the_order():
    assert {wing for wing, _ in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_imports_run_one_way(wing):
    names = {name for other, tree in modules() if other == wing for name in imported(tree)}
    assert not [name for name in names if name.startswith(".")], "Imports are absolute."
    ours = {name for name in names if name.split(".")[0] == "token_merge_plugin"}
    ours.discard("token_merge_plugin.__version__")
    assert {name.partition(".")[2].partition(".")[0] for name in ours} - {wing} <= MAY_IMPORT[wing]


def test_the_package_runs_as_a_module():
    assert run("-m", "token_merge_plugin", "--version") == token_merge_plugin.__version__


def test_the_trial_is_there_and_is_imported_only_when_it_is_asked_for():
    program = """
import sys, token_merge_plugin
assert "token_merge_plugin.trial" not in sys.modules
print(token_merge_plugin.trial.run_trial.__name__)
assert "token_merge_plugin.trial" in sys.modules
assert "matplotlib" not in sys.modules
"""
    assert run("-c", program) == "run_trial"


def test_calibrate_can_be_imported_from_the_package():
    assert run("-c", "from token_merge_plugin import calibrate; print(calibrate.__name__)") == "calibrate"


@pytest.mark.parametrize("package", [token_merge_plugin, trial])
def test_what_a_user_imports_is_listed(package):
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    public = {name.rpartition(".")[2] for name in imported(tree) if name.startswith("token_merge_plugin.")}
    assert set(package.__all__) == public - {"models"}  # imported for what it does: it registers them
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_names_that_are_not_there_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'trails'"):
        _ = token_merge_plugin.trails


def test_the_trial_offers_what_its_users_need():
    assert trial.__all__ == ["Tensors", "calibrate", "evaluate", "export", "run_trial", "summary", "verdict"]
