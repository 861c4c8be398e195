r"""What accuracy costs in time: how far the outputs of a pretrained ViT move, against the speed-up, as curves.

    python examples/tradeoff.py --photographs FOLDER ... --weights weights --half 1 \
        --markdown results/tradeoff.md --chart results/tradeoff.svg

Multiply-adds say nothing of what choosing tokens takes. So here each schedule and method, at several shares of the
multiply-adds, has its error on photographs beside its speed-up at several batch sizes, all taken in turns in one run.
Model, photographs and errors are those of ablation.py. A contender is better than another if its curve is below.
"""

import argparse
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from ablation import DenseAblation, on_photographs

from token_merge_plugin import MergeConfig
from token_merge_plugin.trial.counting import equal_compute
from token_merge_plugin.trial.measuring import keep_freed_memory, plan, time_in_turns
from token_merge_plugin.trial.report import require_charts

CONTENDERS = {
    "default": MergeConfig(),
    "merge, equal rates in three stages": MergeConfig(schedule="equal_rates"),
    "merge, equal numbers in five stages": MergeConfig(schedule="equal_numbers", stages=(1, 3, 5, 7, 9)),
    "ToMe": MergeConfig(method="tome"),
}


def measure(ablation: DenseAblation, shares: list[float], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each contender and share of the multiply-adds: its errors, and {batch size: speed-up}."""
    rows: list[dict[str, Any]] = []
    configs: list[MergeConfig | None] = [None]
    for name, config in CONTENDERS.items():
        for share in shares:
            macs = round(share * ablation.full)
            fitted = equal_compute(ablation.model, ablation.images[:1], config, macs, ablation.use)
            plan(ablation.model, fitted)
            rows.append({"contender": name, "share": share, **ablation.compared()[0], "speed_up": {}})
            configs.append(fitted)
    plan(ablation.model, None)
    for batch_size in batch_sizes:
        images = ablation.images[torch.arange(batch_size) % len(ablation.images)]
        unpatched, *times = time_in_turns(
            ablation.model, configs, images, rounds=rounds, seconds=math.inf, use=ablation.use
        )
        for row, mine in zip(rows, times, strict=True):
            row["speed_up"][batch_size] = statistics.median(a / b for a, b in zip(unpatched, mine, strict=True))
    return rows


def table(rows: list[dict[str, Any]], description: str) -> str:
    """Return the rows as Markdown."""
    batch_sizes = list(rows[0]["speed_up"])
    lines = ["# Error against time, ViT-S/14 with pretrained weights", "", description, ""]
    lines += ["| contender | share of the multiply-adds | patch tokens | class token | saliency | "]
    lines[-1] += " | ".join(f"speed-up, batch {size}" for size in batch_sizes) + " |"
    lines += ["|---|---:|---:|---:|---:|" + "---:|" * len(batch_sizes)]
    for row in rows:
        errors = " | ".join(f"{row[name]:.4f}" for name in ("patches", "class_token", "saliency"))
        speed_ups = " | ".join(f"{row['speed_up'][size]:.2f}x" for size in batch_sizes)
        lines.append(f"| {row['contender']} | {row['share']} | {errors} | {speed_ups} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw error of the patch tokens against speed-up, a panel for each batch size."""
    from matplotlib.figure import Figure

    batch_sizes = list(rows[0]["speed_up"])
    figure = Figure(figsize=(4 * len(batch_sizes), 3.6), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(batch_sizes), squeeze=False)[0], batch_sizes, strict=True):
        for name in CONTENDERS:
            mine = [row for row in rows if row["contender"] == name]
            style = {"linewidth": 3, "alpha": 0.4} if name == "default" else {"marker": "o"}
            axes.plot([row["speed_up"][size] for row in mine], [row["patches"] for row in mine], label=name, **style)
        axes.set_title(f"batch {size}")
        axes.set_xlabel("speed-up")
    figure.axes[0].set_ylabel("relative error of the patch tokens")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--weights", type=Path, required=True, help="folder that real_weights.py wrote")
    parser.add_argument("--half", type=int, default=0, choices=[0, 1], help="of the photographs")
    parser.add_argument("--crops", type=int, default=1, help="of each photograph")
    parser.add_argument("--img-size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.85, 0.75, 0.67, 0.58, 0.51])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 50], help="at which to measure time")
    parser.add_argument("--batch-size", type=int, default=8, help="at which to measure errors")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--chart", type=Path, help="draw the curves, as .svg or .png")
    args = parser.parse_args()
    if args.chart:
        require_charts()
    keep_freed_memory()
    ablation, images = on_photographs(args)
    rows = measure(ablation, args.shares, args.batch_sizes, args.rounds)
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}"
    machine = f"{torch.get_num_threads()} threads of an {platform.machine()} CPU, {args.rounds} rounds"
    text = table(rows, f"{images}; {versions}, {machine}.")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.markdown:
        args.markdown.write_text(text)
    if args.chart:
        draw(rows, args.chart)
    print(text)


if __name__ == "__main__":
    main()
