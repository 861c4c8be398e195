"""What each choice of the method is worth, and what other methods are, at equal multiply-adds and without training.

    python examples/ablation.py --data /usr/share/datasets/fashion-mnist

Runs images of Fashion-MNIST (the four IDX files; Debian package dataset-fashion-mnist) through the built-in model, or
one of examples/train_reference.py, unpatched and with one choice after another changed: importance, similarity, weights
of the merge, proportional attention, stages, multi-scale features, calibration; and through the baselines. Keep rates
are set so that all have the same share of the multiply-adds. What `MergeConfig` does not offer is built here, as a
`Variant`.

Choose on training images that the model was not trained on, report on test images:

    python examples/ablation.py --data ... --model lvvit --weights lvvit.safetensors \\
        --split train --skip 55000 --images 1000 --json lvvit.json
    python examples/ablation.py --data ... --model lvvit --weights lvvit.safetensors --groups default baselines

The tables for several models, of files written by --json:

    python examples/ablation.py --summary vit.json lvvit.json
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from torch import Tensor, nn
from tqdm import tqdm
from train_reference import MODELS, create_model

from token_merge_plugin import ConfigError, MergeConfig, calibrate
from token_merge_plugin.builtin import WEIGHTS, load_images
from token_merge_plugin.config import METHODS
from token_merge_plugin.method import reduction
from token_merge_plugin.method.importance import evenly_spaced
from token_merge_plugin.method.merging import assign, cosine_similarity, match, merge, restore, take
from token_merge_plugin.method.multiscale import fuse
from token_merge_plugin.method.reduction import SAMPLED_QUERIES, Reduced, Stage
from token_merge_plugin.patching import stage_choices
from token_merge_plugin.trial.accuracy import paired_interval
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.measuring import keep_freed_memory, plan

TensorOf = Callable[[Stage], Tensor]
CALIBRATION_IMAGES = 300

# ---------------------------------------------------------------------------------------------------------------------
# What could be done instead: each function takes a stage


def root(importance: TensorOf) -> TensorOf:
    """Return the square root of an importance, as the package takes it."""
    return lambda stage: (importance(stage) + 1e-12).sqrt()


def attention_of(stage: Stage, query: Tensor) -> Tensor:
    """Return what queries [B, H, Q, D] attend to, with the sizes counted: [B, H, Q, P + T]."""
    seen = stage.evidence[0]
    logits = (query * seen.scale) @ seen.key.transpose(2, 3)
    log_size = stage.plan.log_size(stage.state)
    return (logits if log_size is None else logits + log_size[:, None, None, :]).softmax(dim=3)


def class_attention(stage: Stage) -> Tensor:
    """Return the class token's attention, head by head: [B, H, T]."""
    prefix = stage.state.num_prefix_tokens
    return attention_of(stage, stage.evidence[0].query[:, :, :1])[:, :, 0, prefix:]


def image_part(stage: Stage, of_heads: Tensor) -> Tensor:
    """Drop the prefix tokens: [B, H, P + T, D] -> [B, H, T, D]."""
    return of_heads[:, :, stage.state.num_prefix_tokens :]


def attention_mean(stage: Stage) -> Tensor:
    return class_attention(stage).mean(dim=1)


def attention_max(stage: Stage) -> Tensor:
    return class_attention(stage).amax(dim=1)


def attention_times_value(stage: Stage) -> Tensor:
    """Class attention times the norm of what it brings (as in ATS, Fayyaz et al. 2022)."""
    return (class_attention(stage) * image_part(stage, stage.evidence[0].value).norm(dim=3)).mean(dim=1)


def attention_of_mean_query(stage: Stage) -> Tensor:
    """The attention of the mean of the patches' queries, which stands in for a class token's."""
    size = stage.before.size / stage.before.size.sum(dim=1, keepdim=True)
    mean = size[:, None, None, :] @ image_part(stage, stage.evidence[0].query)
    return attention_of(stage, mean).mean(dim=(1, 2))[:, stage.state.num_prefix_tokens :]


def attention_of_both(stage: Stage) -> Tensor:
    return (attention_mean(stage) + attention_of_mean_query(stage)) / 2


