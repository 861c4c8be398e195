"""What one forward pass carries from block to block, and the plan that it follows.

The state of a pass lives in a thread-local variable, so several threads can use one model at once. It holds tensors
made during the pass and nothing else, and is gone when the pass is over.
"""

import itertools
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from token_merge_plugin.attention import additive_mask, causal_mask
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.merging import restore, take


class Merged(NamedTuple):
    """Where the image tokens of a batch stand: K tokens for N patches.

    Attributes:
        size: [B, K] float32, patches that each token stands for (0 for padding).
        token_map: [B, N], for each patch the index of the token that holds it.
        representative: [B, K], for each token the patch it stood for at the start, ascending.
    """

    size: Tensor
    token_map: Tensor
    representative: Tensor


class Evidence(NamedTuple):
    """What an attention layer saw, from which importance and similarity are read.

    Attributes:
        query, key: [B, H, P + K, D].
        value: [B, H', P + K, D'].
        scale: factor of the logits.
        bias: [B, 1 or H, Q, P + K], the mask that was added to the logits, or None.
        head_weight: [H] or None; see `importance.query_row_attention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    head_weight: Tensor | None = None


class Pass:
    """One forward pass, from the first stage to the last block. Changed by its blocks, in one thread."""

    def __init__(self, num_patches: int, grid_size: tuple[int, int] | None, merged: Merged | None = None):
        self.num_patches = num_patches
        self.grid_size = grid_size
        self.merged = merged
        self.evidence: list[Evidence] = []


class Edge:
    """A call of one of the model's own methods that is under way, such as `forward_intermediates`."""

    def __init__(self, keep_grid: bool):
        self.keep_grid = keep_grid
        self.grid_size: tuple[int, int] | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, Pass] = {}
        self.edges: dict[int, Edge] = {}


_local = _Local()
_keys = itertools.count()


@dataclass(eq=False)
class Plan:
    """What is done to one model: made by `apply`, shared by its patched modules, never changed by a forward pass.

    Attributes:
        config: the options given.
        schedule: {block index: keep rate}, never empty.
        last_block: index of the block behind which the full grid is restored.
        num_prefix_tokens: tokens in front of the image tokens.
        class_queries: of these, the first ones, whose attention says what matters.
        mean_query: the attention of the mean of the image tokens' queries says so, too.
        grid_size: (height, width) of the patch grid, or None where it depends on the image.
        checkpointing: recompute each block in the backward pass.
    """

    config: MergeConfig
    schedule: dict[int, float]
    last_block: int
    num_prefix_tokens: int
    class_queries: int
    mean_query: bool
    grid_size: tuple[int, int] | None
    checkpointing: bool = False
    key: int = field(default_factory=lambda: next(_keys))

    def __post_init__(self) -> None:
        self.first_block = min(self.schedule)

    def __setstate__(self, state: dict) -> None:
        # A copy is another model: its passes must not be taken for the original's.
        self.__dict__.update(state, key=next(_keys))

    def open_edge(self, keep_grid: bool) -> Edge | None:
        """Note that a method of the model is under way; return what `close_edge` puts back."""
        outer = _local.edges.get(self.key)
        _local.edges[self.key] = Edge(keep_grid)
        return outer

    def close_edge(self, outer: Edge | None) -> None:
        """Forget the method, and any pass that it left unfinished."""
        _local.passes.pop(self.key, None)
        if outer is None:
            _local.edges.pop(self.key, None)
        else:
            _local.edges[self.key] = outer

    def edge(self) -> Edge | None:
        """Return the model's method that is under way in this thread."""
        return _local.edges.get(self.key)

    def begin(self, num_patches: int) -> Pass:
        """Make a new pass the current one."""
        edge = self.edge()
        grid_size = edge.grid_size if edge is not None and edge.grid_size is not None else self.grid_size
        state = Pass(num_patches, grid_size)
        self.install(state)
        return state

    def current(self) -> Pass | None:
        """Return the pass that is under way in this thread."""
        return _local.passes.get(self.key)

    def install(self, state: Pass | None) -> Pass | None:
        """Make a pass the current one, or none; return the one that was."""
        before = _local.passes.pop(self.key, None)
        if state is not None:
            _local.passes[self.key] = state
        return before

    def log_size(self, state: Pass) -> Tensor | None:
        """Return log of the sizes of all tokens [B, P + K], or None where attention is not to be changed."""
        if state.merged is None or not self.config.proportional_attention:
            return None
        size = state.merged.size
        return torch.cat((size.new_zeros(size.shape[0], self.num_prefix_tokens), size.log()), dim=1)

    def bias(self, state: Pass, attn_mask: Tensor | None, is_causal: bool, like: Tensor) -> tuple[Tensor | None, bool]:
        """Return what is added to the logits on account of masks, and whether it already counts the sizes.

        Args:
            state: the current pass.
            attn_mask: the mask for all patches, as the model was given it, broadcastable to [B, H, P + N, P + N].
            is_causal: each token attends to itself and to those before it; takes precedence, as in timm.
            like: a tensor of the logits' dtype and device.
        """
        if is_causal:
            attn_mask = causal_mask(self.num_prefix_tokens + state.num_patches, like.device)
        if attn_mask is None:
            return None, False
        mask = additive_mask(attn_mask, like.dtype)
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        if state.merged is None:
            return mask, False
        return self._fold(mask, state.merged), self.config.proportional_attention

    def _fold(self, mask: Tensor, merged: Merged) -> Tensor:
        """Reduce a mask over patches to the tokens that hold them.

        A query token has its representative's row. A key token counts each patch that it stands for by the mask of
        that patch: log of the sum of exp(mask), which is log(size) where the mask is 0. Without proportional
        attention it has its representative's column.
        """
        prefix = self.num_prefix_tokens
        batch = merged.size.shape[0]
        mask = mask.expand(batch, -1, -1, prefix + merged.token_map.shape[1])
        heads, rows = mask.shape[1], mask.shape[2]
        index = prefix + merged.representative
        index = torch.cat((torch.arange(prefix, device=index.device).expand(batch, -1), index), dim=1)  # [B, P + K]
        if rows > 1:
            mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
        if not self.config.proportional_attention:
            return mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
        tokens = index.shape[1]
        holder = torch.cat(
            (torch.arange(prefix, device=index.device).expand(batch, -1), prefix + merged.token_map), dim=1
        )
        held = (holder[:, :, None] == torch.arange(tokens, device=index.device)).float()  # [B, P + N, P + K]
        largest = mask.float().amax(dim=3, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight = (mask.float() - largest).exp() @ held[:, None]
        return (weight.log() + largest).to(mask.dtype)

    def restore(self, state: Pass, x: Tensor) -> Tensor:
        """Put the image tokens of x [B, P + K, C] back on the full grid: [B, P + N, C]."""
        if state.merged is None:
            return x
        prefix = self.num_prefix_tokens
        return torch.cat((x[:, :prefix], restore(x[:, prefix:], state.merged.token_map)), dim=1)

    def take_tokens(self, state: Pass, x: Tensor) -> Tensor:
        """Undo `restore`: take one patch of each token, [B, P + N, C] -> [B, P + K, C]."""
        if state.merged is None:
            return x
        prefix = self.num_prefix_tokens
        return torch.cat((x[:, :prefix], take(x[:, prefix:], state.merged.representative)), dim=1)
