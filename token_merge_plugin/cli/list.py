"""`token-merge list`: the families that are served, what runs on fewer tokens, and what is left of the work."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.adapters import missing
from token_merge_plugin.cli.options import add_command, share, shows_progress
from token_merge_plugin.config import METHODS, MergeConfig
from token_merge_plugin.errors import ConfigError
from token_merge_plugin.patching import apply, models_by_adapter
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.models import input_size

# Where the typical model of a family has no class token: one that has, and takes the methods that need it.
WITH_CLASS_TOKEN = {
    "ViT with relative position": "vit_relpos_medium_patch16_cls_224",
    "NaFlexViT": "naflexvit_base_patch16_radio_v3",
}


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "list",
        _list,
        "the families of models that are served",
        "List the families of models that are served, what is reduced in each, where the grid is restored, and the\n"
        "share of the multiply-adds that is left.",
        "  token-merge list --keep-rate 0.5",
    )
    parser.add_argument("--keep-rate", type=share, default=0.7, metavar="RATE", help="of every stage (default: 0.7)")
    parser.add_argument("--all", action="store_true", help="count for every model, not a typical one of each (minutes)")
    parser.add_argument("--names", action="store_true", help="print timm's names of the models, and nothing else")


def _list(args: argparse.Namespace) -> int:
    served = models_by_adapter()
    if args.names:
        print("\n".join(sorted(name for names in served.values() for name in names)))
        return 0
    models = sum(map(len, served.values()))
    total = models if args.all else len(served)
    with tqdm(total=total, desc="counting", unit="model", leave=False, disable=not shows_progress(args)) as bar:
        rows = list_families(args.keep_rate, every_model=args.all, progress=bar.update)
    print(format_families(rows, args.keep_rate))
    print(
        f"\n{models} models, timm {timm.__version__}. GMACs: of {'all' if args.all else 'a typical one'} of the models."
    )
    for family, reason in missing.items():
        print(f"Missing: {family}. {reason}")
    return 0


@dataclass(frozen=True)
class FamilyRow:
    """A family, as `token-merge list` shows it.

    Attributes:
        family: its name.
        modules: names of the timm modules that define it.
        models: number of timm's models.
        reduces: what runs on fewer tokens.
        restores: where the full grid is restored.
        methods: those that a model of the family takes; "evit", "ppt" and "prune" need a class token.
        shares: smallest and largest share of the multiply-adds that is left, in (0, 1].
    """

    family: str
    modules: tuple[str, ...]
    models: int
    reduces: str
    restores: str
    methods: tuple[str, ...]
    shares: tuple[float, float]


def list_families(
    keep_rate: float = 0.7, *, every_model: bool = False, progress: Callable[[int], object] | None = None
) -> list[FamilyRow]:
    """Return a row for each registered family that timm has models of.

    Args:
        keep_rate: at which the share of multiply-adds is counted.
        every_model: count for every model of the family, not only for the typical one that its adapter names.
        progress: called as progress(1) after each model that was counted.
    """
    rows = []
    for adapter, names in models_by_adapter().items():
        shares: list[float] = []
        methods: set[str] = set()
        for name in names if every_model else [adapter.example]:
            model, images = on_meta(name)
            full = count_macs(model, images)
            shares.append(count_macs(apply(model, keep_rate), images) / full)
            methods.update(method for method in METHODS if _takes(model, method))
            if not every_model and adapter.family in WITH_CLASS_TOKEN:
                other, _ = on_meta(WITH_CLASS_TOKEN[adapter.family])
                methods.update(method for method in METHODS if _takes(other, method))
            if progress is not None:
                progress(1)
        modules = tuple(module for module in adapter.timm_modules if module in timm.list_modules())
        rows.append(
            FamilyRow(
                family=adapter.family,
                modules=modules,
                models=len(names),
                reduces=adapter.reduces,
                restores=adapter.restores,
                methods=tuple(method for method in METHODS if method in methods),
                shares=(min(shares), max(shares)),
            )
        )
    return rows


def _takes(model: nn.Module, method: str) -> bool:
    try:
        apply(model, MergeConfig(method=method))
    except ConfigError:
        return False
    return True


def on_meta(name: str) -> tuple[nn.Module, Tensor]:
    """Build a model of timm, and an image of its own size, without any numbers in them: enough to count with."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
        return model, torch.zeros(1, *input_size(model))


def format_families(rows: Sequence[FamilyRow], keep_rate: float = 0.7) -> str:
    """Return the rows as a table for the terminal, which is also a table in Markdown."""
    lines = [("family", "timm modules", "models", "reduced", "restored", "methods", f"GMACs left at {keep_rate}")]
    for row in rows:
        least, most = (f"{share:.0%}" for share in row.shares)
        share = least if least == most else f"{least} to {most}"
        methods = "all" if row.methods == METHODS else ", ".join(row.methods)
        lines.append((row.family, ", ".join(row.modules), str(row.models), row.reduces, row.restores, methods, share))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)
