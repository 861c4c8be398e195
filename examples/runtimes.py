"""Patched models in other runtimes: how close they are to PyTorch, how fast, and how well they bear quantisation.

    python examples/runtimes.py --rounds 20

Writes results/runtimes.md, with tables: DeiT-S in each runtime, patched against unpatched in the same one; a small
model of each family (those of the tests) in each runtime; int8, of torchao, ONNX Runtime and OpenVINO, on the built-in
model and images; and, with `--weights` and `--photographs`, on the ViT of real_weights.py. Needs the extras onnx and
openvino, and `pip install torchao nncf`. Results are kept as they come in the log: the same command goes on from there,
and `--parts` asks for some of the tables.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from token_merge_plugin import ExportError, MergeConfig, apply, export
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.trial.exporting import random_images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import keep_freed_memory, time_in_turns
from token_merge_plugin.trial.run import device_name
from token_merge_plugin.trial.runtimes import RUNTIMES
from token_merge_plugin.trial.speed import median_interval, speed_ups
from token_merge_plugin.trial.table import format_speed_up

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests"))  # for the small models of the tests
PARTS = ("runtimes", "families", "quantisation", "tokens")
KEEP_RATE = 0.7
IMAGES = 200
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "torchao", "nncf")

Rows = list[list[str]]
Quantisations = Iterator[tuple[str, Callable[[], list[str]]]]


# The runtimes, and the families in them


def exported(model: nn.Module, to: str, rounds: int, images: Tensor) -> list[str]:
    """Export a model, and return the cells of its row: largest difference, speed-up at batch 8 and 1."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{RUNTIMES[to].suffix}"
        try:
            done = export(model, file, to, KEEP_RATE, images=images, dynamic_batch=True, rounds=rounds)
        except ExportError as error:
            return [str(error).split(": ")[0], "-", "-"]
    speeds = [format_speed_up(done.speed_ups[size]) if size in done.speed_ups else "-" for size in (8, 1)]
    return [f"{max(done.differences.values()):.1e}", *speeds]


@torch.no_grad()
def compiled(model: nn.Module, rounds: int, images: Tensor) -> list[str]:
    """Compile a model, and return the cells of its row as `exported` does."""
    patched = apply(copy.deepcopy(model), KEEP_RATE)
    runner = torch.compile(patched, dynamic=False)
    configs = [None, MergeConfig(KEEP_RATE)]
    differences, speeds = [], []
    for size in (8, 1):
        x = images[:size]
        expected = patched(x)
        differences.append(((runner(x) - expected).abs().max() / expected.abs().max()).item())
        ratios = speed_ups(*time_in_turns(model, configs, x, rounds=rounds, seconds=float("inf"), compiled=True))
        speeds.append(format_speed_up((statistics.median(ratios), median_interval(ratios))))
    return [f"{max(differences):.1e}", *speeds]


