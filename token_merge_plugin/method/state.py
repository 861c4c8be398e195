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
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.config import DROPPING, Amount, MergeConfig
from token_merge_plugin.errors import PatchStateError
from token_merge_plugin.method.attention import additive_mask, causal_mask
from token_merge_plugin.method.merging import Undo, patch_offset, restore, undo
from token_merge_plugin.method.patches import (
    Merged,
    embedding_of_tokens,
    fold_mask,
    position_bias_of_tokens,
    take_representatives,
)


class Evidence(NamedTuple):
    """What an attention layer saw, from which importance and similarity are read.

    Attributes:
        query, key: [B, H, P + K, D].
        value: [B, H', P + K, D'].
        scale: factor of the logits.
        bias: [B, 1 or H, Q, P + K], the mask that was added to the logits, or None.
        head_weight: [H] or None; see `importance.query_row_attention`.
        logits: [B, H, P + K, P + K], where they are not the products of queries and keys, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    head_weight: Tensor | None = None
    logits: Tensor | None = None


class Pass:
    """One forward pass through a section, from its first stage to its last block. Changed by blocks, in one thread.

    Attributes:
        num_patches: N.
        num_prefix_tokens: tokens in front of the image tokens.
        grid_size: (height, width) of the patch grid, or None where it is not known.
        merged: where the image tokens stand, or None before the first merge.
        merges: the merges so far, for whoever undoes them; none where nobody reads the grid.
        reads_grid: somebody reads the grid behind the last block, so a merge notes what it takes from the patches.
        block: the block that ran last.
        attended: the patched attention of the block that runs now was called.
        evidence: what the attention layers of a stage saw.
    """

    def __init__(
        self,
        num_patches: int,
        num_prefix_tokens: int,
        grid_size: tuple[int, int] | None = None,
        merged: Merged | None = None,
        merges: tuple[Undo, ...] = (),
        reads_grid: bool = False,
    ):
        self.num_patches = num_patches
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = grid_size
        self._merged = merged
        self._log_size: Tensor | None = None
        self.merges = merges
        self._offset: tuple[int, Tensor | None] = (0, None)  # of how many merges
        self.reads_grid = reads_grid
        self.block = -1
        self.attended = False
        self.evidence: list[Evidence] = []

    @property
    def merged(self) -> Merged | None:
        return self._merged

    @merged.setter
    def merged(self, merged: Merged | None) -> None:
        self._merged, self._log_size = merged, None

    def log_size(self) -> Tensor:
        """Return log of the sizes of all tokens [B, P + K]: computed once for all blocks up to the next merge."""
        assert self.merged is not None
        size, prefix = self.merged.size, self.num_prefix_tokens
        if self._log_size is None or self._log_size.shape[1] != prefix + size.shape[1]:
            self._log_size = torch.cat((size.new_zeros(size.shape[0], prefix), size.log()), dim=1)
        return self._log_size

    def offset(self) -> Tensor | None:
        """Return what each patch has beyond the token that holds it [B, N, C], or None if nothing is known of that."""
        count, offset = self._offset
        for merge in self.merges[count:]:
            beyond = patch_offset(merge)
            offset = beyond if offset is None else offset + beyond
        self._offset = len(self.merges), offset
        return offset

    def num_tokens(self) -> int:
        """Return how many tokens there are now, prefix tokens included."""
        return self.num_prefix_tokens + (self.num_patches if self.merged is None else self.merged.size.shape[1])

    def arguments(self) -> tuple[int, int, tuple[int, int] | None, Merged | None, tuple[Undo, ...], bool]:
        """Return what makes another pass that stands where this one does."""
        return self.num_patches, self.num_prefix_tokens, self.grid_size, self.merged, self.merges, self.reads_grid

    def positions(self, embedding: Tensor | None) -> Tensor | None:
        """Return a position embedding of the patches as the image tokens have it now; see `patches`."""
        if self.merged is None or embedding is None:
            return embedding
        self.check_positions(embedding.shape[-2])
        return embedding_of_tokens(embedding, self.merged)

    def position_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return a position bias of all patches as the tokens have it now; see `patches`."""
        if bias is None:
            return None
        bias = bias.unsqueeze(0) if bias.dim() == 3 else bias
        if self.merged is None:
            return bias
        self.check_positions(bias.shape[-1] - self.num_prefix_tokens)
        return position_bias_of_tokens(bias, self.num_prefix_tokens, self.merged)

    def check_positions(self, count: int) -> None:
        """Refuse what belongs to another number of patches, of which tokens would take what is not theirs.

        Raises:
            PatchStateError: the image is of another size than the model.
        """
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and count != self.num_patches:
            raise PatchStateError(
                f"The model has positions for {count} patches, and was given {self.num_patches}: the image is of "
                "another size than the model, which does not take it unpatched either."
            )

    def take_tokens(self, x: Tensor) -> Tensor:
        """Undo `Plan.restore`: take one patch of each token, [B, P + N, C] -> [B, P + K, C]."""
        if self.merged is None:
            return x
        offset = self.offset()
        if offset is not None:
            x = x - F.pad(offset, (0, 0, self.num_prefix_tokens, 0))
        return take_representatives(x, self.num_prefix_tokens, self.merged)


