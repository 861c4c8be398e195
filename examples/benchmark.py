"""Speed of patched against unpatched models, as ratios taken in one run.

    python examples/benchmark.py --model deit_small_patch16_224 --batch-size 8

Weights and images are random: they do not change what is computed. Contenders take turns, each round in another
order; the ratio is the median over rounds, so the machine's own ups and downs cancel. The efficiency is the speed-up
as a share of what the multiply-adds promise. `--profile` says where the rest goes: what choosing, merging and restoring
take, and what smaller matrices take beyond their share. `--multiples` tells whether hardware likes numbers of tokens
that are multiples of 8, say. With several models or image sizes there is a table for each, and a chart of how the
efficiency grows:

    python examples/benchmark.py --img-size 224 384 640 896 --batch-size 1 --keep-rates 0.7 0.5 --chart growth.svg
    python examples/benchmark.py --training --keep-rates 0.7 0.5
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch

import token_merge_plugin
from token_merge_plugin.config import METHODS, SCHEDULES
from token_merge_plugin.method import reduction
from token_merge_plugin.method.state import Pass, Plan, recorded
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.measuring import keep_freed_memory, peak_memory, take_turns, time_in_turns
from token_merge_plugin.trial.report import require_charts

# What is done for merging, by what it is done for.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "choosing": [(reduction, name) for name in ("_importance", "merge_cost", "assign", "bipartite", "keep_best")],
    "merging": [(reduction, "merge"), (reduction, "fuse_rest")],
    "restoring": [(reduction, "interpolation"), (Plan, "restore")],
    "keeping the state": [(reduction, "follow"), (Pass, "log_size")],
}


@contextmanager
def timed(seconds: dict[str, float], synchronize: Callable[[], None]) -> Iterator[None]:
    """Add up the seconds that each part takes. No part is within another."""

    def watched(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            seconds[part] += time.perf_counter() - start
            return result

        return call

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, watched(part, getattr(owner, name))))
        yield


def profile(
    model: torch.nn.Module, configs: list[token_merge_plugin.MergeConfig], images: torch.Tensor, rounds: int
) -> list[list[float]]:
    """Return the share of the unpatched model's time that each part of each patched one takes: the median."""
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    shares: list[list[list[float]]] = [[] for _ in configs]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            token_merge_plugin.remove(model)
            synchronize()
            start = time.perf_counter()
            model(images)
            synchronize()
            unpatched = time.perf_counter() - start
            for config, found in zip(configs, shares, strict=True):
                token_merge_plugin.apply(model, config)
                seconds = dict.fromkeys(PARTS, 0.0)
                with timed(seconds, synchronize):
                    model(images)
                found.append([part / unpatched for part in seconds.values()])
    return [[statistics.median(part) for part in zip(*found[1:], strict=True)] for found in shares]


