"""What dense models are read for: their patch tokens, their class token, and what a head makes of them.

A model without classes, or one whose tokens a head reads, has no top-1 to lose. How far merging moves it is the
relative error of the tokens behind the last block, image by image, and the change of the head's output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from token_merge_plugin.errors import ConfigError
from token_merge_plugin.trial.measuring import Use, evaluating, features, forward

Head = Callable[[Any], Tensor]
"""A callable that is given what the model's forward_features(images) returns, and returns a tensor [B, ...].

In timm that is [B, P + N, C] with P prefix tokens, the class token first, and N patch tokens, row by row; or a grid,
[B, H, W, C] or [B, C, H, W]. A head that reads patch tokens alone takes the rest away: `lambda x: decoder(x[:, 1:])`.
"""


class Readings(NamedTuple):
    """What one forward pass left to read: float32, None where the model has it not.

    Attributes:
        patches: [B, ...], the patch tokens of each image.
        class_token: [B, C].
        head: [B, ...], the head's output.
    """

    patches: Tensor | None = None
    class_token: Tensor | None = None
    head: Tensor | None = None


def is_dense(model: nn.Module, head: Head | None) -> bool:
    """Return whether the model is judged by its tokens: it has no classes, or a head reads them."""
    return head is not None or getattr(model, "num_classes", None) == 0


def use_of(model: nn.Module, head: Head | None) -> Use:
    """Return what a model is run for: its tokens where it is judged by them and gives them, else its output."""
    return features if is_dense(model, head) and hasattr(model, "forward_features") else forward


def read(model: nn.Module, tokens: Any, head: Head | None) -> Readings:
    """Return the patch tokens, the class token and the head's output.

    Args:
        model: whose `num_prefix_tokens`, and `has_class_token` or `cls_token`, say what the first tokens are.
        tokens: what its `forward_features` returned: [B, P + N, C]; or [B, H, W, C] or [B, C, H, W], all of it patch
            tokens. Of anything else, only the head's output is returned.
        head: as `Head` says, or None.
    """
    output = None if head is None else head(tokens).float()
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        return Readings(head=output)
    tokens = tokens.float()
    if tokens.ndim == 4:
        return Readings(tokens, None, output)
    has_class_token = bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None))
    # PiT calls them `num_tokens`, VOLO has no name for its one.
    prefix = getattr(model, "num_prefix_tokens", getattr(model, "num_tokens", int(has_class_token)))
    patches = tokens[:, prefix:] if tokens.shape[1] > prefix else None
    return Readings(patches, tokens[:, 0] if has_class_token else None, output)


def relative_errors(patched: Tensor, unpatched: Tensor) -> Tensor:
    """Return |patched - unpatched| / |unpatched| of each image [B], Euclidean norms of all its numbers [B, ...]."""
    length = unpatched.flatten(1).norm(dim=1)
    distance = (patched - unpatched).flatten(1).norm(dim=1)
    return distance / length.clamp(min=torch.finfo(length.dtype).tiny)


def sum_of_errors(patched: Tensor | None, unpatched: Tensor | None) -> float | None:
    """Return the sum over images of their relative errors.

    None where there is nothing to compare, or where merged tokens were not restored to the unpatched model's.
    """
    if patched is None or unpatched is None or patched.shape != unpatched.shape:
        return None
    return relative_errors(patched, unpatched).sum().item()


def change(patched: Tensor | None, unpatched: Tensor | None) -> float | None:
    """Return the sum over images of the mean absolute difference of what a head returned: None without a head.

    Raises:
        ConfigError: the head returned tensors of two shapes.
    """
    if patched is None or unpatched is None:
        return None
    if patched.shape != unpatched.shape:
        raise ConfigError(
            f"The head returned {tuple(unpatched.shape)} for the unpatched model and {tuple(patched.shape)} for a "
            "patched one: only outputs of one shape can be compared. Give a head whose output has always the same."
        )
    return (patched - unpatched).abs().reshape(len(patched), -1).mean(dim=1).sum().item()


@torch.inference_mode()
def check_head(model: nn.Module, head: Head | None, image: Tensor) -> None:
    """Try the head on one image [1, C, H, W], so that a trial of ten minutes does not fail at its end.

    Raises:
        ConfigError: the model has no `forward_features`, or the head does not return a tensor with an entry an image.
    """
    if head is None:
        return
    forward_features: Any = getattr(model, "forward_features", None)
    if forward_features is None:
        raise ConfigError(
            f"A head is given what forward_features(images) returns, and {type(model).__name__} has no such method. "
            "Give the model that has it, or leave head out."
        )
    with evaluating_head(head):
        output: Any = head(forward_features(image))
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != 1:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"The head returned {given} for one image. It has to return one floating point tensor [B, ...] with an "
            "entry for each image."
        )


def evaluating_head(head: Head | None) -> Any:
    """Put the head into eval mode for a while, if it is a module; a context manager."""
    return evaluating(head if isinstance(head, nn.Module) else nn.Identity())


def describe_head(head: Head) -> str:
    """Return what tells a head from others: its name, and the sum of its parameters if it is a module."""
    name = getattr(head, "__qualname__", type(head).__qualname__)
    if not isinstance(head, nn.Module):
        return name
    return f"{name}, parameters {sum(p.detach().double().sum().item() for p in head.parameters())}"
