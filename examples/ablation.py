"""What each choice of the method is worth, and what other methods are, at equal multiply-adds and without training.

    python examples/ablation.py --photographs FOLDER ... --weights weights --half 0          # choose on these ...
    python examples/ablation.py --photographs FOLDER ... --weights weights --half 1 --markdown results/dense.md

Runs images through a model, unpatched and with one choice after another changed: importance, what a merge loses,
weights of the merge, restoring, schedules, multi-scale features, calibration; and through the baselines. Keep rates are
set so that all have the same share of the multiply-adds. What `MergeConfig` does not offer is built here, as a
`Variant`.

With --photographs, the model is the pretrained ViT-S/14 of real_weights.py without a classifier, and the images are
crops of the photographs in these folders: of every other one, by name, from the first (--half 0) or the second
(--half 1) on, so that what was chosen on some is reported on others. The outputs are its patch tokens, its class token
and the saliency map of its decoder. With --objects, the model is a classifier of train_classifier.py (--weights is its
folder), and the images are those that it wrote. Else they are images of Fashion-MNIST (--data; the four IDX files;
Debian package dataset-fashion-mnist), and the model is the built-in one or another one of train_reference.py:

    python examples/ablation.py --objects objects/test --weights classifier --images 400
    python examples/ablation.py --data /usr/share/datasets/fashion-mnist
    python examples/ablation.py --data ... --model lvvit --weights lvvit.safetensors --split train --skip 55000

Every method restores the grid as the default does, but for those that drop tokens.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from real_weights import MODEL, fit_positions, load_backbone, load_decoder, photographs
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn
from tqdm import tqdm
from train_reference import MODELS, create_model

from token_merge_plugin import ConfigError, MergeConfig, calibrate
from token_merge_plugin.builtin import WEIGHTS, load_images
from token_merge_plugin.config import METHODS, tokens_kept
from token_merge_plugin.method import merging, reduction
from token_merge_plugin.method.merging import (
    Assignment,
    assign,
    cosine_similarity,
    interpolation,
    merge,
    merge_cost,
    restore,
    split,
    take,
    without_diagonal,
)
from token_merge_plugin.method.multiscale import fuse
from token_merge_plugin.method.reduction import Reduced, Stage
from token_merge_plugin.method.state import Pass
from token_merge_plugin.patching import stage_choices
from token_merge_plugin.trial.accuracy import SURE, paired_interval
from token_merge_plugin.trial.budgets import Budget, scheduled
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.distances import paired_difference
from token_merge_plugin.trial.measuring import Use, features, forward, keep_freed_memory, plan
from token_merge_plugin.trial.schedules import Shape, numbers

TensorOf = Callable[[Stage], Tensor]
Images = Callable[[], Tensor]
CALIBRATION_IMAGES = 300

# ---------------------------------------------------------------------------------------------------------------------
# What could be done instead: each function takes a stage


def powers(class_power: float, image_power: float, factor: float, larger: bool = True, values: bool = True) -> TensorOf:
    """Return the importance by powers of the attention of the class token and of some image tokens; 0 for none.

    Args:
        class_power, image_power: of the attention relative to its mean.
        factor: of the second.
        larger: the larger of the two counts; else their mean, whose power is then `image_power`.
        values: attention is counted by the norms of the values.
    """

    def relative(stage: Stage, class_tokens: bool) -> Tensor:
        rows = reduction._class_rows(stage) if class_tokens else reduction._image_rows(stage)
        attention = reduction._attention_received(stage, rows, values).mean(dim=1, keepdim=True)
        proportional = stage.plan.config.proportional_attention
        return reduction.relative_importance(attention, stage.before.size, proportional)[:, 0]

    def importance(stage: Stage) -> Tensor:
        if not stage.plan.num_class_tokens:
            raise ConfigError("There is no class token.")
        by_class = relative(stage, True)
        if not factor:
            return by_class**class_power
        by_image = relative(stage, False)
        if not larger:
            return ((by_class + by_image) / 2) ** image_power
        return torch.maximum(by_class**class_power, factor * by_image**image_power)

    return importance


def normed_cost(stage: Stage, weight: Tensor) -> Tensor:
    return merge_cost(F.layer_norm(stage.tokens, stage.tokens.shape[2:]), weight)


def unsized_cost(stage: Stage, weight: Tensor) -> Tensor:
    return merge_cost(stage.tokens, weight / stage.before.size)


def cosine_cost(stage: Stage, weight: Tensor) -> Tensor:
    """1 - the cosine, as in versions before this criterion, weighed as the default's."""
    inverse = 1 / weight
    cost = 2 * (1 - cosine_similarity(stage.tokens)) / (inverse[:, :, None] + inverse[:, None, :])
    return without_diagonal(cost)


