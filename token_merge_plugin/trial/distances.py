"""How far a patched model's output is from the unpatched model's, image by image."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from token_merge_plugin.errors import ConfigError, DataError
from token_merge_plugin.patching import remove
from token_merge_plugin.trial.dense import Head, read, relative_errors, use_of
from token_merge_plugin.trial.measuring import device_of, features


class Unpatched:
    """What a model makes of images unpatched, and how far from that it is when it is patched.

    Of classifiers the predictions are compared, by the root of the KL divergence (or a few images that move far would
    decide for all the others). Of models without classes it is the patch tokens, or what a head makes of the features,
    by the relative error |patched - unpatched| / |unpatched|.

    Args:
        model: in eval mode. It is left unpatched.
        batches: images, [B, C, H, W] each, on any device.
        head: takes what `forward_features` returns, and returns a tensor with a row for each image, or several.

    Attributes:
        measure: what a distance is, in words.

    Raises:
        ConfigError: the head cannot be called, or there is no tensor to compare.
        DataError: the unpatched output is not finite.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], head: Head | None = None):
        self._model, self._batches, self._device = remove(model), batches, device_of(model)
        self._output, self.measure = _what_counts(model, head)
        self._classifies = self._output is model and _is_of_classes(model(self._on_device(0)[:1]))
        if self._classifies:
            self.measure = "root of the KL divergence"
        # On the CPU: the features of all images need not fit beside the model.
        self._expected = [self._flat(index).cpu() for index in range(len(batches))]
        if not all(expected.isfinite().all() for expected in self._expected):
            raise DataError(f"{type(model).__name__}, unpatched, makes numbers of these images that are not finite.")

    def distances(self) -> Tensor:
        """Return how far the model, as it is patched now, is from the unpatched one: [images], on the CPU."""
        return torch.cat([self._distance(index) for index in range(len(self._batches))])

    def _distance(self, index: int) -> Tensor:
        output, expected = self._flat(index), self._expected[index].to(self._device)
        if self._classifies:
            divergence = F.kl_div(output, expected, log_target=True, reduction="none").sum(dim=1)
            return divergence.clamp(min=0).sqrt().cpu()
        return relative_errors(output, expected).cpu()

    def _on_device(self, index: int) -> Tensor:
        return self._batches[index].to(self._device)

    def _flat(self, index: int) -> Tensor:
        """Return what is compared, in float32: [B, D]."""
        images = self._on_device(index)
        output = self._output(images)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        rows = [leaf.reshape(len(images), -1).float() for leaf in leaves if leaf.ndim and len(leaf) == len(images)]
        if not rows:
            raise ConfigError(
                f"{type(self._model).__name__} gives a {type(output).__name__} to compare, without a float tensor that "
                "has a row for each image. Give a head that makes one of the features."
            )
        flat = torch.cat(rows, dim=1)
        return flat.log_softmax(1) if self._classifies else flat


def paired_difference(mine: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the mean of the differences of distances of the same images, [images], and its standard error.

    The error of a single one is not known: it is infinite.
    """
    difference = mine - other
    error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return difference.mean().item(), error


def _what_counts(model: Any, head: Head | None) -> tuple[Callable[[Tensor], Any], str]:
    """Return what makes of images that which is compared, and what its relative error is called."""
    if head is not None:
        if not callable(head):
            raise ConfigError(f"head={head!r} cannot be called. Give a function or module that takes the features.")
        if use_of(model, head) is not features:
            raise ConfigError(f"{type(model).__name__} has no forward_features whose result a head could take.")
        return lambda images: head(features(model, images)), "relative error of the head's output"
    if use_of(model, None) is features:
        return lambda images: _patch_tokens(model, features(model, images)), "relative error of the patch tokens"
    return model, "relative error of the output"


def _patch_tokens(model: nn.Module, tokens: Any) -> Any:
    """Return the patch tokens of what `forward_features` returned, or all of that where it has none."""
    patches = read(model, tokens, None).patches
    return tokens if patches is None else patches


def _is_of_classes(output: Any) -> bool:
    """Return whether an output is [B, classes]; a single one is a number that the model predicts."""
    return isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1
