"""A training-free trial: one model, labelled images, and what each keep rate saves and costs."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from token_merge_plugin.config import KeepRate, MergeConfig
from token_merge_plugin.counting import count_macs
from token_merge_plugin.errors import DataError
from token_merge_plugin.patching import apply, remove


@dataclass(frozen=True)
class TrialRow:
    """What a trial measured of one contender. Shares are in [0, 1].

    Attributes:
        name: "unpatched", or the keep rate.
        gmacs: 1e9 multiply-adds per image.
        reduction: share of the unpatched model's multiply-adds that is saved.
        top1: share of the images whose most probable class is their label.
        agreement: share of the images with the same most probable class as from the unpatched model.
        kl: mean Kullback-Leibler divergence from the unpatched model's output, in nats.
        images_per_second: median over the batches.
        speed_up: median over the batches of the unpatched model's time, divided by this contender's.
    """

    name: str
    gmacs: float
    reduction: float
    top1: float
    agreement: float
    kl: float
    images_per_second: float
    speed_up: float


@torch.inference_mode()
def run_trial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    keep_rates: Sequence[KeepRate | MergeConfig] = (0.9, 0.8, 0.7, 0.6, 0.5),
    *,
    batch_size: int = 50,
    progress: Any = None,
    **options: Any,
) -> list[TrialRow]:
    """Run the unpatched model and the patched ones over the same images, turn by turn, batch by batch.

    Each batch goes through all contenders before the next one, and the first batch once more beforehand, untimed:
    so a change in the machine's load meets all of them alike.

    Args:
        model: a supported model, not patched; it is unpatched again at the end.
        images: [B, C, H, W], preprocessed, on the model's device.
        labels: [B], class indices.
        keep_rates: one contender each.
        batch_size: images a forward pass.
        progress: called as progress(n) after n more forward passes of one batch.
        options: further fields of `MergeConfig`.

    Returns:
        The unpatched model's row, then one for each keep rate.

    Raises:
        DataError: there are no images, or the labels are not one for each.
        ConfigError, UnsupportedModelError, PatchStateError: as `apply`.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"A trial needs images and one label for each: given {len(images)} and {len(labels)}.")
    contenders: list[MergeConfig | None] = [None, *(MergeConfig.of(rate, **options) for rate in keep_rates)]
    outputs: list[list[Tensor]] = [[] for _ in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    macs = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for config in contenders:
            _set(model, config)
            macs.append(count_macs(model, images[:1]))
            model(images[:batch_size])
        for batch in images.split(batch_size):
            for i, config in enumerate(contenders):
                _set(model, config)
                _synchronize(batch)
                start = time.perf_counter()
                output = model(batch)
                _synchronize(batch)
                if len(batch) == min(batch_size, len(images)):
                    seconds[i].append(time.perf_counter() - start)
                outputs[i].append(output.float())
                if progress is not None:
                    progress(1)
    finally:
        remove(model)
        for module, training in modes:
            module.training = training
    logits = [torch.cat(output) for output in outputs]
    timed_images = min(batch_size, len(images))
    rows = []
    for i, config in enumerate(contenders):
        same = logits[i].argmax(1) == logits[0].argmax(1)
        kl = F.kl_div(logits[i].log_softmax(1), logits[0].log_softmax(1), log_target=True, reduction="batchmean")
        rows.append(
            TrialRow(
                name="unpatched" if config is None else str(config.keep_rate),
                gmacs=macs[i] / 1e9,
                reduction=1 - macs[i] / macs[0],
                top1=(logits[i].argmax(1) == labels).float().mean().item(),
                agreement=same.float().mean().item(),
                kl=max(0.0, kl.item()),
                images_per_second=timed_images / statistics.median(seconds[i]),
                speed_up=statistics.median(a / b for a, b in zip(seconds[0], seconds[i], strict=True)),
            )
        )
    return rows


def format_table(rows: Sequence[TrialRow]) -> str:
    """Return the rows as a table for the terminal, which is also a table in Markdown."""
    header = ("keep rate", "GMACs", "reduction", "top-1", "agreement", "KL", "images/s", "speed-up")
    cells = [header] + [
        (
            row.name,
            f"{row.gmacs:.3f}",
            f"{row.reduction:.1%}",
            f"{row.top1:.2%}",
            f"{row.agreement:.2%}",
            f"{row.kl:.1e}",
            f"{row.images_per_second:.0f}",
            f"{row.speed_up:.2f}x",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]])


def _set(model: nn.Module, config: MergeConfig | None) -> None:
    remove(model) if config is None else apply(model, config)


def _synchronize(batch: Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
