"""Accuracy of several configs of one model: each is compared with the unpatched model, image by image."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.trial.dense import (
    Head,
    Readings,
    change,
    evaluating_head,
    is_dense,
    read,
    sum_of_errors,
    use_of,
)
from token_merge_plugin.trial.images import Batch, Images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import features, halved, plan
from token_merge_plugin.trial.results import UNPATCHED

# Standard errors that make a 95 % confidence interval.
SURE = 1.959964


@dataclass
class Counts:
    """Sums over images. `gained`: got right by this contender alone; `lost`: by the unpatched model alone.

    None where it was not measured on all of them.
    """

    images: int = 0
    top1: int = 0
    top5: int = 0
    gained: int = 0
    lost: int = 0
    agree: int = 0
    kl: float = 0.0
    cosine: float | None = None
    patch_error: float | None = None
    class_error: float | None = None
    head_change: float | None = None

    def add(self, other: "Counts") -> "Counts":
        if not self.images:
            return other
        pairs = zip(astuple(self), astuple(other), strict=True)
        sums: list[Any] = [None if mine is None or more is None else mine + more for mine, more in pairs]
        return Counts(*sums)


class Seen(NamedTuple):
    """What one forward pass gave, in float32.

    Attributes:
        output: [B, classes].
        features: [B, D], what goes into the classifier; None where that is the patch tokens themselves.
        readings: what a dense model is read for.
    """

    output: Tensor
    features: Tensor | None
    readings: Readings


class Comparison:
    """What contenders make of the same images, added up as these go by.

    Attributes:
        counts: {contender: sums over the images so far}.
        unreadable: names of those that could not be read.
        total: how many images there are.
        batch_size: images a forward pass, halved where memory runs out.
    """

    def __init__(self, model: nn.Module, data: Images, head: Head | None = None):
        self.model, self.data, self.head = model, data, head
        self.counts: dict[str, Counts] = {}
        self.unreadable: list[str] = []
        self.total = len(data)
        self.batch_size = min(data.batch_size, len(data))

    @property
    def images(self) -> int:
        """How many images every contender has been through."""
        return self.counts[UNPATCHED].images if self.counts else 0

    def measure(self, configs: Mapping[str, MergeConfig | None], journal: Journal, progress: bool) -> None:
        """Take every batch through all contenders; behind what the journal has already.

        Args:
            configs: {contender: its config}; the unpatched model, whose config is None, first.
            journal: to which the sums are added after each batch.
            progress: show a bar.
        """
        start = 0
        for entry in journal.of("accuracy"):
            start, self.unreadable = entry["end"], entry["unreadable"]
            self.counts = {name: Counts(*values) for name, values in entry["counts"].items()}
        before = list(self.unreadable)
        total = len(self.data)
        with tqdm(desc="accuracy", total=total, initial=start, unit="image", leave=False, disable=not progress) as bar:
            for batch in self.data.batches(start):
                for name, result in zip(configs, self._compared(configs.values(), batch), strict=True):
                    self.counts[name] = self.counts.get(name, Counts()).add(result)
                bar.update(batch.end - start)
                start = batch.end
                self.unreadable = before + [name for name in self.data.unreadable if name not in before]
                counts = {name: astuple(count) for name, count in self.counts.items()}
                journal.write("accuracy", end=start, unreadable=self.unreadable, counts=counts)
        # Behind the last batch there may be more that could not be read.
        self.unreadable = before + [name for name in self.data.unreadable if name not in before]

    def _compared(self, configs: Iterable[MergeConfig | None], batch: Batch) -> list[Counts]:
        while True:
            try:
                with evaluating_head(self.head):
                    return compare(
                        self.model,
                        [*configs],
                        batch.images,
                        batch.labels,
                        batch_size=self.batch_size,
                        head=self.head,
                    )
            except torch.OutOfMemoryError:
                self.batch_size = halved(min(self.batch_size, len(batch.images)))

    def gather(self, interrupted: bool) -> bool:
        """Add up what all processes have counted, if there are several; return whether any was interrupted."""
        if not torch.distributed.is_initialized():
            return interrupted
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.counts, self.unreadable, len(self.data), interrupted))
        self.counts = {}
        for counts, *_ in parts:
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, Counts()).add(count)
        self.unreadable = [name for _, unreadable, _, _ in parts for name in unreadable]
        self.total = sum(total for _, _, total, _ in parts)
        return any(stopped for *_, stopped in parts)

    def fields(self, contender: str) -> dict[str, Any]:
        """Return the fields of a `TrialRow` that were measured: none before the first batch."""
        counts = self.counts.get(contender)
        if counts is None or not counts.images:
            return {}
        images = counts.images
        means = ("cosine", "patch_error", "class_error", "head_change")
        fields: dict[str, Any] = {
            name: total / images for name in means if (total := getattr(counts, name)) is not None
        }
        if is_dense(self.model, self.head):
            return fields
        classes = getattr(self.model, "num_classes", None)
        fields |= {"agreement": counts.agree / images, "kl": counts.kl / images}
        if self.data.labelled:
            fields["top1"] = counts.top1 / images
            fields["top5"] = counts.top5 / images if classes is None or classes > 5 else None
            if contender != UNPATCHED:
                fields["top1_difference"] = (counts.gained - counts.lost) / images
                fields["top1_interval"] = paired_interval(counts.gained, counts.lost, images)
        return fields


@torch.inference_mode()
def compare(
    model: nn.Module,
    configs: Sequence[MergeConfig | None],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    head: Head | None = None,
) -> list[Counts]:
    """Run images through one model under several configs, and compare each with the first.

    Args:
        model: a supported model in eval mode. It is left with the config that came last.
        configs: None for the unpatched model.
        images: [B, C, H, W].
        labels: [B], class indices; -1 where there is none.
        batch_size: images a forward pass, if fewer than B.
        head: in eval mode; see `dense.Head`.
    """
    counts = [Counts() for _ in configs]
    for part, part_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        first: Seen | None = None  # tokens are large: no more than two passes' are held at a time
        for number, config in enumerate(configs):
            seen = _see(plan(model, config), part, head)
            first = first or seen
            counts[number] = counts[number].add(_count(seen, first, part_labels))
    return counts


def _count(mine: Seen, unpatched: Seen, labels: Tensor) -> Counts:
    logits, my_logits = unpatched.output, mine.output
    right, is_right = logits.argmax(1) == labels, my_logits.argmax(1) == labels
    among5 = my_logits.topk(min(5, my_logits.shape[1]), dim=1).indices == labels[:, None]
    kl = F.kl_div(my_logits.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="sum")
    numbers = (
        is_right.sum(),
        among5.any(dim=1).sum(),
        (is_right & ~right).sum(),
        (right & ~is_right).sum(),
        (my_logits.argmax(1) == logits.argmax(1)).sum(),
    )
    top1, top5, gained, lost, agree = (int(number) for number in numbers)
    cosine = None
    if mine.features is not None and unpatched.features is not None:
        cosine = F.cosine_similarity(mine.features, unpatched.features, dim=1).sum().item()
    return Counts(
        len(labels),
        top1,
        top5,
        gained,
        lost,
        agree,
        max(0.0, kl.item()),
        cosine,
        sum_of_errors(mine.readings.patches, unpatched.readings.patches),
        sum_of_errors(mine.readings.class_token, unpatched.readings.class_token),
        change(mine.readings.head, unpatched.readings.head),
    )


def _see(model: nn.Module, images: Tensor, head: Head | None) -> Seen:
    """Run a batch through the model, and read its tokens on the way if it is dense."""
    use = use_of(model, head)
    tokens = use(model, images) if use is features else None
    output, pooled = _with_features(model, images, tokens)
    readings = Readings() if tokens is None else read(model, tokens, head)
    are_patches = pooled.ndim > 2 and pooled.flatten(2).shape[2] > 1
    are_measured = are_patches and readings.patches is not None
    return Seen(output.flatten(1).float(), None if are_measured else pooled.flatten(1).float(), readings)


def _with_features(model: Any, images: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
    """Return the output, and what goes into the classifier: the output itself where that cannot be seen.

    Args:
        tokens: what `forward_features` made of the images: the pass goes on there; None to run it whole.
    """
    seen: list[Tensor] = []
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(classifier, tuple | list | nn.ModuleList):  # one for each of several class tokens
        classifier = classifier[0]
    hook = None
    if isinstance(classifier, nn.Module):
        hook = classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        goes_on = isinstance(tokens, Tensor) and hasattr(model, "forward_head")
        output = model.forward_head(tokens) if goes_on else model(images)
    finally:
        if hook is not None:
            hook.remove()
    return output, seen[0] if seen else output


def paired_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a difference of shares, measured on the same images.

    Wald's with one image added to each kind of discordance (Bonett and Price 2012, "Adjusted Wald Confidence Interval
    for a Difference of Binomial Proportions Based on Paired Data"): unlike the plain one, it is not empty where nothing
    changed.

    Args:
        gained, lost: images that only the one, or only the other, got right.
        images: all of them.
    """
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = SURE * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)