def of_runtimes(name: str, rounds: int) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Go through the runtimes: (name, what makes the row's other cells)."""
    model = timm.create_model(name).eval()
    images = random_images(model)
    for to, runtime in RUNTIMES.items():
        yield runtime.name, lambda to=to: exported(model, to, rounds, images)
    yield "torch.compile", lambda: compiled(model, rounds, images)


def one_of_each_family() -> list[str]:
    from families import FAMILIES

    return [next(iter(table)) for table in FAMILIES.values()]


def of_families(names: list[str] | None) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Go through the small models of the tests, one of each family: (name, what makes the row's other cells)."""
    from families import images, make

    for kind in names or one_of_each_family():
        yield (
            kind,
            lambda kind=kind: [
                exported(make(kind), to, 0, images(kind, batch=8))[0] for to in ("torch", "onnx", "openvino")
            ],
        )


# Quantisation: each function takes what it quantises and returns what runs it on images


def by_torchao(model: nn.Module, config: Any) -> Callable[[Tensor], Tensor]:
    """Quantise the linear layers of a model by torchao, in place."""
    from torchao.quantization import quantize_

    quantize_(model, config)
    return model


def by_onnx_runtime(file: Path, images: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Quantise an ONNX file by ONNX Runtime: with images to calibrate on, or dynamically."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([] if images is None else images.split(8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quantised = file.with_suffix(".int8.onnx")
    if images is None:
        quantize_dynamic(file, quantised)
    else:
        # Layers with weights alone. What chooses tokens compares numbers that 8 bits cannot tell apart.
        options = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"], "extra_options": {"MatMulConstBOnly": True}}
        quantize_static(file, quantised, Reader(), **options)
    return _first(RUNTIMES["onnx"].load(quantised))


def by_openvino(file: Path, images: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Quantise an ONNX file for OpenVINO, by nncf: the weights, and with images to calibrate on, activations."""
    import nncf
    import openvino

    model = openvino.Core().read_model(file)
    if images is None:
        model = nncf.compress_weights(model)
    else:
        dataset = nncf.Dataset([batch.numpy() for batch in images.split(8)])
        model = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images) // 8)
    quantised = file.with_suffix(".xml")
    openvino.save_model(model, quantised, compress_to_fp16=False)
    return _first(RUNTIMES["openvino"].load(quantised))


def _first(run: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda images: run(images)[0]


class Features(nn.Module):
    """A model that gives its tokens, [B, 1 + N, C]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def of_classes(folder: Path) -> Quantisations:
    """Go through the ways to quantise the built-in model."""
    images, labels = load_images()
    x, y = images[:IMAGES], labels[:IMAGES]

    def cells(before: Tensor, after: Tensor) -> list[str]:
        before, after = before.argmax(1), after.argmax(1)
        return [f"{value.float().mean():.1%}" for value in (before == y, after == y, before == after)]

    return quantisations(create_reference_model(), x, images[-64:], cells, folder)


@torch.no_grad()
def of_tokens(folder: Path, weights: Path, photographs: list[Path]) -> Quantisations:
    """Go through the ways to quantise the ViT with pretrained weights, on photographs."""
    import real_weights
    from ablation import relative_error

    crops = torch.cat([real_weights.photographs(path, 224, 1).images for path in photographs])
    x, calibration = crops[1::2], crops[::2][:32]
    model = Features(real_weights.load_backbone(weights))
    expected = torch.cat([model(batch) for batch in x.split(8)])

    def cells(before: Tensor, after: Tensor) -> list[str]:
        parts = (slice(1, None), slice(0, 1))  # the patches, the class token
        return [
            f"{relative_error(found[:, part], expected[:, part]).mean():.3f}"
            for part in parts
            for found in (before, after)
        ]

    return quantisations(model, x, calibration, cells, folder)


@torch.no_grad()
def quantisations(
    model: nn.Module, x: Tensor, calibration: Tensor, cells: Callable[[Tensor, Tensor], list[str]], folder: Path
) -> Quantisations:
    """Go through the ways to quantise: (name, what makes the row's other cells).

    Args:
        model: unpatched.
        x, calibration: images that are compared, and that activations are calibrated on.
        cells: make them from the outputs of the unpatched and the patched model, both quantised.
        folder: for exported files.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    folder.mkdir()

    def row(*runs: Callable[[Tensor], Tensor]) -> list[str]:
        before, after = (torch.cat([run(batch) for batch in x.split(8)]) for run in runs)
        return cells(before, after)

    def torchao(config: Any, first: str) -> list[str]:
        unpatched, patched = copy.deepcopy(model), copy.deepcopy(model)
        by_torchao(unpatched, config)
        if first == "apply":
            by_torchao(apply(patched, KEEP_RATE), config)
        else:
            apply(by_torchao(patched, config), KEEP_RATE)
        return row(unpatched, patched)

    def files() -> list[Path]:
        made = [folder / "unpatched.onnx", folder / "patched.onnx"]
        for file, rate in zip(made, (1.0, KEEP_RATE), strict=True):
            if not file.exists():
                export(model, file, "onnx", rate, images=x[:8], dynamic_batch=True, rounds=0)
        return made

    yield "none", lambda: row(model, apply(copy.deepcopy(model), KEEP_RATE))
    for kind, config in (("weights", Int8WeightOnlyConfig), ("dynamic", Int8DynamicActivationInt8WeightConfig)):
        yield f"torchao, {kind}, then `apply`", lambda config=config: torchao(config(), "quantise")
        yield f"`apply`, then torchao, {kind}", lambda config=config: torchao(config(), "apply")
    for name, by, given in (
        ("ONNX Runtime, dynamic", by_onnx_runtime, None),
        ("ONNX Runtime, static", by_onnx_runtime, calibration),
        ("OpenVINO, weights", by_openvino, None),
        ("OpenVINO, weights and activations", by_openvino, calibration),
    ):
        yield name, lambda by=by, given=given: row(*(by(file, given) for file in files()))


# The page

HEADINGS = {
    "runtimes": ["runtime", "largest difference", "speed-up, batch 8", "speed-up, batch 1"],
    "families": ["family", "torch.export", "ONNX Runtime", "OpenVINO"],
    "quantisation": ["int8", "top-1 unpatched", "top-1 patched", "agreement of the two"],
    "tokens": [
        "int8",
        *(f"{tokens}, {model}" for tokens in ("patches", "class") for model in ("unpatched", "patched")),
    ],
}


def table(heading: list[str], rows: Rows) -> str:
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(args: argparse.Namespace, rows: dict[str, Rows]) -> str:
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    device = device_name(torch.device("cpu"))
    not_run = sorted(set(one_of_each_family()) - {row[0] for row in rows["families"]})
    about = {
        "runtimes": f"{args.model}, random weights, {device}, {args.rounds} rounds; load average at the end: "
        f"{os.getloadavg()[0]:.1f}. Speed-up is over the unpatched model in the same runtime, in turns. Largest "
        "difference to PyTorch at batch 1, 2 and 8, as a share of the largest output.",
        "families": "Largest difference of a small model of each family, random weights, likewise. "
        f"Not run: {', '.join(not_run) or 'none'}.",
        "quantisation": f"The built-in model, {IMAGES} of its test images. Both models are quantised in the same way; "
        "by ONNX Runtime and nncf without the products of two activations, where these can be left out.",
        "tokens": "ViT-S/14 with pretrained weights, 224 px, every other photograph. Relative error of the patch "
        "tokens and of the class token against the model that is neither quantised nor patched.",
    }
    titles = {
        "runtimes": "Runtimes",
        "families": "Families",
        "quantisation": "Quantisation",
        "tokens": "Quantisation, photographs",
    }
    parts = [f"# Patched models in other runtimes\n\nKeep rate {KEEP_RATE}; {versions}. By `examples/runtimes.py`."]
    parts += [
        f"## {titles[part]}\n\n{about[part]}\n\n{table(HEADINGS[part], rows[part])}" for part in PARTS if rows[part]
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="that is timed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; tokens only with the two below")
    parser.add_argument("--weights", type=Path, help="folder that real_weights.py wrote")
    parser.add_argument("--photographs", type=Path, nargs="+", help="folders of photographs")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="of tests/families.py (default: one of each)")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "runtimes.md")
    parser.add_argument("--log", type=Path, default=Path("runtimes.jsonl"), help="default: runtimes.jsonl")
    args = parser.parse_args(argv)
    given = args.weights is not None and args.photographs is not None
    args.parts = args.parts or [part for part in PARTS if part != "tokens" or given]
    if "tokens" in args.parts and not given:
        parser.error("--parts tokens needs --weights and --photographs.")

    keep_freed_memory()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(args.log, {"model": args.model, "rounds": args.rounds}) as journal,
    ):
        work = {
            "runtimes": lambda: of_runtimes(args.model, args.rounds),
            "families": lambda: of_families(args.families),
            "quantisation": lambda: of_classes(Path(folder, "classes")),
            "tokens": lambda: of_tokens(Path(folder, "tokens"), args.weights, args.photographs),
        }
        for part in args.parts:
            for name, cells in work[part]():
                if name not in (entry["row"][0] for entry in journal.of(part)):
                    with torch.no_grad():
                        journal.write(part, row=[name, *cells()])
                    print(*journal.of(part)[-1]["row"], sep=" | ", flush=True)
                rows = {part: [entry["row"] for entry in journal.of(part)] for part in PARTS}
                args.output.write_text(page(args, rows), encoding="utf-8")
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