def attention_received(stage: Stage) -> Tensor:
    """The attention of all tokens, mean over heads and patches (as in Zero-TPrune, Wang et al. 2024)."""
    prefix = stage.state.num_prefix_tokens
    size = F.pad(stage.before.size, (prefix, 0), value=1.0)
    paid = attention_of(stage, stage.evidence[0].query).mean(dim=1)  # [B, P + T, P + T]
    return (size[:, None, :] @ paid)[:, 0, prefix:] / size.sum(dim=1, keepdim=True)


def attention_sampled(count: int) -> TensorOf:
    """Return the attention of some tokens only, evenly spaced: the default with another number of them."""

    def importance(stage: Stage) -> Tensor:
        position = evenly_spaced(stage.tokens.shape[1], count, None, stage.tokens.device)[0]
        queries = image_part(stage, stage.evidence[0].query)[:, :, position]
        return attention_of(stage, queries).mean(dim=(1, 2))[:, stage.state.num_prefix_tokens :]

    return importance


def key_norm(stage: Stage) -> Tensor:
    return image_part(stage, stage.evidence[0].key).norm(dim=3).mean(dim=1)


def rarity(stage: Stage) -> Tensor:
    """1 - the mean similarity to all tokens: little for what is redundant in the image."""
    return 1 - cosine_similarity(stage.tokens).mean(dim=2).clamp(max=1)


def mean_keys(stage: Stage) -> Tensor:
    """Keys, mean over heads (as ToMe compares)."""
    return image_part(stage, stage.evidence[0].key).mean(dim=1)


def centred_tokens(stage: Stage) -> Tensor:
    """Tokens less the mean of the image's tokens, so that what all have in common does not count."""
    return stage.tokens - stage.tokens.mean(dim=1, keepdim=True)


def keys_with_neighbours(stage: Stage) -> Tensor:
    keys = image_part(stage, stage.evidence[0].key).transpose(1, 2).flatten(2)
    return blended(stage, keys, 2 / 3)


def blended(stage: Stage, features: Tensor, strength: float) -> Tensor:
    """Blend features [B, T, D] with their neighbourhoods of two scales; 2/3 is the package's strength."""
    grid = stage.state.grid_size
    if grid is None:
        raise ConfigError("The patch grid is not known.")
    fused = take(fuse(restore(features, stage.before.token_map), grid), stage.before.representative)
    return features + 1.5 * strength * (fused - features)  # a third of what `fuse` returns is the feature itself


def neighbourhoods(strength: float) -> TensorOf:
    return lambda stage: blended(stage, stage.tokens, strength)