def neighbourhoods(strength: float) -> TensorOf:
    """Return the tokens, blended with their neighbourhoods of two scales; 2/3 is the package's strength."""

    def blended(stage: Stage) -> Tensor:
        grid = stage.state.grid_size
        if grid is None:
            raise ConfigError("The patch grid is not known.")
        fused = take(fuse(restore(stage.tokens, stage.before.token_map), grid), stage.before.representative)
        return stage.tokens + 1.5 * strength * (fused - stage.tokens)  # a third of `fuse` is the token itself

    return blended


def agglomerate(stage: Stage, weight: Tensor) -> Assignment:
    """Merge the pair with which the least is lost, again and again: what `assign` comes close to, pair by pair."""
    batch, tokens, _ = stage.tokens.shape
    keep = tokens_kept(tokens, stage.amount)
    means, weight = stage.tokens.clone(), weight.clone()
    images = torch.arange(batch, device=means.device)
    holder = torch.arange(tokens, device=means.device).repeat(batch, 1)
    stays = torch.ones_like(holder, dtype=torch.bool)
    for _ in range(tokens - keep):
        cost = merge_cost(means, weight).masked_fill(~(stays[:, :, None] & stays[:, None, :]), math.inf)
        pair = cost.flatten(1).argmin(dim=1)
        into, gone = pair // tokens, pair % tokens
        share = weight[images, gone] / (weight[images, into] + weight[images, gone])
        means[images, into] += share[:, None] * (means[images, gone] - means[images, into])
        weight[images, into] += weight[images, gone]
        stays[images, gone] = False
        holder = torch.where(holder == gone[:, None], into[:, None], holder)
    crucial, rest = split(stays.float(), keep)
    target = (holder.gather(1, rest)[:, :, None] == crucial[:, None, :]).int().argmax(dim=2)
    return Assignment(crucial, rest, target)


