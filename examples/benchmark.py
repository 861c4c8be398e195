"""Speed of patched against unpatched models, as ratios taken in one run.

    python examples/benchmark.py --model deit_small_patch16_224 --batch-size 8

Weights and images are random: they do not change what is computed. Contenders take turns, each round in another
order; the ratio is the median over rounds, so the machine's own ups and downs cancel.
"""

import argparse
import math
import platform
import statistics

import timm
import torch

import token_merge_plugin
from token_merge_plugin.config import SCHEDULES
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.measuring import keep_freed_memory, time_in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--schedules", nargs="+", default=["equal_rates"], choices=SCHEDULES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = timm.create_model(args.model).eval().to(device, dtype)
    size = timm.data.resolve_data_config(model=model)["input_size"]
    images = torch.randn(args.batch_size, *size, device=device, dtype=dtype)
    contenders = [("equal_rates", 1.0), *((schedule, rate) for schedule in args.schedules for rate in args.keep_rates)]
    configs = [token_merge_plugin.MergeConfig(rate, schedule=schedule) for schedule, rate in contenders]
    macs = [count_macs(token_merge_plugin.apply(model, config), images[:1]) for config in configs]
    seconds = time_in_turns(model, configs, images, rounds=args.rounds, seconds=math.inf)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, batch {args.batch_size}, {args.rounds} rounds, {name}{threads}")
    print(f"torch {torch.__version__}, timm {timm.__version__}, token_merge_plugin {token_merge_plugin.__version__}\n")
    print("| schedule | keep rate | GMACs | share of GMACs | share of time | speed-up | time share / GMAC share |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (schedule, rate), of_rate, times in zip(contenders, macs, seconds, strict=True):
        time_share = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
        mac_share = of_rate / macs[0]
        print(
            f"| {schedule} | {rate} | {of_rate / 1e9:.2f} | {mac_share:.3f} | {time_share:.3f} | {1 / time_share:.2f}x "
            f"| {time_share / mac_share:.2f} |"
        )


if __name__ == "__main__":
    main()