class Edge:
    """A call of one of the model's own methods that is under way, such as `forward_intermediates`.

    Attributes:
        keep_grid: every block gives the full grid back.
        reads_grid: somebody reads the grid that is restored at the end, and not the class token alone.
        grid_size: (height, width) of the patch grid, or None where it is not known: the plan's, until the method tells.
        with_gradients: gradients are recorded.
    """

    def __init__(self, keep_grid: bool, reads_grid: bool, grid_size: tuple[int, int] | None):
        self.keep_grid = keep_grid
        self.reads_grid = reads_grid
        self.grid_size = grid_size
        self.with_gradients = torch.is_grad_enabled()


class _Local(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, Pass] = {}
        self.edges: dict[int, Edge] = {}
        self.whole_grids: set[int] = set()
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
    """What is done to one model: made by `apply`, shared by its patched modules.

    Attributes:
        config: the options given.
        schedule: {block index: amount}, never empty.
        sections: blocks between which tokens may be fewer; behind each section the full grid is restored.
        num_prefix_tokens: tokens in front of the image tokens.
        num_class_tokens: of these, the first ones, whose attention says what matters.
        grid_size: (height, width) of the patch grid, or None where it depends on the image.
        similarity: what tokens are compared by, an option of `config` that may leave it open.
        checkpointing: recompute each block in the backward pass.
        begun: {first block of a section's stages: (grid size, whether the grid is read, whether every block gives the
            full grid back)} of the last pass whose gradients may be asked for. The only thing that a pass changes: for
            whoever recomputes it from the tokens alone.
    """

    config: MergeConfig
    schedule: dict[int, Amount]
    sections: tuple[range, ...]
    num_prefix_tokens: int
    num_class_tokens: int
    grid_size: tuple[int, int] | None
    similarity: str = "tokens"
    checkpointing: bool = False
    begun: dict[int, tuple[tuple[int, int] | None, bool, bool]] = field(default_factory=dict)
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
        # A copy is another model: its passes must not be taken for the original's. A pickle may be of a former version.
        former: dict = {"begun": {}, "similarity": state["config"].similarity or "tokens"}
        self.__dict__.update(former | state, key=next(_keys))

    def open_edge(self, keep_grid: bool, reads_grid: bool) -> tuple[Edge | None, Pass | None]:
        """Note that a method of the model is under way; return what `close_edge` puts back.

        What a method returns that another one calls is read as that one reads it; but one that is called in the middle
        of a pass, by a hook say, has nothing to do with that.
        """
        outer, under_way = _local.edges.get(self.key), self.install(None)
        if outer is not None and under_way is None:
            keep_grid, reads_grid = keep_grid or outer.keep_grid, outer.reads_grid
        _local.edges[self.key] = Edge(keep_grid, keep_grid or reads_grid, self.grid_size)
        return outer, under_way

    def close_edge(self, before: tuple[Edge | None, Pass | None]) -> None:
        """Forget the method, and any pass that it left unfinished."""
        outer, under_way = before
        self.install(under_way)
        if outer is None:
            _local.edges.pop(self.key, None)
        else:
            _local.edges[self.key] = outer

    def keeps_grid(self) -> bool:
        """Return whether every block gives the full grid back."""
        edge = self.edge()
        return (edge is not None and edge.keep_grid) or self.key in _local.whole_grids

    @contextmanager
    def whole_grid(self) -> Iterator[None]:
        """Have every block give the full grid back, in this thread."""
        before = self.key in _local.whole_grids
        _local.whole_grids.add(self.key)
        try:
            yield
        finally:
            if not before:
                _local.whole_grids.discard(self.key)

    def edge(self) -> Edge | None:
        """Return the model's method that is under way in this thread."""
        return _local.edges.get(self.key)

    def with_gradients(self) -> bool:
        """Return whether gradients may be asked for, also of blocks that are run without them the first time."""
        edge = self.edge()
        return torch.is_grad_enabled() or (edge is not None and edge.with_gradients)

    def begin(self, num_tokens: int, num_prefix_tokens: int) -> Pass:
        """Make a new pass the current one."""
        edge = self.edge()
        grid_size = self.grid_size if edge is None else edge.grid_size
        # Sections read the grid in between.
        read = edge is None or edge.reads_grid or len(self.sections) > 1 or self.keeps_grid()
        read = read or _local.trace is not None
        state = Pass(num_tokens - num_prefix_tokens, num_prefix_tokens, grid_size, reads_grid=read)
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
        return state.log_size()

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
        proportional = self.config.proportional_attention
        return fold_mask(mask, state.num_prefix_tokens, state.merged, proportional), proportional

    def restore(self, state: Pass, x: Tensor, last: bool = True) -> Tensor:
        """Put the image tokens of x [B, P + K, C] back on the full grid, with what was each patch's own.

        Args:
            last: no block takes the tokens from this grid again, so that each patch may get updates of its own, too.

        Returns:
            [B, P + N, C].
        """
        if not last or not state.merges:
            x, offset = self.on_patches(state, x), state.offset()
            return x if offset is None else x + F.pad(offset, (0, 0, state.num_prefix_tokens, 0))
        tokens = x[:, state.num_prefix_tokens :]
        for merge in reversed(state.merges):
            tokens = undo(tokens, merge)
        return torch.cat((x[:, : state.num_prefix_tokens], tokens), dim=1)

    def on_patches(self, state: Pass, x: Tensor) -> Tensor:
        """Give each patch what the token has that holds it: [B, P + K, C] -> [B, P + N, C]."""
        if state.merged is None:
            return x
        prefix = state.num_prefix_tokens
        dropped = self.config.method in DROPPING
        return torch.cat((x[:, :prefix], restore(x[:, prefix:], state.merged.token_map, dropped)), dim=1)