def own_updates(before: Tensor, after: Tensor, assignment: Assignment, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give each token the updates of the token that holds it."""
    sources = assignment.target.unsqueeze(2)
    return sources, before.new_ones(*assignment.target.shape, 2, 1)


def for_those_that_went(*args: Any) -> tuple[Tensor, Tensor]:
    """Give updates in between to the tokens that went alone."""
    sources, shares = interpolation(*args)
    own = F.one_hot(torch.zeros_like(sources[:, :, 0]), sources.shape[2])
    return sources, torch.stack((shares[:, :, 0], own.to(shares.dtype)), dim=2)


@dataclass(frozen=True)
class Variant:
    """The package's merge with a part of it exchanged; None for the package's own.

    Attributes:
        importance: [B, T], not negative.
        cost: what merging each pair loses [B, T, T], from a stage and the weights of its tokens.
        exact: choose pair by pair.
        by_importance: merged tokens are means weighted by importance, too, and not by sizes alone.
        tokens: [B, T, C], what is merged in the place of the tokens.
        rounds: of `assign`.
        offsets: give back what a patch had of its own.
        neighbours: so many tokens besides its own tell what blocks would have added to a token that was merged.
        stayed: that is asked for the tokens that stayed, too.
        keep_norms: merged tokens are as long as those that they are made of.
    """

    importance: TensorOf | None = None
    cost: Callable[[Stage, Tensor], Tensor] | None = None
    exact: bool = False
    by_importance: bool = False
    tokens: TensorOf | None = None
    rounds: int = merging.ROUNDS
    offsets: bool = True
    neighbours: int = merging.NEIGHBOURS
    stayed: bool = True
    keep_norms: bool = True

    def __call__(self, stage: Stage) -> Reduced:
        size = stage.before.size
        with torch.no_grad():
            importance = (self.importance or reduction._importance)(stage)
            weight = size * importance
            if self.exact:
                assignment = agglomerate(stage, weight)
            else:
                descriptors = reduction._descriptors(stage)
                cost = merge_cost(descriptors, weight) if self.cost is None else self.cost(stage, weight)
                neighbours = self.neighbours if stage.state.reads_grid else 0
                assignment = assign(cost, stage.amount, stage.real, neighbours)
        tokens = stage.tokens if self.tokens is None else self.tokens(stage)
        # `merge` divides by 1 at least, and only the proportions of what it is given matter.
        merged_tokens, _ = merge(tokens, 1e6 * weight if self.by_importance else size, assignment, self.keep_norms)
        return merged_tokens, merge(tokens, size, assignment)[1], assignment


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One contender.

    Attributes:
        group: what it is about.
        name: what is different from the default.
        config: options; the keep rate is found.
        variant: what the options do not offer.
        shape: a schedule that they do not offer.
        calibrated: find the schedule by calibration.
    """

    group: str
    name: str
    config: MergeConfig = MergeConfig()
    variant: Variant | None = None
    shape: Shape | None = None
    calibrated: bool = False


def rows_for(model: nn.Module) -> list[Row]:
    """Return every contender for a model."""

    def option(group: str, name: str, **options: Any) -> Row:
        return Row(group, name, MergeConfig(**options))

    def variant(group: str, name: str, **parts: Any) -> Row:
        return Row(group, name, variant=Variant(**parts))

    return [
        Row("default", "default"),
        option("importance", "class attention^0.25", importance="class_attention"),
        option("importance", "none", importance="uniform"),
        variant("importance", "class attention^0.5", importance=powers(0.5, 0, 0)),
        variant("importance", "class attention^0.25, without value norms", importance=powers(0.25, 0, 0, values=False)),
        variant("importance", "larger of both^0.35", importance=powers(0.35, 0.35, 1)),
        variant("importance", "mean of both^0.5", importance=powers(0.5, 0.5, 1, larger=False)),
        option("loss", "of the tokens", similarity="tokens"),
        option("loss", "of the keys", similarity="keys"),
        option("loss", "of the keys' means over heads", similarity="mean_keys"),
        option("loss", "of the values", similarity="values"),
        variant("loss", "of the layer-normed tokens", cost=normed_cost),
        variant("loss", "without sizes", cost=unsized_cost),
        variant("loss", "cosine in the place of the distance", cost=cosine_cost),
        variant("choice", "one round", rounds=1),
        variant("choice", "two rounds", rounds=2),
        variant("choice", "four rounds", rounds=4),
        variant("choice", "the cheapest pair again and again", exact=True),
        variant("merge", "weighted by importance", by_importance=True),
        variant("merge", "means, shorter than what they are made of", keep_norms=False),
        option("merge", "no proportional attention", proportional_attention=False),
        variant("restoring", "with the updates of its token alone", neighbours=0),
        variant("restoring", "with those of four other tokens, too", neighbours=4),
        variant("restoring", "with those of twelve other tokens, too", neighbours=12),
        variant("restoring", "with those of others for tokens that went alone", stayed=False),
        variant("restoring", "without what was its own", offsets=False),
        option("multi-scale", "in the importance", multi_scale="importance"),
        option("multi-scale", "in what a merge loses", multi_scale="descriptors"),
        variant("multi-scale", "in the tokens, 0.1", tokens=neighbourhoods(0.1)),
        variant("multi-scale", "in the tokens, 0.3", tokens=neighbourhoods(0.3)),
        *schedule_rows(model),
        *resolution_rows(model),
        Row("schedule", "calibrated", calibrated=True),
        *(option("baselines", method, method=method) for method in METHODS[1:]),
    ]


def schedule_rows(model: nn.Module) -> list[Row]:
    """Return the schedules that are tried."""
    choices = stage_choices(model)
    every = choices.blocks

    def numbered(name: str, stages: Sequence[int]) -> Row:
        return Row("schedule", f"equal numbers, {name}", MergeConfig(stages=stages, schedule="equal_numbers"))

    return [
        Row("schedule", "equal rates, the paper's stages", MergeConfig(schedule="equal_rates")),
        numbered("the paper's stages", choices.equal_rates),
        numbered("every block", every),
        numbered("every block but the first and the last", every[1:-1]),
        numbered("every other block, from the second", every[1:-1:2]),
        numbered("every other block, from the second, but the last of these", every[1:-1:2][:-1]),
        numbered("every other block, from the first", every[:-1:2]),
        Row("schedule", "late-heavy numbers, every block", shape=partial(numbers, choices.sections, every, 2)),
    ]


def resolution_rows(model: nn.Module) -> list[Row]:
    """Return what may depend on how many patches there are: what tokens are compared by, and in how many stages."""
    five = stage_choices(model).blocks[1:-1:2]
    schedules: dict[str, dict[str, Any]] = {
        "three": {"schedule": "equal_rates"},
        "four": {"schedule": "equal_numbers"},
        "five": {"schedule": "equal_numbers", "stages": five},
    }
    return [
        Row("resolution", f"{what}, {number} stages", MergeConfig(similarity=similarity, **options))
        for similarity, what in (("tokens", "tokens"), ("mean_keys", "mean keys"))
        for number, options in schedules.items()
    ]


@contextmanager
def in_place(row: Row) -> Iterator[None]:
    """Have the package merge by the row's variant."""
    with ExitStack() as stack:
        if row.variant is not None:
            stack.enter_context(mock.patch.dict(reduction.METHODS, {"merge": row.variant}))
            stack.enter_context(mock.patch.object(merging, "ROUNDS", row.variant.rounds))
            if not row.variant.neighbours or not row.variant.offsets:
                stack.enter_context(mock.patch.object(reduction, "interpolation", own_updates))
            elif not row.variant.stayed:
                stack.enter_context(mock.patch.object(reduction, "interpolation", for_those_that_went))
            if not row.variant.offsets:
                nothing = property(lambda _: (), lambda *_: None)
                stack.enter_context(mock.patch.object(Pass, "merges", nothing, create=True))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Ablation:
    """A classifier, images and what it makes of them unpatched.

    What is compared is the root of the KL divergence: of the divergence itself, few images that move far would decide.

    Attributes:
        measure: what is compared.
        training: returns images to calibrate by.
    """

    measure = "root KL / default's"
    use: Use = staticmethod(forward)

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, training: Images, batch_size: int):
        self.model, self.images, self.labels, self.batch_size = model, images, labels, batch_size
        self.training = training
        self.full = self.macs()
        self.unpatched = self.outputs()

    def macs(self) -> int:
        """Return the multiply-adds that an image takes."""
        return count_macs(self.model, self.images[:1], self.use)

    @torch.inference_mode()
    def outputs(self) -> Tensor:
        return torch.cat([self.model(part).float().log_softmax(1) for part in self.images.split(self.batch_size)])

    def patch(self, row: Row, share: float) -> tuple[MergeConfig, int]:
        """Patch the model by the row, at a share of the multiply-adds; return the config, and how many are left.

        Raises:
            ConfigError: the row does not fit the model, or cannot leave so little.
        """
        if row.calibrated:
            config = calibrate(self.model, self.training(), share, batch_size=self.batch_size)
        elif row.shape is not None:
            budget = Budget(self.model, self.images[:1], "compute", share, use=self.use)
            schedule = budget.with_compute(row.config, row.shape, share)
            if schedule is None:
                raise ConfigError("It cannot leave so few multiply-adds.")
            config = scheduled(row.config, schedule)
        else:
            config = equal_compute(self.model, self.images[:1], row.config, round(share * self.full), self.use)
        plan(self.model, config)
        macs = self.macs()
        if abs(macs / self.full - share) > 0.01:
            raise ConfigError(f"It leaves {macs / self.full:.2f} of the multiply-adds, not {share}.")
        return config, macs

    def compared(self) -> tuple[dict[str, float], Tensor]:
        """Return what became of the outputs, and how far each image moved."""
        outputs = self.outputs()
        right, mine = (x.argmax(1) == self.labels for x in (self.unpatched, outputs))
        kl = F.kl_div(outputs, self.unpatched, log_target=True, reduction="none").sum(dim=1).clamp(min=0)
        found = {
            "top1": mine.float().mean().item(),
            "gained": int((mine & ~right).sum()),
            "lost": int((right & ~mine).sum()),
            "agreement": (outputs.argmax(1) == self.unpatched.argmax(1)).float().mean().item(),
            "kl": kl.mean().item(),
        }
        return found, kl.sqrt()

    @staticmethod
    def against_default(distance: Tensor, default: Tensor) -> tuple[float, float]:
        """Return the mean distance as a multiple of the default's, and half the 95 % interval of paired differences."""
        _, error = paired_difference(distance, default)
        return distance.mean().item() / default.mean().item(), SURE * error / default.mean().item()

    def ablate(self, rows: Sequence[Row], shares: Sequence[float]) -> list[dict[str, Any]]:
        """Measure every row at every share. The first row is the default."""
        results = []
        with tqdm(total=len(rows) * len(shares), desc="ablation", unit="setting") as bar:
            for share in shares:
                default: Tensor | None = None
                for row in rows:
                    result: dict[str, Any] = {"group": row.group, "name": row.name, "share": share}
                    # Pair by pair, which is what the default comes close to, is not charged with its loop.
                    charged = row._replace(variant=None) if row.variant and row.variant.exact else row
                    try:
                        with in_place(charged):
                            config, macs = self.patch(row, share)
                        with in_place(row):
                            found, distance = self.compared()
                        default = distance if default is None else default
                        result |= {"gmacs": macs / 1e9, "config": config.to_json(), **found}
                        result["ratio"], result["ratio_half"] = self.against_default(distance, default)
                    except ConfigError as error:
                        result["refused"] = str(error)
                    results.append(result)
                    bar.update()
        return results


