"""Speed of patched against unpatched models, as ratios taken in one run.

    python examples/benchmark.py --model deit_small_patch16_224 --batch-size 8

Weights and images are random: they do not change what is computed. Contenders take turns, each round in another
order; the ratio is the median over rounds, so the machine's own ups and downs cancel. The efficiency is the speed-up
as a share of what the multiply-adds promise. `--profile` says where the rest goes: what choosing, merging and restoring
take, and what smaller matrices take beyond their share.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch

import token_merge_plugin
from token_merge_plugin.config import METHODS, SCHEDULES
from token_merge_plugin.method import reduction
from token_merge_plugin.method.state import Pass, Plan
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.measuring import keep_freed_memory, time_in_turns

# What is done for merging, by what it is done for.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "choosing": [(reduction, name) for name in ("_importance", "merge_cost", "assign", "bipartite", "keep_best")],
    "merging": [(reduction, "merge"), (reduction, "fuse_rest")],
    "restoring": [(reduction, "_offset"), (Plan, "restore")],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--schedules", nargs="+", default=["default"], choices=["default", *SCHEDULES[1:]])
    parser.add_argument("--methods", nargs="+", default=["merge"], choices=METHODS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--profile", action="store_true", help="also say what each part of merging takes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = timm.create_model(args.model).eval().to(device, dtype)
    size = timm.data.resolve_data_config(model=model)["input_size"]
    images = torch.randn(args.batch_size, *size, device=device, dtype=dtype)
    contenders = [("unpatched", "", 1.0)]
    for method in args.methods:
        schedules = args.schedules if method == "merge" else ["default"]
        contenders += [(method, schedule, rate) for schedule in schedules for rate in args.keep_rates]
    configs = [
        token_merge_plugin.MergeConfig(rate, method=method, schedule=schedule if schedule in SCHEDULES else None)
        for method, schedule, rate in [("merge", "", 1.0), *contenders[1:]]
    ]
    macs = [count_macs(token_merge_plugin.apply(model, config), images[:1]) for config in configs]
    seconds = time_in_turns(model, configs, images, rounds=args.rounds, seconds=math.inf)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, batch {args.batch_size}, {args.rounds} rounds, {name}{threads}")
    print(f"torch {torch.__version__}, timm {timm.__version__}, token_merge_plugin {token_merge_plugin.__version__}\n")
    print("| method | schedule | keep rate | GMACs | share of GMACs | share of time | speed-up | efficiency |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    left = []
    for (method, schedule, rate), of_rate, times in zip(contenders, macs, seconds, strict=True):
        time_share = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
        mac_share = of_rate / macs[0]
        left.append((time_share, mac_share))
        print(
            f"| {method} | {schedule} | {rate} | {of_rate / 1e9:.2f} | {mac_share:.3f} | {time_share:.3f} "
            f"| {1 / time_share:.2f}x | {mac_share / time_share:.2f} |"
        )
    if args.profile:
        titles = ["method", "schedule", "keep rate", *PARTS, "the rest, beyond its multiply-adds"]
        print(f"\nShares of the unpatched time:\n\n| {' | '.join(titles)} |")
        print("|---|---|---:|" + "---:|" * (len(PARTS) + 1))
        found = profile(model, configs[1:], images, args.rounds)
        for contender, parts, (time_share, mac_share) in zip(contenders[1:], found, left[1:], strict=True):
            cells = [*map(str, contender), *(f"{part:.1%}" for part in (*parts, time_share - sum(parts) - mac_share))]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
