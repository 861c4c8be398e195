"""README.md as it stands: its blocks run, its commands are ones that the command line takes, its links lead somewhere.

The models of its examples are small here, with random weights, and its images are noise.
"""

import ast
import inspect
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from checks import README, REPOSITORY

import token_merge_plugin
from token_merge_plugin import pipelines, trial
from token_merge_plugin.cli import _parser, main
from token_merge_plugin.config import MergeOptions
from token_merge_plugin.trial import calibration, schedules
from token_merge_plugin.trial.results import from_json

TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE))
# What the first word of a command may be. A test below checks what is known of each.
PROGRAMS = ("token-merge", "pip", "pytest", "python", "ruff", "mypy", "apt", "git", "torchrun")
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text()
# What makes a DeiT-S small; blocks 2, 5 and 8 are there.
SMALL = {"depth": 9, "embed_dim": 24, "num_heads": 2, "img_size": 64}


def commands():
    """Return the words of each command, without variables in front of it, of the blocks and of what is in the text."""
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    found = []
    for text in (*lines, *SPANS):
        for command in text.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and (words[0] in PROGRAMS or text in lines):
                found.append(words)
    return found


def test_every_block_is_in_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_every_block_of_python_runs(monkeypatch, tmp_path):
    """One after the other, with the names of the package, a model and images at hand."""
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kwargs: create_model(name, **SMALL | kwargs)
    )
    # Fewer schedules are tried, which takes most of the time.
    monkeypatch.setattr(trial, "calibrate", partial(trial.calibrate, moves=0))
    monkeypatch.setattr(calibration, "regular", lambda *args: schedules.regular(*args)[:1])
    monkeypatch.setattr(calibration, "by_number", lambda sections: [])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {name: getattr(token_merge_plugin, name) for name in token_merge_plugin.__all__}
    names |= {"timm": timm, "torch": torch, "token_merge_plugin": token_merge_plugin, "Path": Path}
    names |= {"model": timm.create_model("deit_small_patch16_224").eval(), "images": torch.randn(2, 3, 64, 64)}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, str(README), "exec"), names)
    assert token_merge_plugin.is_patched(names["model"])


@pytest.mark.parametrize("span", [span for span in SPANS if re.match(r"(token_merge_plugin\.)?[a-z_]+\(.+\)$", span)])
def test_every_call_in_the_text_is_one_that_its_function_takes(span):
    call = ast.parse(span, mode="eval").body
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
    if name not in token_merge_plugin.__all__:
        assert name in ("checkpoint", "print", "run_trial"), f"{span} is a call of something that is not known here"
        return
    function = getattr(token_merge_plugin, name)
    keywords = [keyword.arg for keyword in call.keywords]
    inspect.signature(function).bind(*call.args, **dict.fromkeys(keywords))
    if name in ("apply", "patch_timm"):
        assert set(keywords) <= {"keep_rate", *MergeOptions.__annotations__}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_there_is(words):
    program, *arguments = words
    if program == "token-merge":
        # "..." stands for a value behind an option, and elsewhere for whatever comes further.
        given = [
            word for before, word in zip(words, arguments, strict=False) if word != "..." or before.startswith("--")
        ]
        assert _parser().parse_args(given).command == given[0]
    elif program == "pip":
        for extra in re.findall(r"(\w+)[,\]]", words[-1]):
            assert f"\n{extra} = [" in PYPROJECT
    elif program == "pytest" and "-m" in arguments:
        assert f'"{arguments[arguments.index("-m") + 1]}: ' in PYPROJECT
    else:
        assert program in PROGRAMS


def test_every_variable_is_one_that_is_read():
    known = {pipelines.KEEP_RATE_VARIABLE, pipelines.OPTIONS_VARIABLE}
    assert set(re.findall(r"\b(TOKEN_MERGE_[A-Z_]+)=", TEXT)) <= known


def test_the_first_trial_runs_on_the_built_in_model(monkeypatch, tmp_path):
    """The command of the first block, with fewer images and settings."""
    monkeypatch.chdir(tmp_path)
    first = next(words for words in commands() if words[:2] == ["token-merge", "trial"])
    less = [
        "--num-images",
        "10",
        "--keep-rates",
        "0.6",
        "--batch-size",
        "10",
        "--workers",
        "0",
        "--json",
        "result.json",
    ]
    assert main([*first[1:], *less]) == 0
    assert (tmp_path / first[first.index("--html") + 1]).stat().st_size > 10_000
    assert from_json((tmp_path / "result.json").read_text()).images == 10


def test_every_link_into_the_repository_leads_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        assert (REPOSITORY / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (REPOSITORY / path).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link
    for path in re.findall(r"`((?:examples|token_merge_plugin|tests)/[\w./-]*)`", TEXT):
        assert (REPOSITORY / path).exists(), path