class DenseAblation(Ablation):
    """A pretrained ViT without a classifier, its dense head, and crops of photographs.

    What is compared is the relative error of the patch tokens, photograph by photograph.
    """

    measure = "patch tokens / default's, by photograph"
    use: Use = staticmethod(features)

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        images: Tensor,
        photograph: Tensor,
        training: Images,
        batch_size: int,
    ):
        self.head = head
        super().__init__(model, images, photograph, training, batch_size)

    @torch.inference_mode()
    def outputs(self) -> Any:
        parts = []
        for images in self.images.split(self.batch_size):
            tokens = self.use(self.model, images)
            parts.append((tokens[:, 1:], tokens[:, 0], self.head(tokens[:, 1:])))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def compared(self) -> tuple[dict[str, float], Tensor]:
        (patches, token, saliency), unpatched = self.outputs(), self.unpatched
        errors = {
            "patches": relative_error(patches, unpatched[0]),
            "class_token": relative_error(token, unpatched[1]),
            "saliency": (saliency - unpatched[2]).abs().mean(dim=(1, 2, 3)),
        }
        found = {name: self.by_photograph(error) for name, error in errors.items()}
        return {name: error.mean().item() for name, error in found.items()}, found["patches"]

    def by_photograph(self, error: Tensor) -> Tensor:
        """Return the mean over the crops of each photograph."""
        count = torch.bincount(self.labels)
        return torch.zeros(len(count)).index_add(0, self.labels, error.cpu()) / count

    @staticmethod
    def against_default(distance: Tensor, default: Tensor) -> tuple[float, float]:
        """Return the geometric mean of the distances as multiples of the default's, and half its 95 % interval.

        Photograph by photograph: some, such as one of grass, move several times as far as others, and would decide
        alone.
        """
        log, error = paired_difference(distance.log(), default.log())
        return math.exp(log), math.exp(log) * SURE * error


