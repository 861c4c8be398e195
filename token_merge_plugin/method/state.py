"""What one forward pass carries from block to block, and the plan that it follows.

The state of a pass lives in a thread-local variable, so several threads can use one model at once. It holds tensors
made during the pass and nothing else, and is gone when the pass is over.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from token_merge_plugin.config import Amount, MergeConfig
from token_merge_plugin.method.attention import additive_mask, causal_mask
from token_merge_plugin.method.merging import restore, take


class Merged(NamedTuple):
    """Where the image tokens of a batch stand: K tokens for N patches.

    Attributes:
        size: [B, K] float32, patches that each token stands for (0 for padding).
        token_map: [B, N], for each patch the index of the token that holds it; K if that was dropped.
        representative: [B, K], for each token the patch it stood for at the start.
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
        head_weight, head_mix: [H] and [H, H] or None; see `importance.query_row_attention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    head_weight: Tensor | None = None
    head_mix: Tensor | None = None


class Pass:
    """One forward pass through a section, from its first stage to its last block. Changed by blocks, in one thread.

    Attributes:
        num_patches: N.
        num_prefix_tokens: tokens in front of the image tokens.
        grid_size: (height, width) of the patch grid, or None where it is not known.
        merged: where the image tokens stand, or None before the first merge.
        evidence: what the attention layers of a stage saw.
    """

    def __init__(
        self,
        num_patches: int,
        num_prefix_tokens: int,
        grid_size: tuple[int, int] | None = None,
        merged: Merged | None = None,
    ):
        self.num_patches = num_patches
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = grid_size
        self.merged = merged
        self.evidence: list[Evidence] = []

    def arguments(self) -> tuple[int, int, tuple[int, int] | None, Merged | None]:
        """Return what makes another pass that stands where this one does."""
        return self.num_patches, self.num_prefix_tokens, self.grid_size, self.merged


class Edge:
    """A call of one of the model's own methods that is under way, such as `forward_intermediates`."""

    def __init__(self, keep_grid: bool):
        self.keep_grid = keep_grid
        self.grid_size: tuple[int, int] | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, Pass] = {}
        self.edges: dict[int, Edge] = {}
        self.trace: list[tuple[int, Pass]] | None = None


_local = _Local()
_keys = itertools.count()


@contextmanager
def recorded() -> Iterator[list[tuple[int, Pass]]]:
    """Record every stage that this thread passes: (block, a copy of the pass behind it)."""
    outer, _local.trace = _local.trace, []
    try:
        yield _local.trace
    finally:
        _local.trace = outer


def record(block: int, state: Pass) -> None:
    """Note a stage, if anybody wants to know."""
    if _local.trace is not None:
        _local.trace.append((block, Pass(*state.arguments())))


@dataclass(eq=False)
class Plan:
    """What is done to one model: made by `apply`, shared by its patched modules, never changed by a forward pass.

    Attributes:
        config: the options given.
        schedule: {block index: amount}, never empty.
        sections: blocks between which tokens may be fewer; behind each section the full grid is restored.
        num_prefix_tokens: tokens in front of the image tokens.
        class_queries: of these, the first ones, whose attention says what matters; 0 if that of image tokens does.
        grid_size: (height, width) of the patch grid, or None where it depends on the image.
        checkpointing: recompute each block in the backward pass.
    """

    config: MergeConfig
    schedule: dict[int, Amount]
    sections: tuple[range, ...]
    num_prefix_tokens: int
    class_queries: int
    grid_size: tuple[int, int] | None
    checkpointing: bool = False
    key: int = field(default_factory=lambda: next(_keys))

    def __post_init__(self) -> None:
        self.spans: dict[int, range] = {}
        for section in self.sections:
            stages = [block for block in section if block in self.schedule]
            if stages:
                span = range(stages[0], section.stop)
                self.spans.update(dict.fromkeys(span, span))

    def shorten(self, depth: int) -> None:
        """Note that only the first `depth` blocks are left of the model."""
        self.sections = tuple(range(section.start, min(section.stop, depth)) for section in self.sections)
        self.__post_init__()

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

    def begin(self, num_tokens: int, num_prefix_tokens: int) -> Pass:
        """Make a new pass the current one."""
        edge = self.edge()
        grid_size = edge.grid_size if edge is not None and edge.grid_size is not None else self.grid_size
        state = Pass(num_tokens - num_prefix_tokens, num_prefix_tokens, grid_size)
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
        return torch.cat((size.new_zeros(size.shape[0], state.num_prefix_tokens), size.log()), dim=1)

    def bias(self, state: Pass, attn_mask: Tensor | None, is_causal: bool, like: Tensor) -> tuple[Tensor | None, bool]:
        """Return what is added to the logits on account of masks, and whether it already counts the sizes.

        Args:
            state: the current pass.
            attn_mask: the mask for all patches, as the model was given it, broadcastable to [B, H, P + N, P + N].
            is_causal: each token attends to itself and to those before it; takes precedence, as in timm.
            like: a tensor of the logits' dtype and device.
        """
        if is_causal:
            attn_mask = causal_mask(state.num_prefix_tokens + state.num_patches, like.device)
        if attn_mask is None:
            return None, False
        mask = additive_mask(attn_mask, like.dtype)
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        if state.merged is None:
            return mask, False
        return self._fold(mask, state.num_prefix_tokens, state.merged), self.config.proportional_attention

    def _fold(self, mask: Tensor, prefix: int, merged: Merged) -> Tensor:
        """Reduce a mask over patches to the tokens that hold them.

        A query token has its representative's row. A key token counts each patch that it stands for by the mask of
        that patch: log of the sum of exp(mask), which is log(size) where the mask is 0. Without proportional
        attention it has its representative's column.
        """
        batch = merged.size.shape[0]
        mask = mask.expand(batch, -1, -1, prefix + merged.token_map.shape[1])
        heads, rows = mask.shape[1], mask.shape[2]
        index = _with_prefix(merged.representative, prefix)  # [B, P + K]
        if rows > 1:
            mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
        if not self.config.proportional_attention:
            return mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
        tokens = index.shape[1]
        holder = _with_prefix(merged.token_map, prefix)
        held = (holder[:, :, None] == torch.arange(tokens, device=index.device)).float()  # [B, P + N, P + K]
        largest = mask.float().amax(dim=3, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight = (mask.float() - largest).exp() @ held[:, None]
        return (weight.log() + largest).to(mask.dtype)

    def restore(self, state: Pass, x: Tensor) -> Tensor:
        """Put the image tokens of x [B, P + K, C] back on the full grid: [B, P + N, C]."""
        if state.merged is None:
            return x
        prefix = state.num_prefix_tokens
        dropped = self.config.method in ("prune", "random")
        return torch.cat((x[:, :prefix], restore(x[:, prefix:], state.merged.token_map, dropped)), dim=1)

    def take_tokens(self, state: Pass, x: Tensor) -> Tensor:
        """Undo `restore`: take one patch of each token, [B, P + N, C] -> [B, P + K, C]."""
        if state.merged is None:
            return x
        prefix = state.num_prefix_tokens
        return torch.cat((x[:, :prefix], take(x[:, prefix:], state.merged.representative)), dim=1)

    def position_bias(self, state: Pass, bias: Tensor | None) -> Tensor | None:
        """Take from a position bias of all patches what belongs to the tokens.

        A token has the position of its representative, as a query and as a key.

        Args:
            state: the current pass.
            bias: [H, P + N, P + N] or [w, H, P + N, P + N], where w divides B: the windows of an image. Or None.

        Returns:
            [B, H, P + K, P + K].
        """
        if bias is None:
            return None
        bias = bias.unsqueeze(0) if bias.dim() == 3 else bias
        if state.merged is None:
            return bias
        index = _with_prefix(state.merged.representative, state.num_prefix_tokens)
        tokens = bias.shape[-1]
        pair = index[:, :, None] * tokens + index[:, None, :]  # [B, P + K, P + K]
        if len(bias) > 1:
            window = torch.arange(len(index), device=index.device) % len(bias)
            pair = pair + window[:, None, None] * tokens**2
        # One lookup in rows of heads, which lie together.
        return bias.permute(0, 2, 3, 1).flatten(0, 2)[pair].permute(0, 3, 1, 2)

    def positions(self, state: Pass, embedding: Tensor | None) -> Tensor | None:
        """Take from a position embedding of the patches what belongs to the image tokens.

        A token has the position of its representative, the crucial token that the others were merged into.

        Args:
            state: the current pass.
            embedding: [N, D], [H, N, D] or [B, 1 or H, N, D], or None.

        Returns:
            [B, 1 or H, K, D], or the embedding as it was given where nothing is merged.
        """
        if state.merged is None or embedding is None:
            return embedding
        index = state.merged.representative
        if embedding.dim() == 2:
            return embedding[index].unsqueeze(1)
        if embedding.dim() == 3:
            return embedding[:, index].transpose(0, 1)
        image = torch.arange(index.shape[0], device=index.device)[:, None]
        return embedding.expand(index.shape[0], -1, -1, -1)[image, :, index].transpose(1, 2)


def _with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Turn indices of patches [B, T] into indices of the whole sequence, prefix tokens first: [B, P + T]."""
    return torch.cat((torch.arange(prefix, device=index.device).expand(index.shape[0], -1), prefix + index), dim=1)
