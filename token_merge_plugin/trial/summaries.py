"""What a patched model does: family, schedule, tokens behind its stages, multiply-adds."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import PatchStateError
from token_merge_plugin.method.state import recorded
from token_merge_plugin.patching import plans_of, remove
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.dense import use_of
from token_merge_plugin.trial.measuring import check_images, device_of, evaluating
from token_merge_plugin.trial.models import input_size


@dataclass(frozen=True)
class Summary:
    """What `summary` found. As a string: a few lines for people.

    Attributes:
        model: name of the model's class.
        family: of the adapter that serves it.
        config: the options.
        stages: {block: share of its tokens that it keeps, or number that it merges}.
        tokens: {block: image tokens behind it}, for the stages of families whose tokens leave the sequence.
        macs: multiply-adds per image; of `forward_features` for a model without classes.
        unpatched_macs: of the model without the patch.
        restored: where the full grid is restored.
    """

    model: str
    family: str
    config: MergeConfig
    stages: dict[int, float]
    tokens: dict[int, int]
    macs: int
    unpatched_macs: int
    restored: str

    def __str__(self) -> str:
        def stage(block: int, amount: float) -> str:
            share = f"keeps {amount:.1%}" if isinstance(amount, float) else f"merges {amount}"
            return f"block {block} {share}" + (f", {self.tokens[block]} tokens" if block in self.tokens else "")

        return (
            f"{self.model} ({self.family}), method {self.config.method!r}, keep rate {self.config.keep_rate}\n"
            + "; ".join(stage(block, amount) for block, amount in self.stages.items())
            + f"\n{self.macs / 1e9:.3f} of {self.unpatched_macs / 1e9:.3f} GMACs "
            f"({self.macs / self.unpatched_macs:.1%}); the full grid is restored {self.restored}"
        )


def summary(model: nn.Module, image_size: tuple[int, int] | None = None) -> Summary:
    """Print and return what a patched model does with one image.

    Args:
        model: patched; it is run in eval mode, and left as it was.
        image_size: (height, width) in pixels; None for the model's own.

    Raises:
        DataError: the model does not take images of this size.
        PatchStateError: the model is not patched.
    """
    plans = plans_of(model)
    if not plans:
        raise PatchStateError(f"This {type(model).__name__} is not patched. Apply token merging first.")
    adapter = next(found for found in map(find_adapter, model.modules()) if found is not None)
    channels, *own_size = input_size(model)
    parameter = next(model.parameters())
    image = torch.zeros(1, channels, *(image_size or own_size), dtype=parameter.dtype, device=device_of(model))
    unpatched, use = remove(copy.deepcopy(model)), use_of(model, None)
    with torch.no_grad(), evaluating(model), evaluating(unpatched), recorded() as trace:
        check_images(unpatched, image)
        model(image)
    found = Summary(
        model=type(model).__name__,
        family=adapter.family,
        config=plans[0].config,
        stages=dict(plans[0].schedule),
        tokens={block: state.merged.size.shape[1] for block, state in trace if state.merged is not None},
        macs=count_macs(model, image, use),
        unpatched_macs=count_macs(unpatched, image, use),
        restored=adapter.restores,
    )
    print(found)
    return found