def relative_error(mine: Tensor, expected: Tensor) -> Tensor:
    """Return the relative L2 error of each image."""
    return (mine - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def tables(record: dict[str, Any]) -> str:
    """Return everything that was measured on one model, as Markdown: a table for each share."""
    lines = [f"# {record['model']}", "", record["description"], ""]
    dense = "top1" not in record
    if dense:
        titles = ["patch tokens", "class token", "saliency"]
    else:
        titles = ["top-1", "difference, points [95 %]", "agreement", "KL"]
    for share in dict.fromkeys(row["share"] for row in record["rows"]):
        lines += [f"At {share} of {record['gmacs']:.3f} GMACs:", ""]
        lines += ["| | choice | GMACs | " + " | ".join(titles) + f" | {record['measure']} [95 %] |"]
        lines += ["|---|---|" + "---:|" * (len(titles) + 2)]
        if not dense:
            lines += [f"| | unpatched | {record['gmacs']:.3f} | {record['top1']:.2%} | - | 100.00% | 0 | - |"]
        for row in record["rows"]:
            if row["share"] != share:
                continue
            start = f"| {row['group']} | {row['name']} |"
            if "refused" in row:
                lines.append(f"{start} does not fit: {row['refused'].split('. ')[0]} |" + " |" * (len(titles) + 1))
                continue
            ratio = "1" if row["group"] == "default" else f"{row['ratio']:.3f} ± {row['ratio_half']:.3f}"
            cells = [f"{row['gmacs']:.3f}", *_cells(row, record["images"]), ratio]
            lines.append(f"{start} " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any], images: int) -> list[str]:
    if "patches" in row:
        return [f"{row['patches']:.4f}", f"{row['class_token']:.4f}", f"{row['saliency']:.4f}"]
    low, high = (100 * end for end in paired_interval(row["gained"], row["lost"], images))
    difference = f"{100 * (row['gained'] - row['lost']) / images:+.2f} [{low:+.2f}, {high:+.2f}]"
    return [f"{row['top1']:.2%}", difference, f"{row['agreement']:.2%}", f"{row['kl']:.1e}"]


# ---------------------------------------------------------------------------------------------------------------------
# Models and images