def training_step(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    """Return a forward and a backward pass, by a loss that needs no labels."""

    def step(images: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(images).float().square().mean().backward()

    return step


def in_multiples(
    model: torch.nn.Module, config: token_merge_plugin.MergeConfig, multiple: int, image: torch.Tensor
) -> token_merge_plugin.MergeConfig:
    """Return a config whose stages leave the nearest multiple of so many tokens, prefix tokens included."""
    token_merge_plugin.apply(model, config)
    with torch.inference_mode(), recorded() as trace:
        model(image)
    rates, before = {}, trace[0][1].num_patches
    for block, state in trace:
        prefix, tokens = state.num_prefix_tokens, state.merged.size.shape[1]
        keep = min(before, max(multiple, round((prefix + tokens) / multiple) * multiple) - prefix)
        rates[block], before = keep / before, keep
    return token_merge_plugin.MergeConfig(rates)


class Contender(NamedTuple):
    """One row of a table, and what was measured of it.

    Attributes:
        method, schedule, rate: as on the command line.
        macs: multiply-adds of one image.
        mac_share, time_share: of the unpatched model's.
        memory: bytes that a step of training takes, or None.
    """

    method: str
    schedule: str
    rate: float
    macs: int
    mac_share: float
    time_share: float
    memory: int | None

    @property
    def efficiency(self) -> float:
        return self.mac_share / self.time_share


def measure(args: argparse.Namespace, name: str, img_size: int | None) -> list[Contender]:
    """Measure one model, print its tables, and return their rows: the unpatched model's first."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = timm.create_model(name, **({} if img_size is None else {"img_size": img_size})).eval().to(device, dtype)
    size = timm.data.resolve_data_config(model=model)["input_size"]
    size = size if img_size is None else (size[0], img_size, img_size)
    images = torch.randn(args.batch_size, *size, device=device, dtype=dtype)
    kinds = [("unpatched", "", 1.0)]
    for method in args.methods:
        schedules = args.schedules if method == "merge" else ["default"]
        kinds += [(method, schedule, rate) for schedule in schedules for rate in args.keep_rates]
    configs = [
        token_merge_plugin.MergeConfig(rate, method=method, schedule=schedule if schedule in SCHEDULES else None)
        for method, schedule, rate in [("merge", "", 1.0), *kinds[1:]]
    ]
    for multiple in args.multiples:
        kinds += [("merge", f"multiples of {multiple}", rate) for rate in args.keep_rates]
        configs += [
            in_multiples(model, token_merge_plugin.MergeConfig(rate), multiple, images[:1]) for rate in args.keep_rates
        ]
    macs = [count_macs(token_merge_plugin.apply(model, config), images[:1]) for config in configs]
    memory: list[int | None] = [None] * len(configs)
    if args.training:
        model.train()
        step = training_step(model)

        def prepare(index: int) -> Callable[[torch.Tensor], None]:
            token_merge_plugin.apply(model, configs[index])
            return step

        memory = [peak_memory(prepare(index), images, training=True) for index in range(len(configs))]
        seconds = take_turns(prepare, len(configs), images, rounds=args.rounds, seconds=math.inf)
    else:
        seconds = time_in_turns(model, configs, images, rounds=args.rounds, seconds=math.inf)
    shares = [statistics.median(a / b for a, b in zip(times, seconds[0], strict=True)) for times in seconds]
    rows = [
        Contender(*kind, of_rate, of_rate / macs[0], share, peak)
        for kind, of_rate, share, peak in zip(kinds, macs, shares, memory, strict=True)
    ]

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    what = f"{name}, {size[1]} px, {args.dtype}, batch {args.batch_size}"
    print(f"{what}{', training' if args.training else ''}, {args.rounds} rounds, {machine}{threads}")
    print(f"torch {torch.__version__}, timm {timm.__version__}, token_merge_plugin {token_merge_plugin.__version__}\n")
    titles = ["GMACs", "share of GMACs", "share of time", "speed-up", "efficiency"]
    titles += ["peak memory"] if args.training else []
    print(f"| method | schedule | keep rate | {' | '.join(titles)} |\n|---|---|---:|{'---:|' * len(titles)}")
    for row in rows:
        cells = [row.method, row.schedule, f"{row.rate}", f"{row.macs / 1e9:.2f}", f"{row.mac_share:.3f}"]
        cells += [f"{row.time_share:.3f}", f"{1 / row.time_share:.2f}x", f"{row.efficiency:.2f}"]
        cells += [] if row.memory is None else [f"{row.memory / 2**20:.0f} MiB"]
        print(f"| {' | '.join(cells)} |")
    if args.profile:
        titles = ["method", "schedule", "keep rate", *PARTS, "the rest, beyond its multiply-adds"]
        print(f"\nShares of the unpatched time:\n\n| {' | '.join(titles)} |")
        print("|---|---|---:|" + "---:|" * (len(PARTS) + 1))
        found = profile(model, configs[1:], images, args.rounds)
        for row, parts in zip(rows[1:], found, strict=True):
            cells = [row.method, row.schedule, f"{row.rate}"]
            cells += [f"{part:.1%}" for part in (*parts, row.time_share - sum(parts) - row.mac_share)]
            print(f"| {' | '.join(cells)} |")
    print()
    return rows


def draw(tables: dict[str, list[Contender]], path: Path) -> None:
    """Draw the efficiency of every contender, from one model or image size to the next."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(next(iter(tables.values()))[1:], 1):
        label = f"{row.method}{'' if row.schedule == 'default' else ', ' + row.schedule}, {row.rate}"
        axes.plot(list(tables), [rows[index].efficiency for rows in tables.values()], marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_ylabel("speed-up / what the multiply-adds promise")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["deit_small_patch16_224"])
    parser.add_argument("--img-size", type=int, nargs="+", help="pixels of a side (default: the model's)")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--schedules", nargs="+", default=["default"], choices=["default", *SCHEDULES[1:]])
    parser.add_argument("--methods", nargs="+", default=["merge"], choices=METHODS)
    parser.add_argument("--multiples", type=int, nargs="+", default=[], help="also leave multiples of so many tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--training", action="store_true", help="time a forward and a backward pass")
    parser.add_argument("--profile", action="store_true", help="also say what each part of merging takes")
    parser.add_argument(
        "--chart", type=Path, help="draw how the efficiency changes with model and size, as .svg or .png"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.chart:
        require_charts()

    keep_freed_memory()
    torch.manual_seed(args.seed)
    tables = {}
    for name in args.model:
        for img_size in args.img_size or [None]:
            parts = ([name] if len(args.model) > 1 or img_size is None else []) + (
                [f"{img_size} px"] if img_size else []
            )
            tables[", ".join(parts)] = measure(args, name, img_size)
    if args.chart:
        draw(tables, args.chart)


if __name__ == "__main__":
    main()
