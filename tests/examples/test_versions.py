"""examples/versions.py, without what it is for: that takes minutes and gigabytes for each environment."""

import json
import re

import versions
from checks import REPOSITORY
from packaging.requirements import Requirement
from packaging.version import Version


def lowest():
    return {Requirement(package).name: package.partition("==")[2] for package in versions.ENVIRONMENTS[0].packages}


def test_the_lowest_environment_is_what_the_package_asks_for():
    asked = re.search(r"^dependencies = (.+)$", (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE)
    for requirement in map(Requirement, json.loads(asked[1])):
        (floor,) = requirement.specifier
        assert floor.operator == ">="
        assert Version(floor.version) == Version(lowest()[requirement.name])


def test_the_closing_line_of_pytest_is_counted():
    lines = [
        "= FAILURES =\n",
        "FAILED tests/test.py::test - 1 passed\n",
        "2 failed, 497 passed, 7 skipped in 40.6s (0:07:00)\n",
    ]
    assert versions.counts(lines) == {"failed": 2, "passed": 497, "skipped": 7}
    assert versions.counts(["nothing\n"]) == {}


def test_the_page_of_the_results_has_the_lowest_environment_without_a_failure():
    rows = [line.split("|") for line in versions.PAGE.read_text().splitlines() if line.startswith("| lowest ")]
    ((_, _, torch, timm, wrapt, _, families, missing, passed, failed, *_),) = rows
    assert [torch.strip(), timm.strip(), wrapt.strip()] == [lowest()[name] for name in ("torch", "timm", "wrapt")]
    assert int(families) > 10
    assert "naflexvit" in missing
    assert int(passed) > 300
    assert int(failed) == 0


def test_the_fast_part_is_of_tests_that_there_are():
    for name in versions.FAST:
        path, _, test = name.partition("::")
        assert f"def {test}(" in (REPOSITORY / path).read_text() if test else (REPOSITORY / path).is_file(), name