def on_photographs(args: argparse.Namespace) -> tuple[DenseAblation, str]:
    """Return the pretrained ViT on half of the photographs, to be calibrated on the other half, and a description."""
    found = [photographs(folder, args.img_size, args.crops + 1) for folder in args.photographs]
    # The first crop of a photograph is the whole of it.
    crops = torch.cat([part.images.unflatten(0, (-1, args.crops + 1))[:, 1:] for part in found])
    images, training = (crops[half::2].flatten(0, 1) for half in (args.half, 1 - args.half))
    number = len(images) // args.crops
    photograph = torch.arange(number).repeat_interleave(args.crops)
    model, head = load_backbone(args.weights, args.img_size), load_decoder(args.weights)
    ablation = DenseAblation(model, head, images, photograph, lambda: training, args.batch_size)
    return ablation, f"{number} photographs, {args.crops} crops of {args.img_size} px each"


def on_objects(args: argparse.Namespace) -> tuple[Ablation, str]:
    """Return the classifier of train_classifier.py on the test images that it wrote."""
    classes = len((args.weights / "classes.txt").read_text().split("\n")) - 1
    model = timm.create_model(MODEL, num_classes=classes, img_size=args.img_size)
    model.load_state_dict(fit_positions(load_file(args.weights / "weights.safetensors"), model))
    transform = create_transform(
        **resolve_model_data_config(model) | {"crop_pct": 1.0, "input_size": (3, args.img_size, args.img_size)}
    )
    dataset = create_dataset("", str(args.objects), transform=transform)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [dataset[i] for i in order[: args.images + CALIBRATION_IMAGES]]
    images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
    training, images, labels = images[args.images :], images[: args.images], labels[: args.images]
    ablation = Ablation(model.eval(), images, labels, lambda: training, args.batch_size)
    return ablation, f"{len(images):,} images of objects in front of photographs that training did not show"


def on_fashion_mnist(args: argparse.Namespace) -> tuple[Ablation, str]:
    """Return the built-in model, or another of train_reference.py, on Fashion-MNIST."""
    model = create_model(args.model).eval()
    load_checkpoint(model, str(args.weights))
    part = slice(args.skip, args.skip + args.images)
    images, labels = (x[part] for x in load_images(args.data, args.split))

    def training() -> Tensor:
        return load_images(args.data, "train")[0][:CALIBRATION_IMAGES]

    ablation = Ablation(model, images, labels, training, args.batch_size)
    return ablation, f"{len(images):,} {'test' if args.split == 't10k' else 'training'} images of Fashion-MNIST"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photographs", type=Path, nargs="+", help="folders of photographs")
    source.add_argument("--objects", type=Path, help="folder of images that train_classifier.py wrote")
    source.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="of real_weights.py, of the classifier, or a file"
    )
    parser.add_argument("--half", type=int, default=0, choices=[0, 1], help="of the photographs")
    parser.add_argument("--crops", type=int, default=1, help="of each photograph")
    parser.add_argument("--img-size", type=int, default=224, help="pixels of the ViT's images")
    parser.add_argument("--model", default="vit", choices=MODELS, help="for Fashion-MNIST, as trained")
    parser.add_argument("--name", help="title of the tables")
    parser.add_argument("--split", default="t10k", choices=["t10k", "train"], help="of Fashion-MNIST")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of its images")
    parser.add_argument("--images", type=int, default=10_000, help="use so many, of objects or Fashion-MNIST")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.67, 0.5], help="of the multiply-adds")
    parser.add_argument("--groups", nargs="+", help="groups of rows, or rows by name (default: all)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    args = parser.parse_args()
    keep_freed_memory()
    start = on_photographs if args.photographs else on_objects if args.objects else on_fashion_mnist
    ablation, images = start(args)
    rows = rows_for(ablation.model)
    if args.groups:
        rows = [row for row in rows if row.group == "default" or {row.group, row.name}.intersection(args.groups)]
    results = ablation.ablate(rows, args.shares)
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}, {platform.machine()} CPU"
    record = {
        "model": args.name or ("vit_small_patch14_dinov2" if args.data is None else args.model),
        "description": f"{images}; {versions}.",
        "images": len(ablation.images),
        "gmacs": ablation.full / 1e9,
        "measure": ablation.measure,
        "rows": results,
    }
    if not isinstance(ablation, DenseAblation):
        record["top1"] = (ablation.unpatched.argmax(1) == ablation.labels).float().mean().item()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(tables(record))
    print(tables(record))


if __name__ == "__main__":
    main()