@dataclass(frozen=True)
class Variant:
    """The package's merge with a part of it exchanged; None for the package's own.

    Attributes:
        importance: [B, T], not negative.
        descriptors: [B, T, D].
        weight: "size", or what else weighs the tokens of a merge: size times "importance" or "similarity".
        tokens: [B, T, C], what is merged in the place of the tokens.
    """

    importance: TensorOf | None = None
    descriptors: TensorOf | None = None
    weight: str = "size"
    tokens: TensorOf | None = None

    def __call__(self, stage: Stage) -> Reduced:
        importance = (self.importance or reduction._importance)(stage)
        similarity = cosine_similarity((self.descriptors or reduction._descriptors)(stage))
        size, config = stage.before.size, stage.plan.config
        assignment = assign(similarity, importance, stage.amount, stage.real, config.distinctiveness)
        tokens = stage.tokens if self.tokens is None else self.tokens(stage)
        weight = self.weights(size, importance, similarity, assignment.crucial, assignment.rest)
        merged_tokens, _ = merge(tokens, weight, assignment)
        return merged_tokens, merge(tokens, size, assignment)[1], assignment

    def weights(self, size: Tensor, importance: Tensor, similarity: Tensor, crucial: Tensor, rest: Tensor) -> Tensor:
        """Return by what tokens are weighted [B, T]; only its proportions matter."""
        weight = size
        if self.weight == "importance":
            weight = size * importance
        if self.weight == "similarity":
            target = crucial.gather(1, match(similarity, crucial, rest))
            nearest = similarity.gather(1, rest[:, :, None].expand(-1, -1, similarity.shape[2])).gather(
                2, target[:, :, None]
            )
            weight = size.scatter(1, rest, size.gather(1, rest) * nearest[:, :, 0].clamp(min=0))
        return weight if weight is size else 1e6 * weight  # `merge` divides by 1 at least


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One contender.

    Attributes:
        group: what it is about.
        name: what is different from the default.
        config: options; the keep rate is found.
        variant: what the options do not offer.
        calibrated: find the schedule by calibration.
    """

    group: str
    name: str
    config: MergeConfig = MergeConfig()
    variant: Variant | None = None
    calibrated: bool = False


def rows_for(model: nn.Module) -> list[Row]:
    """Return every contender for a model."""

    def option(group: str, name: str, **options: Any) -> Row:
        return Row(group, name, MergeConfig(**options))

    def variant(group: str, name: str, **parts: Any) -> Row:
        return Row(group, name, variant=Variant(**parts))

    return [
        Row("default", "default"),
        option("importance", "class attention", importance="class_attention"),
        option("importance", "none", importance="uniform"),
        variant("importance", "class attention and mean query", importance=root(attention_of_both)),
        variant("importance", "class attention, maximum over heads", importance=root(attention_max)),
        variant("importance", "class attention x value norm", importance=root(attention_times_value)),
        variant("importance", "attention of the mean query", importance=root(attention_of_mean_query)),
        variant("importance", "attention of 4 tokens", importance=root(attention_sampled(4))),
        variant("importance", "attention of 49 tokens", importance=root(attention_sampled(49))),
        variant("importance", "attention of all tokens", importance=root(attention_received)),
        variant("importance", "attention of 16 tokens, not its root", importance=attention_sampled(SAMPLED_QUERIES)),
        variant("importance", "key norm", importance=root(key_norm)),
        variant("importance", "inverse key norm", importance=lambda stage: key_norm(stage).rsqrt()),
        variant("importance", "rarity", importance=root(rarity)),
        option("importance", "no distinctiveness", distinctiveness=False),
        option("similarity", "keys", similarity="keys"),
        variant("similarity", "mean keys", descriptors=mean_keys),
        option("similarity", "values", similarity="values"),
        variant("similarity", "tokens, centred", descriptors=centred_tokens),
        variant("similarity", "tokens with neighbours, 1/3", descriptors=neighbourhoods(1 / 3)),
        option("similarity", "tokens with neighbours, 2/3", multi_scale="descriptors"),
        variant("similarity", "keys with neighbours, 2/3", descriptors=keys_with_neighbours),
        variant("merge", "weighted by importance", weight="importance"),
        variant("merge", "weighted by similarity", weight="similarity"),
        option("merge", "no proportional attention", proportional_attention=False),
        option("multi-scale", "in the importance", multi_scale="importance"),
        variant("multi-scale", "in the tokens, 0.1", tokens=neighbourhoods(0.1)),
        variant("multi-scale", "in the tokens, 0.3", tokens=neighbourhoods(0.3)),
        *(option("stages", name, stages=stages) for name, stages in stage_rows(model)),
        Row("stages", "calibrated", calibrated=True),
        *(option("baselines", method, method=method) for method in METHODS[1:]),
    ]


def stage_rows(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Return the places of stages that are tried: {name: blocks}."""
    sections, default = stage_choices(model)
    every = tuple(block for section in sections for block in section)
    quarter = len(every) // 4
    return [
        ("one block earlier", tuple(sorted({max(0, block - 1) for block in default}))),
        ("one block later", tuple(sorted({min(every[-1], block + 1) for block in default}))),
        ("every block", every),
        ("every block but the first two", every[2:]),
        ("every other block", every[::2]),
        ("every third block", every[::3]),
        ("three in the first half", every[1 : 1 + 2 * quarter : max(1, quarter // 2)][:3]),
        ("three in the second half", every[-2 * quarter :: max(1, quarter // 2)][:3]),
    ]


@contextmanager
def in_place(row: Row) -> Iterator[None]:
    """Have the package merge by the row's variant."""
    changed = {} if row.variant is None else {"merge": row.variant}
    with mock.patch.dict(reduction.METHODS, changed):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Ablation:
    """A model, images and what it makes of them unpatched."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, data: Path, batch_size: int):
        self.model, self.images, self.labels, self.data, self.batch_size = model, images, labels, data, batch_size
        self.full = count_macs(plan(model, None), images[:1])
        self.unpatched = self.outputs()

    @torch.inference_mode()
    def outputs(self) -> Tensor:
        return torch.cat([self.model(part).float().log_softmax(1) for part in self.images.split(self.batch_size)])

    def config(self, row: Row, share: float) -> tuple[MergeConfig, int]:
        """Return the row's config at a share of the multiply-adds, and how many it leaves; the model is patched by it.

        Raises:
            ConfigError: the row does not fit the model, or cannot leave so little.
        """
        if row.calibrated:
            training = load_images(self.data, "train")[0][:CALIBRATION_IMAGES].to(self.images.device)
            config = calibrate(self.model, training, share, progress=True)
        else:
            config = equal_compute(self.model, self.images[:1], row.config, round(share * self.full))
        macs = count_macs(plan(self.model, config), self.images[:1])
        if abs(macs / self.full - share) > 0.01:
            raise ConfigError(f"It leaves {macs / self.full:.2f} of the multiply-adds, not {share}.")
        return config, macs

    def measure(self, row: Row, share: float) -> dict[str, Any]:
        """Return what became of the outputs; `root_kl` is one number an image."""
        with in_place(row):
            config, macs = self.config(row, share)
            outputs = self.outputs()
        right, mine = (x.argmax(1) == self.labels for x in (self.unpatched, outputs))
        kl = F.kl_div(outputs, self.unpatched, log_target=True, reduction="none").sum(dim=1).clamp(min=0)
        return {
            "gmacs": macs / 1e9,
            "config": config.to_json(),
            "top1": mine.float().mean().item(),
            "gained": int((mine & ~right).sum()),
            "lost": int((right & ~mine).sum()),
            "agreement": (outputs.argmax(1) == self.unpatched.argmax(1)).float().mean().item(),
            "kl": kl.mean().item(),
            "root_kl": kl.sqrt(),
        }


def against_default(root_kl: Tensor, default: Tensor) -> tuple[float, float]:
    """Return the mean root of the KL divergence as a multiple of the default's, and half its 95 % interval.

    The root, or a few images that move far would decide. The interval is that of the paired differences.
    """
    difference = root_kl - default
    half = 1.959964 * difference.std().item() / math.sqrt(len(difference))
    return root_kl.mean().item() / default.mean().item(), half / default.mean().item()


def ablate(ablation: Ablation, rows: Sequence[Row], shares: Sequence[float]) -> list[dict[str, Any]]:
    """Measure every row at every share. The first row is the default."""
    results = []
    with tqdm(total=len(rows) * len(shares), desc="ablation", unit="setting") as bar:
        for share in shares:
            default: Tensor | None = None
            for row in rows:
                result: dict[str, Any] = {"group": row.group, "name": row.name, "share": share}
                try:
                    result |= ablation.measure(row, share)
                    root_kl = result.pop("root_kl")
                    default = root_kl if default is None else default
                    result["ratio"], result["ratio_half"] = against_default(root_kl, default)
                except ConfigError as error:
                    result["refused"] = str(error)
                results.append(result)
                bar.update()
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def print_table(record: dict[str, Any]) -> None:
    """Print everything that was measured on one model."""
    n = record["images"]
    print(f"\n{record['model']}: {record['description']}\n")
    print(
        "| share | choice | GMACs | top-1 | difference, points [95 %] | agreement | KL | root KL / default's [95 %] |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    print(f"| 1 | unpatched | {record['gmacs']:.3f} | {record['top1']:.2%} | - | 100.00% | 0.0e+00 | - |")
    for row in record["rows"]:
        name = row["name"] if row["group"] in ("default", "baselines") else f"{row['group']}: {row['name']}"
        if "refused" in row:
            print(f"| {row['share']} | {name} | does not fit: {row['refused'].split('. ')[0]} |" + " |" * 5)
            continue
        low, high = (100 * end for end in paired_interval(row["gained"], row["lost"], n))
        difference = f"{100 * (row['gained'] - row['lost']) / n:+.2f} [{low:+.2f}, {high:+.2f}]"
        ratio = f"{row['ratio']:.2f} ± {row['ratio_half']:.2f}"
        print(
            f"| {row['share']} | {name} | {row['gmacs']:.3f} | {row['top1']:.2%} | {difference} | "
            f"{row['agreement']:.2%} | {row['kl']:.1e} | {'1' if row['group'] == 'default' else ratio} |"
        )


def print_methods(records: Sequence[dict[str, Any]]) -> None:
    """Print what the default and the baselines do to all models: top-1 less the unpatched model's, and KL."""
    columns = dict.fromkeys(
        row["name"] for record in records for row in record["rows"] if row["group"] in ("default", "baselines")
    )
    print("| model | top-1 | share | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for record in records:
        for share in dict.fromkeys(row["share"] for row in record["rows"]):
            found = {row["name"]: row for row in record["rows"] if row["share"] == share}
            cells = [_difference(found.get(name), record["images"]) for name in columns]
            print(f"| {record['model']} | {record['top1']:.2%} | {share} | " + " | ".join(cells) + " |")


def _difference(row: dict[str, Any] | None, images: int) -> str:
    if row is None or "refused" in row:
        return "-"
    low, high = paired_interval(row["gained"], row["lost"], images)
    points = 100 * (row["gained"] - row["lost"]) / images
    return f"{points:+.2f} ± {50 * (high - low):.2f}, {row['kl']:.1e}"


def print_choices(records: Sequence[dict[str, Any]]) -> None:
    """Print the ratios of all models side by side: one cell a model, one number a share, marked where certain."""
    shares = sorted({row["share"] for record in records for row in record["rows"]}, reverse=True)
    print("| choice | " + " | ".join(record["model"] for record in records) + " |")
    print("|---" * (1 + len(records)) + "|")
    names = dict.fromkeys((row["group"], row["name"]) for record in records for row in record["rows"])
    for group, name in names:
        cells = []
        for record in records:
            found = {row["share"]: row for row in record["rows"] if (row["group"], row["name"]) == (group, name)}
            cells.append(" / ".join(_ratio(found.get(share)) for share in shares))
        print(f"| {group}: {name} | " + " | ".join(cells) + " |")


def _ratio(row: dict[str, Any] | None) -> str:
    """Return the ratio of a row: bold where it is below 1 by more than its interval, plain where it is above."""
    if row is None or "refused" in row:
        return "-"
    text = f"{row['ratio']:.2f}"
    if row["ratio"] + row["ratio_half"] < 1:
        return f"**{text}**"
    return text if row["ratio"] - row["ratio_half"] > 1 or row["group"] == "default" else f"({text})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", type=Path, nargs="+", help="print the tables of these files, and measure nothing")
    parser.add_argument("--data", type=Path, help="folder of the four IDX files")
    parser.add_argument("--model", default="vit", choices=MODELS, help="as trained")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of examples/train_reference.py")
    parser.add_argument("--name", help="of the model, in the tables (default: as --model)")
    parser.add_argument("--split", default="t10k", choices=["t10k", "train"])
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many images")
    parser.add_argument("--images", type=int, default=10_000, help="use so many")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.67, 0.5], help="of the multiply-adds")
    parser.add_argument("--groups", nargs="+", help="groups of rows, or rows by name (default: all)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to it")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.summary:
        records = [json.loads(path.read_text()) for path in args.summary]
        print_methods(records)
        print()
        print_choices(records)
        return
    if args.data is None:
        parser.error("--data is missing: give the folder of the four IDX files of Fashion-MNIST.")
    keep_freed_memory()
    model = create_model(args.model).eval()
    load_checkpoint(model, str(args.weights))
    model = model.to(args.device)
    rows = rows_for(model)
    if args.groups:
        rows = [row for row in rows if row.group == "default" or {row.group, row.name}.intersection(args.groups)]
    part = slice(args.skip, args.skip + args.images)
    images, labels = (x[part].to(args.device) for x in load_images(args.data, args.split))
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
        ablation = Ablation(model, images, labels, args.data, args.batch_size)
        results = ablate(ablation, rows, args.shares)
    where = "CUDA" if args.device != "cpu" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}, {where}"
    record = {
        "model": args.name or args.model,
        "description": f"{len(images):,} {'test' if args.split == 't10k' else 'training'} images, {versions}",
        "images": len(images),
        "gmacs": ablation.full / 1e9,
        "top1": (ablation.unpatched.argmax(1) == labels).float().mean().item(),
        "rows": results,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))
    print_table(record)


if __name__ == "__main__":
    main()
