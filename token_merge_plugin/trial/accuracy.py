"""Accuracy of several configs of one model: each is compared with the unpatched model, image by image."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.trial.images import Batch, Images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import halved, plan
from token_merge_plugin.trial.results import UNPATCHED


@dataclass
class Counts:
    """Sums over images. `gained`: got right by this contender alone; `lost`: by the unpatched model alone."""

    images: int = 0
    top1: int = 0
    top5: int = 0
    gained: int = 0
    lost: int = 0
    agree: int = 0
    kl: float = 0.0
    cosine: float = 0.0

    def add(self, other: "Counts") -> "Counts":
        return Counts(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


class Comparison:
    """What contenders make of the same images, added up as these go by.

    Attributes:
        counts: {contender: sums over the images so far}.
        unreadable: names of those that could not be read.
        total: how many images there are.
        batch_size: images a forward pass, halved where memory runs out.
    """

    def __init__(self, model: nn.Module, data: Images):
        self.model, self.data = model, data
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

    def _compared(self, configs: Iterable[MergeConfig | None], batch: Batch) -> list[Counts]:
        while True:
            try:
                return compare(self.model, [*configs], batch.images, batch.labels, batch_size=self.batch_size)
            except torch.OutOfMemoryError:
                self.batch_size = halved(min(self.batch_size, len(batch.images)))

    def gather(self) -> None:
        """Add up what all processes have counted, if there are several."""
        if not torch.distributed.is_initialized():
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.counts, self.data.unreadable, len(self.data)))
        self.counts = {}
        for counts, _, _ in parts:
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, Counts()).add(count)
        self.unreadable = [name for _, unreadable, _ in parts for name in unreadable]
        self.total = sum(total for _, _, total in parts)

    def fields(self, contender: str) -> dict[str, Any]:
        """Return the fields of a `TrialRow` that were measured: none before the first batch."""
        counts = self.counts.get(contender)
        if counts is None or not counts.images:
            return {}
        images = counts.images
        fields: dict[str, Any] = {"cosine": counts.cosine / images}
        classes = getattr(self.model, "num_classes", None)
        if classes == 0:
            return fields
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
    model: nn.Module, configs: Sequence[MergeConfig | None], images: Tensor, labels: Tensor, *, batch_size: int
) -> list[Counts]:
    """Run images through one model under several configs, and compare each with the first.

    Args:
        model: a supported model in eval mode. It is left with the config that came last.
        configs: None for the unpatched model.
        images: [B, C, H, W].
        labels: [B], class indices; -1 where there is none.
        batch_size: images a forward pass, if fewer than B.
    """
    outputs = []
    for config in configs:
        plan(model, config)
        parts = [_with_features(model, part) for part in images.split(batch_size)]
        outputs.append([torch.cat(part) for part in zip(*parts, strict=True)])
    (logits, features), counts = outputs[0], []
    right = logits.argmax(1) == labels
    for mine, my_features in outputs:
        is_right = mine.argmax(1) == labels
        among5 = mine.topk(min(5, mine.shape[1]), dim=1).indices == labels[:, None]
        kl = F.kl_div(mine.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="sum")
        numbers = (
            is_right.sum(),
            among5.any(dim=1).sum(),
            (is_right & ~right).sum(),
            (right & ~is_right).sum(),
            (mine.argmax(1) == logits.argmax(1)).sum(),
        )
        cosine = F.cosine_similarity(my_features, features, dim=1).sum()
        top1, top5, gained, lost, agree = (int(number) for number in numbers)
        counts.append(Counts(len(labels), top1, top5, gained, lost, agree, max(0.0, kl.item()), cosine.item()))
    return counts


def _with_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [B, classes] and what goes into the classifier, flattened [B, D], both in float32."""
    seen: list[Tensor] = []
    head: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(head, tuple | list | nn.ModuleList):  # one for each of several class tokens
        head = head[0]
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if isinstance(head, nn.Module) else None
    try:
        output = model(images)
    finally:
        if hook is not None:
            hook.remove()
    output = output.flatten(1).float()
    return output, seen[0].flatten(1).float() if seen else output


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
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)
