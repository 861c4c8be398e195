"""What adapters are made of: the `Adapter` base class, and mixins for models, blocks and attention layers.

A module is patched by assigning it a subclass of its own class, made of one of the mixins and that class, and the
attribute `_token_merge`. Hooks, parameters, `state_dict` keys and the module tree stay as they are, and the model
compiles, exports and deep-copies like any other. (A wrapt proxy around a block or its forward does not: see
`patching`.)
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from inspect import Parameter, signature
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import timm
import torch
import torch.nn.functional as F
import wrapt
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from token_merge_plugin.adapters.registry import find_adapter
from token_merge_plugin.adapters.registry import register_adapter as register_adapter
from token_merge_plugin.config import default_stages
from token_merge_plugin.errors import PatchStateError, UnsupportedModelError
from token_merge_plugin.method.attention import attention
from token_merge_plugin.method.merging import Undo, join_windows, restore, take, windows
from token_merge_plugin.method.multiscale import MultiScaleFusion
from token_merge_plugin.method.patches import take_representatives
from token_merge_plugin.method.reduction import fuse_scales, merge_within, reduce_tokens
from token_merge_plugin.method.state import Evidence, Merged, Pass, Plan


class Place(NamedTuple):
    """Where a patched module stands: the attribute `_token_merge` of each of them."""

    plan: Plan
    block: int  # -1: the model itself


class Patched(nn.Module):
    """Base of the mixins: a class made by `patched_class` pickles by the names of its two parts.

    Attributes:
        parts: names of the child modules that the mixin knows how to run.
        reads: names of the other attributes of the original class that it reads.
        may_lack: those of its parts that a module may be without.
        replaces: names of the methods of the original class whose work the mixin does itself.
        stands_in: name of the method of the mixin that does the work of the original's forward.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    may_lack: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[tuple[str, ...]] = ("forward",)
    stands_in: ClassVar[str] = "forward"
    _token_merge: Place
    _token_merge_parts: ClassVar[tuple[type["Patched"], type[nn.Module]]]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state = super().__reduce_ex__(2)[2:]
        return (_new_patched, type(self)._token_merge_parts, *state)

    def _get_name(self) -> str:
        # Of what torch prints. The class has the name of the original, by which other libraries look for it.
        return f"TokenMerge{super()._get_name()}"

    def extra_repr(self) -> str:
        """Say what is done here: in the model all of it, in a block that is a stage what it keeps."""
        plan, block = self._token_merge
        said = super().extra_repr()
        if block == -1:
            stages = ", ".join(map(str, plan.schedule))
            mine = f"token merging: method={plan.config.method!r}, keep_rate={plan.config.keep_rate}, stages={stages}"
        elif block in plan.schedule and isinstance(self, PatchedBlock | PatchedGridBlock):
            amount = plan.schedule[block]
            mine = f"token merging: keeps {amount:.1%}" if isinstance(amount, float) else f"token merging: {amount} go"
        else:
            return said
        return f"{said}\n{mine}" if said else mine

    def check_attended(self, state: Pass) -> None:
        """Refuse what comes of tokens that were attended to as if each were one patch.

        Raises:
            PatchStateError: the block's attention did not run as it was patched.
        """
        if not state.attended:
            raise PatchStateError(
                f"The attention of block {self._token_merge.block} was passed over. If its forward was replaced since "
                "apply, put it back, or call the one that was there from the new one. Hooks on its attn_drop see the "
                "attention."
            )

    def __prepare_scriptable__(self) -> nn.Module:
        raise PatchStateError(
            f"A {type(self).__name__} with token merging cannot be scripted. Use torch.jit.trace, torch.export or "
            "torch.compile, or token_merge_plugin.remove the merging first."
        )


_classes: dict[tuple[type[Patched], type[nn.Module]], type[nn.Module]] = {}


def patched_class(mixin: type[Patched], original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `original` that `mixin` patches, with its name: always the same one."""
    key = (mixin, original)
    if key not in _classes:
        _classes[key] = _make_class(mixin, original)
    return _classes[key]


def _make_class(mixin: type[Patched], original: type[nn.Module]) -> type[nn.Module]:
    for name in mixin.replaces:
        _methods.setdefault((original, name), _method(original, name))
    body: dict[str, Any] = {"_token_merge_parts": (mixin, original), "__doc__": original.__doc__}
    body |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    if issubclass(mixin, PatchedModel):
        body["forward"] = _named_like(original.forward, mixin.forward)
        methods = [getattr(original, name, None) for name in _READERS]
        body["_token_merge_as_timm"] = all(m is None or m.__module__.startswith("timm.") for m in methods)
        if hasattr(original, "set_input_size"):
            body["set_input_size"] = _followed(original.set_input_size)
    if issubclass(mixin, PatchedGridModel):
        features = [name for name in ("forward_features", "forward_intermediates") if hasattr(original, name)]
        body |= {name: _checked(getattr(original, name)) for name in features or ["forward"]}
        body.setdefault("forward", _named_like(original.forward, original.forward))
    if issubclass(mixin, PatchedBlock):
        norms = {"norm1", "norm2"}.intersection(mixin.parts).difference(mixin.may_lack)
        body |= {name: _shown_all_patches(name) for name in sorted(norms)}
    if issubclass(mixin, PatchedGridBlock):
        body["forward"] = _named_like(mixin.forward, mixin.forward)
    return type(original.__name__, (mixin, original), body)


def _named_like(original: Callable, patched: Callable) -> Callable:
    """Return the patched forward with the original's signature, by which exporters name the arguments.

    That torch.fx cannot trace it is said in an error of this package.
    """

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, Proxy) for argument in (*args, *kwargs.values())):
            raise PatchStateError(
                f"torch.fx cannot trace a {type(self).__name__} with token merging, which depends on token counts. "
                "Use torch.export or torch.jit.trace, or token_merge_plugin.remove the merging first."
            )
        return patched(self, *args, **kwargs)

    return method


def _followed(method: Callable) -> Callable:
    """Make a method that changes the model's grid do the same to the plan."""

    @wraps(method)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        adapter = find_adapter(self)
        assert adapter is not None  # or it would not be patched
        self._token_merge.plan.grid_size = adapter.grid_size(self)
        return result

    return change


def _checked(method: Callable) -> Callable:
    """Make a method of a model check first that the model is as it was planned for."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            check_plan(self)
        return method(self, *args, **kwargs)

    return call


class _OnAllPatches(wrapt.ObjectProxy):
    """A block's norm during a pass, which runs on all patches, with those of a token alike.

    A norm treats each token alone, so the tokens that come of it are the same.
    """

    def __init__(self, norm: nn.Module, plan: Plan, state: Pass):
        super().__init__(norm)
        self._self_plan, self._self_state = plan, state

    def __call__(self, x: Tensor) -> Tensor:
        norm, plan, state = self.__wrapped__, self._self_plan, self._self_state
        if state.merged is None or x.dim() != 3 or x.shape[1] != state.num_tokens():
            return norm(x)
        return take_representatives(norm(plan.on_patches(state, x)), state.num_prefix_tokens, state.merged)


def _shown_all_patches(name: str) -> property:
    """Make a block's norm one whose hooks see all patches, as Grad-CAM asks for. Without hooks it is as it was."""

    def norm_of(self: Any) -> Any:
        norm = self._modules[name]
        if torch.compiler.is_compiling() or not _has_readers(norm):
            return norm
        plan = self._token_merge.plan
        state = plan.current()
        return norm if state is None or state.merged is None else _OnAllPatches(norm, plan, state)

    return property(norm_of)


def check_plan(model: Any) -> None:
    """Refuse a patched model that is not as it was planned for: cheap, and at the beginning of a pass.

    Raises:
        PatchStateError: something changed since `apply`.
    """
    plan = model._token_merge.plan
    adapter: Any = find_adapter(model)

    def refuse(change: str, cure: str = "Apply again") -> None:
        raise PatchStateError(f"This {type(model).__name__} was changed since apply: {change}. {cure}.")

    found = set()
    for index, block in enumerate(map(unwrapped, adapter.blocks(model))):
        if adapter.on_entry and index not in plan.schedule:
            continue  # it is not patched
        if getattr(block, "_token_merge", None) != (plan, index):
            refuse(f"block {index} is another one")
        found.add(type(block))
        for layer in adapter.layers(block):
            if getattr(layer, "_token_merge", None) != (plan, index):
                refuse(f"the attention of block {index} is another one")
            found.add(type(layer))
    for mixin, original in (cls._token_merge_parts for cls in found):
        for name in mixin.replaces:
            if _methods[original, name] != _method(original, name):
                change = f"{original.__module__}.{original.__name__}.{name} was replaced on the class"
                refuse(change, "Put the original back: merging would pass over what is there now")
    grid_size, prefix = adapter.grid_size(model), adapter.num_prefix_tokens(model)
    if grid_size is not None and tuple(grid_size) != tuple(plan.grid_size or ()):
        refuse(f"the patch grid is {tuple(grid_size)}, and was {plan.grid_size}")
    if plan.config.num_prefix_tokens is None and prefix != plan.num_prefix_tokens:
        refuse(f"there are {prefix} prefix tokens, and were {plan.num_prefix_tokens}")


def _new_patched(mixin: type[Patched], original: type[nn.Module]) -> nn.Module:
    cls = patched_class(mixin, original)
    return cls.__new__(cls)


def unwrapped(module: Any) -> Any:
    """Return the module inside of torch's wrapper for activation checkpointing, or the module itself."""
    return getattr(module, "_checkpoint_wrapped_module", module)


def in_backward() -> bool:
    """Return whether this thread computes gradients: what runs then is run again."""
    return torch._C._current_graph_task_id() != -1


# Where a module keeps hooks on its calls and on their gradients.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: Any) -> bool:
    """Return whether a module has hooks on calls or on their gradients. Spelt out, for every pass asks often."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_readers(module: nn.Module) -> bool:
    """Return whether a module has hooks that may look at tokens: any but torch's own, such as those of FSDP."""
    return _has_hooks(module) and not all(
        (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("torch.")
        for name in _HOOKS
        for hook in getattr(module, name).values()
    )


# The methods of a model that read what the last block gives.
_READERS = ("forward", "forward_features", "forward_head", "pool")


class PatchedModel(Patched):
    """Mixin for a vision transformer: watches the calls of its methods, and takes checkpointing over."""

    _token_merge_as_timm: ClassVar[bool]  # what reads the last block's tokens is timm's own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._token_merge.plan
        outer = plan.open_edge(keep_grid=False, reads_grid=self.head_reads_grid() or self._is_watched())
        try:
            return super().forward(*args, **kwargs)
        finally:
            plan.close_edge(outer)

    def head_reads_grid(self) -> bool:
        """Return whether the model's head reads image tokens, and not the class token alone."""
        as_timm = self._token_merge_as_timm and not any(name in self.__dict__ for name in _READERS)
        by_class_token = self._token_merge.plan.num_class_tokens > 0 and getattr(self, "global_pool", None) == "token"
        return not (as_timm and by_class_token)

    def _is_watched(self) -> bool:
        """Return whether hooks may look at image tokens behind the attention of the last block."""
        adapter: Any = find_adapter(self)
        children = (child for name, child in self.named_children() if name != "patch_embed")
        modules = itertools.chain(children, adapter.blocks(self)[-1].modules())
        of_all_modules = any(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
        return of_all_modules or any(map(_has_hooks, modules))

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward_features, False, args, kwargs)  # type: ignore[misc]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward_intermediates, True, args, kwargs)  # type: ignore[misc]

    def _call(self, method: Callable, keep_grid: bool, args: tuple, kwargs: dict) -> Any:
        plan = self._token_merge.plan
        if not torch.compiler.is_compiling():
            check_plan(self)
        outer = plan.open_edge(keep_grid or self._blocks_are_read(), reads_grid=True)
        try:
            result = method(*args, **kwargs)
            if plan.current() is not None and not keep_grid:
                raise PatchStateError("The last block did not run: blocks were taken away since apply. Apply again.")
            return result
        finally:
            plan.close_edge(outer)

    def _blocks_are_read(self) -> bool:
        """Return whether hooks look at what blocks return, or are given, from the first stage on."""
        plan, adapter = self._token_merge.plan, find_adapter(self)
        assert adapter is not None  # or it would not be patched
        return any(
            _has_readers(block) or _has_readers(unwrapped(block))
            for index, block in enumerate(adapter.blocks(self))
            if index in plan.spans
        )

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        adapter: Any = find_adapter(self)
        plan = self._token_merge.plan
        plan.shorten(len(adapter.blocks(self)))  # `kept` may count runs of blocks
        if plan.config.num_prefix_tokens is None:
            plan.num_prefix_tokens = adapter.num_prefix_tokens(self)  # ConViT may have lost its class token
        return kept

    @property
    def grad_checkpointing(self) -> bool:
        # timm would recompute a block alone, without the state of its pass: blocks do it themselves, and timm's own
        # loop is told that there is nothing to do.
        plan = self._token_merge.plan
        return plan.checkpointing and plan.edge() is None

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.__dict__["grad_checkpointing"] = enable
        self._token_merge.plan.checkpointing = enable


class PatchedBlock(Patched):
    """Mixin for a transformer block: reduces the tokens if it is a stage, and restores the grid if it is the last.

    A family's mixin defines `stage_forward`; blocks that are no stage run their own forward, unless the family says
    otherwise.
    """

    stands_in = "stage_forward"

    def stage_forward(self, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, with x = reduce(x) between attention and MLP."""
        raise NotImplementedError

    def later_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on merged tokens."""
        return super().forward(x, *args, **kwargs)

    def num_prefix_tokens(self) -> int:
        """Return the number of tokens in front of the image tokens, for this block."""
        return self._token_merge.plan.num_prefix_tokens

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan, block = self._token_merge
        span = plan.spans.get(block)
        if span is None:
            if plan.checkpointing and torch.is_grad_enabled():
                return checkpoint(super().forward, x, *args, use_reentrant=False, **kwargs)
            return super().forward(x, *args, **kwargs)
        keep_grid = plan.keeps_grid()
        prefix = self.num_prefix_tokens()
        if not torch.compiler.is_compiling() and plan.edge() is None and in_backward():
            keep_grid = self._resume(x)
        elif block == span.start:
            self._check_tokens(plan.begin(x.shape[1], prefix))
        else:
            self._check_order()
        state = plan.current()
        if state is None:  # called on its own, outside a pass
            return super().forward(x, *args, **kwargs)
        if block != span.start:
            state.num_prefix_tokens = prefix
            expected = state.num_patches if keep_grid or state.merged is None else state.merged.size.shape[1]
            if x.shape[1] != prefix + expected:
                raise PatchStateError(
                    f"Block {block} was given {x.shape[1]} tokens where the pass under way has {prefix + expected}. "
                    "Token merging needs the blocks to follow one another, with no tokens added or taken away between "
                    "them."
                )
        if not torch.compiler.is_compiling() and (x.requires_grad or plan.with_gradients()):
            if block == span.start:
                plan.begun[block] = (state.grid_size, state.reads_grid, keep_grid)
            x._token_merge_pass = (plan.key, state.arguments(), keep_grid)  # type: ignore[attr-defined]
        if keep_grid:
            x = state.take_tokens(x)
        unread = self._is_unread(state)
        if plan.checkpointing and torch.is_grad_enabled():
            x, state.merged, state.merges = checkpoint(
                self._recompute, x, state.arguments(), *args, use_reentrant=False, **kwargs
            )
        else:
            x = self._run(state, x, *args, **kwargs)
        state.block = block
        last = block == span.stop - 1
        if keep_grid or (last and not unread):
            x = plan.restore(state, x, last)
        if last:
            plan.install(None)
        return x

    def _resume(self, x: Tensor) -> bool:
        """Begin again where this block stood in its pass: somebody recomputes it in the backward pass.

        Returns:
            whether it gave the full grid back.

        Raises:
            PatchStateError: it is not known where the block stood.
        """
        plan, block = self._token_merge
        carried = getattr(x, "_token_merge_pass", None)
        if carried is not None and carried[0] == plan.key:
            _, before, keep_grid = carried
            plan.install(Pass(*before))
            return keep_grid
        if block == plan.spans[block].start:  # what is recomputed begins in front of it
            grid_size, reads_grid, keep_grid = plan.begun.get(block, (plan.grid_size, True, False))
            prefix = self.num_prefix_tokens()
            plan.install(Pass(x.shape[1] - prefix, prefix, grid_size, reads_grid=reads_grid))
            return keep_grid
        state = plan.current()
        if state is None or state.block != block - 1:
            raise PatchStateError(
                f"Block {block} is recomputed in the backward pass from another tensor than it was given. Checkpoint "
                "with use_reentrant=False, or by the model's set_grad_checkpointing()."
            )
        return False

    def _check_order(self) -> None:
        """Refuse to go on behind a stage that did not run.

        Raises:
            PatchStateError: it was passed over.
        """
        plan, block = self._token_merge
        state, span = plan.current(), plan.spans[block]
        if torch.compiler.is_compiling() or (state is None and plan.edge() is None):
            return  # it is called on its own
        for stage in range(span.start if state is None else state.block + 1, block):
            if stage in plan.schedule:
                raise PatchStateError(
                    f"Block {stage}, which reduces tokens, was passed over. If its forward was replaced since apply, "
                    "put it back, or call the one that was there from the new one."
                )

    def _check_tokens(self, state: Pass) -> None:
        """Refuse a sequence that is not the patch grid behind the prefix tokens.

        Raises:
            PatchStateError: tokens were added or taken away.
        """
        plan = self._token_merge.plan
        on_its_own = plan.edge() is None and len(plan.sections) > 1  # which section's grid it is is not known
        if state.grid_size is None or on_its_own or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        height, width = state.grid_size
        # Patch dropout takes patches away in training.
        if state.num_patches > height * width or (state.num_patches < height * width and not self.training):
            prefix = state.num_prefix_tokens
            raise PatchStateError(
                f"Block {self._token_merge.block} was given {prefix + state.num_patches} tokens, where {prefix} prefix "
                f"tokens and a grid of {height} x {width} patches were planned. Apply again if the model changed "
                "since. Tokens that were put in front of the patches are declared by apply(..., "
                "num_prefix_tokens=...), with the class token counted."
            )

    def _is_unread(self, state: Pass) -> bool:
        """Return whether nobody asks for image tokens behind this block's attention, so that they can be left out.

        That is behind the last block, for a head that reads prefix tokens alone.
        """
        plan, block = self._token_merge
        return not state.reads_grid and block == plan.spans[block].stop - 1

    def _run(self, state: Pass, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan, block = self._token_merge
        fusion = self._modules.get("token_merge_fusion")
        if isinstance(fusion, MultiScaleFusion):
            x = fuse_scales(state, x, fusion)
        unread = self._is_unread(state)
        state.attended = False

        def reduce(x: Tensor) -> Tensor:
            self.check_attended(state)
            return x[:, : state.num_prefix_tokens] if unread else reduce_tokens(plan, state, x, block)

        if unread or block in plan.schedule:
            return self.stage_forward(x, reduce, *args, **kwargs)
        x = self.later_forward(x, *args, **kwargs)
        self.check_attended(state)
        return x

    def _recompute(
        self, x: Tensor, before: tuple, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Merged | None, tuple[Undo, ...]]:
        """Run the block from its arguments alone: in the backward pass, no other pass is under way."""
        plan = self._token_merge.plan
        state = Pass(*before)
        outer = plan.install(state)
        try:
            return self._run(state, x, *args, **kwargs), state.merged, state.merges
        finally:
            plan.install(outer)


class PatchedGridModel(Patched):
    """Mixin for a model whose blocks each restore the grid: it checks that they are the blocks that were planned."""


class PatchedGridBlock(Patched):
    """Mixin for a block whose input and output are the full grid, since what follows needs it.

    Tokens are merged on entry, the block computes its update for the merged ones, and each token receives the update
    of the token that holds it: in the residual stream every token keeps a value of its own.
    """

    def update_fewer(
        self,
        tokens: Tensor,
        grid_size: tuple[int, int],
        update: Callable[[Tensor], Tensor],
        apart: Tensor | None = None,
        attends: bool = True,
    ) -> Tensor:
        """Return tokens + update(tokens), with the update computed for fewer tokens.

        Args:
            tokens: [W, T, C], windows of the grid, or whole grids.
            grid_size: (height, width) of a window.
            update: [W, K, C] -> [W, K, C].
            apart: as in `reduction.merge_within`.
            attends: the block's attention is in the update.
        """
        plan, block = self._token_merge
        merged_tokens, merged = merge_within(tokens, grid_size, plan.schedule[block], apart)
        state = Pass(tokens.shape[1], 0, grid_size, merged)
        outer = plan.install(state)
        try:
            updated = update(merged_tokens)
        finally:
            plan.install(outer)
        if attends:
            self.check_attended(state)
        return tokens + restore(updated, merged.token_map)

    def update_windows(
        self,
        x: Tensor,
        window_size: tuple[int, int],
        update: Callable[[Tensor], Tensor],
        real: Tensor | None = None,
        apart: Tensor | None = None,
        attends: bool = True,
    ) -> Tensor:
        """Return x [B, H, W, C] with the updates of its windows, computed for fewer tokens.

        Args:
            x: grids that the windows fill; see `pad_to_windows`.
            window_size: (height, width) of a window.
            update, apart, attends: as in `update_fewer`.
            real: as from `pad_to_windows`; padding and other tokens are not merged.
        """
        if real is not None:
            mixed = real != real.transpose(1, 2)
            apart = mixed if apart is None else apart | mixed
        tokens = self.update_fewer(windows(x, *window_size), window_size, update, apart, attends)
        return join_windows(tokens, *window_size, (x.shape[1], x.shape[2]))

    def zero_padding(self: Any, x: Tensor, real: Tensor | None) -> Tensor:
        """Give merged tokens x [W, K, C] the zeros that attention has as padding without merging.

        Args:
            x: [W, K, C].
            real: [w, T, 1], 0 at padding, for the w windows of an image, or None: no padding.
        """
        if real is None:
            return x
        merged = self._token_merge.plan.current().merged
        return x * take(real.repeat(x.shape[0] // real.shape[0], 1, 1), merged.representative)

    def per_image(self, drop_path: nn.Module, x: Tensor, number: int) -> Tensor:
        """Drop the path of whole images, not of their windows, of which each image has that number."""
        return drop_path(x.reshape(x.shape[0] // number, number, *x.shape[1:])).reshape(x.shape)


class PatchedAttention(Patched):
    """Mixin for an attention layer: counts each token by its size, and shows a stage what it needs to choose."""

    stands_in = "merged_forward"

    def merged_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what the layer's own forward does, but attend by `attend`."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan, block = self._token_merge
        state = plan.current()
        if state is not None:
            state.attended = True
        if "is_causal" in kwargs:  # a tensor where a call is traced
            kwargs["is_causal"] = bool(kwargs["is_causal"])
        if block not in plan.spans or state is None or (state.merged is None and block not in plan.schedule):
            return super().forward(x, *args, **kwargs)
        return self.merged_forward(x, *args, **kwargs)


class PatchedSelfAttention(PatchedAttention):
    """Mixin for plain self-attention: one layer for query, key and value, without norms or positions."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self, query, key, value, attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    position_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    head_weight: Tensor | None = None,
) -> Tensor:
    """Attend in a patched module, with the sizes of the tokens counted, and note the evidence if it is a stage.

    Args:
        module: has `scale` and, as a rule, `fused_attn` and `attn_drop`, as timm's attention layers do.
        query, key, value: [B, H, P + K, D]; see `attention.attention`.
        attn_mask, is_causal: as the model was given them, for all patches.
        position_bias: for all patches, added to the logits; see `method.patches`.
        scale: factor of the logits, if not the module's.
        dropout, drop: as in `attend_by_parts`.
        head_weight: [H]; see `importance.query_row_attention`.

    Returns:
        [B, H, P + K, D] of the value.
    """
    plan, block = module._token_merge
    state = plan.current()
    state.attended = True
    scale = module.scale if scale is None else scale
    bias, counts_sizes = plan.bias(state, attn_mask, is_causal, query)
    if block in plan.schedule:
        state.evidence.append(Evidence(query, key, value, scale, bias, head_weight))
    if position_bias is not None:
        position_bias = state.position_bias(position_bias)
        bias = position_bias if bias is None else bias + position_bias
    log_size = None if counts_sizes else plan.log_size(state)
    return attend_by_parts(
        module, query, key, value, scale=scale, bias=bias, log_size=log_size, dropout=dropout, drop=drop
    )


def attend_by_parts(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    log_size: Tensor | None = None,
    dropout: float | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attend with the modules that a layer has for it, which may have hooks or be others than timm's.

    Args:
        module: attends by fused kernels if its `fused_attn` is true. Otherwise its `softmax` and `attn_drop`, where it
            has them, are called on the attention matrix, as timm does.
        query, key, value, scale, bias, log_size: as in `attention.attention`.
        dropout: probability of dropping an attention weight in training, if the layer has no `attn_drop` with that.
        drop: calls `attn_drop` on an attention matrix [B, H, T, T], if timm gives it another layout.
    """
    layer = getattr(module, "attn_drop", None)
    probability = 0.0
    if module.training:
        probability = getattr(layer, "p", 0.0) if dropout is None else dropout
    if drop is None:
        drop = layer
    if drop is None and probability:
        drop = partial(F.dropout, p=probability)
    return attention(
        query,
        key,
        value,
        scale=scale,
        bias=bias,
        log_size=log_size,
        dropout=probability,
        fused=getattr(module, "fused_attn", False),
        softmax=getattr(module, "softmax", None),
        drop=drop,
    )


def project_qkv(module: Any, x: Tensor) -> Tensor:
    """Return query, key and value side by side, of a layer whose biases timm may keep apart: [B, T, 3 * C]."""
    if getattr(module, "q_bias", None) is None:
        return module.qkv(x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if getattr(module, "qkv_bias_separate", False):
        return module.qkv(x) + bias
    return F.linear(x, module.qkv.weight, bias)  # as timm does: here it does not call the layer


def relative_bias(module: Any, query: Tensor, tokens: int, shared: Tensor | None = None) -> Tensor | None:
    """Return the bias of each pair of patches and prefix tokens by their relative position: [1, H, T, T].

    Args:
        module: an attention layer whose `rel_pos` is called by timm, on the logits, where attention is not fused.
        query: [B, H, K, D].
        tokens: T, prefix tokens and all patches.
        shared: the bias if the layer has no `rel_pos`, or None.
    """
    if module.rel_pos is None:
        return shared
    if getattr(module, "fused_attn", False):
        return module.rel_pos.get_bias()
    return module.rel_pos(query.new_zeros(1, query.shape[1], tokens, tokens))


Known: TypeAlias = Mapping[type[nn.Module], type[Patched]]

# {(class, name of a method): the method, and what it runs} as they were when an adapter first named the class.
_methods: dict[tuple[type[nn.Module], str], tuple[Any, Any]] = {}


def classes(module: Any, **mixins: type[Patched]) -> dict[type[nn.Module], type[Patched]]:
    """Return the mixin of each class of a timm module, of those classes that only some versions of timm have."""
    return {getattr(module, name): mixin for name, mixin in mixins.items() if hasattr(module, name)}


class Adapter:
    """How one family of models is patched. Subclass it, and register the subclass with `register_adapter`.

    Attributes:
        family: name of the family, as `UnsupportedModelError` and the documentation list it.
        timm_modules: names of the timm modules whose models it serves, such as "vision_transformer".
        example: timm's name of a typical model, for the list of families.
        reduces: what runs on fewer tokens, in a few words, for the list of families.
        restores: where the full grid is restored, likewise.
        known_blocks, known_attention: {class: mixin} of blocks and attention layers, whose forward is known by them.
        in_rows: image tokens are in the order of the grid's rows, so that their neighbours are known.
        on_entry: each block merges tokens on entry, and restores the grid itself.
        compares_mean_keys: tokens are compared by their mean keys where there are many: measured where positions are an
            embedding added to the tokens, and not in the keys or in a bias.
        model_mixin: mixin for the model itself.
    """

    family: ClassVar[str]
    timm_modules: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""
    reduces: ClassVar[str] = "image tokens, from stage to stage"
    restores: ClassVar[str] = "behind the last block"
    in_rows: ClassVar[bool] = True
    known_blocks: ClassVar[Known] = {}
    known_attention: ClassVar[Known] = {}
    on_entry: ClassVar[bool] = False
    compares_mean_keys: ClassVar[bool] = False
    model_mixin: ClassVar[type[Patched]] = PatchedModel

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for known_class, mixin in (*cls.known_blocks.items(), *cls.known_attention.items()):
            for name in mixin.replaces:
                _methods.setdefault((known_class, name), _method(known_class, name))

    def serves(self, model: Any) -> bool:
        """Return whether this model of the registered class is one of the family."""
        return True

    def blocks(self, model: Any) -> list[nn.Module]:
        """Return the model's blocks in their order: `stages` and `keep_rate` count them."""
        return list(model.blocks)

    def sections(self, model: Any) -> list[range]:
        """Return the runs of blocks through which tokens may stay fewer; behind each, the grid is restored."""
        return [range(len(self.blocks(model)))]

    def default_stages(self, model: Any) -> tuple[int, ...]:
        """Return the blocks that reduce tokens if nothing else is asked for."""
        return tuple(
            section.start + stage for section in self.sections(model) for stage in default_stages(len(section))
        )

    def num_prefix_tokens(self, model: Any) -> int:
        """Return the number of tokens in front of the image tokens."""
        return model.num_prefix_tokens

    def num_class_tokens(self, model: Any) -> int:
        """Return the number of class and distillation tokens, the first of the prefix tokens."""
        return 0

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        """Return (height, width) of the patch grid, or None where it depends on the image."""
        return None

    def layers(self, block: Any) -> list[Any]:
        """Return the attention layers of a block."""
        return [block.attn]

    def mixins(self, block: Any) -> Iterator[tuple[nn.Module, type[Patched]]]:
        """Yield the modules to patch in a block, itself included, each with its mixin.

        Raises:
            UnsupportedModelError: a part of the block is not known.
        """
        yield block, known_mixin(block, self.known_blocks)
        for layer in self.layers(block):
            yield layer, known_mixin(layer, self.known_attention)


class GridAdapter(Adapter):
    """An adapter of a family whose blocks are each a `PatchedGridBlock`: merged on entry, restored behind it."""

    reduces = "tokens of each window, in attention and MLP"
    restores = "behind each block"
    on_entry = True
    model_mixin: ClassVar[type[Patched]] = PatchedGridModel
    # Blocks of fewer channels are left alone by default, as long as there are others: where windows are small, choosing
    # among their tokens takes as long as is saved (examples/results/speed.md).
    least_channels: ClassVar[int] = 0

    def default_stages(self, model: Any) -> tuple[int, ...]:
        blocks = self.blocks(model)
        if not self.least_channels:
            return tuple(range(len(blocks)))
        # By their norms, since linear layers may be wrapped ones without weights.
        channels = [len(next(block.get_submodule("norm1").parameters())) for block in blocks]
        wide = tuple(index for index, width in enumerate(channels) if width >= self.least_channels)
        return wide or tuple(range(len(blocks)))

    def num_prefix_tokens(self, model: Any) -> int:
        return 0


def known_mixin(module: nn.Module, known: Known) -> type[Patched]:
    """Return the mixin for a module whose forward, and what the mixin does of it, is that of a known class.

    Args:
        module: a block or attention layer.
        known: mixin of each known class.

    Raises:
        UnsupportedModelError: the class, or a subclass's own forward, or a part of it, is not known.
    """
    cls = type(module)
    names = ", ".join(c.__name__ for c in known)
    for known_class, mixin in known.items():
        if not isinstance(module, known_class):
            continue
        for name in mixin.replaces:
            if name in vars(module):
                raise UnsupportedModelError(
                    f"The {name} of a {cls.__name__} was replaced on the instance, by another library's hook or patch. "
                    "Undo that first, and apply token merging before it."
                )
        if all(getattr(cls, name, None) is getattr(known_class, name, None) for name in mixin.replaces):
            for name in mixin.replaces:
                if _was_replaced(known_class, name):
                    raise UnsupportedModelError(
                        f"{known_class.__module__}.{known_class.__name__}.{name} was replaced on the class, and token "
                        "merging would pass over what is there now. Put the original back first, or serve a subclass "
                        "that has the new one with an adapter of your own: register_adapter."
                    )
            unknown = {name for name, _ in module.named_children()} - set(mixin.parts)
            if unknown:
                raise UnsupportedModelError(
                    f"{cls.__name__} has parts that are not known here: {', '.join(sorted(unknown))}. "
                    f"They might change what its forward does. Serve it with an adapter of your own: register_adapter."
                )
            check_structure(module, mixin)
            return mixin
    raise UnsupportedModelError(
        f"{cls.__module__}.{cls.__name__} is no block or attention layer that is known here, or has a forward of its "
        f"own. Known: {names}. Serve it with an adapter of your own: register_adapter."
    )


def check_structure(module: nn.Module, mixin: type[Patched]) -> None:
    """Refuse a module without something that a mixin reads, or whose forward takes what the mixin does not know.

    Raises:
        UnsupportedModelError: a timm has another class under that name than the one that is known.
    """
    name = type(module).__name__
    required = set(mixin.parts).union(mixin.reads).difference(mixin.may_lack)
    lacking = sorted(attribute for attribute in required if not hasattr(module, attribute))
    if lacking:
        raise UnsupportedModelError(
            f"{name} of timm {timm.__version__} is not the one that is known here: it has no {', '.join(lacking)}."
        )
    known, given = (_arguments(cls, method) for cls, method in ((mixin, mixin.stands_in), (type(module), "forward")))
    if known is not None and given is not None and given != known[: len(given)]:
        raise UnsupportedModelError(
            f"{name} of timm {timm.__version__} is not the one that is known here: its forward takes "
            f"({', '.join(given)}), and may take ({', '.join(known)})."
        )


def _arguments(cls: type[nn.Module], name: str) -> list[str] | None:
    """Return the names of what a forward takes behind its first tensor, or None where it takes anything."""
    parameters = signature(getattr(cls, name)).parameters
    if any(parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for parameter in parameters.values()):
        return None
    return [argument for argument in parameters if argument not in ("self", "reduce")][1:]


def _method(cls: type[nn.Module], name: str) -> tuple[Any, Any]:
    """Return a method of a class, and the code that it runs now."""
    method = getattr(cls, name, None)
    return method, getattr(method, "__code__", None)


def _was_replaced(cls: type[nn.Module], name: str) -> bool:
    """Return whether a method of a known class is another one than its author wrote.

    One that was replaced before the adapter was imported is told by where it was defined: timm's are plain functions
    in the body of their class.
    """
    method, code = _method(cls, name)
    if _methods.get((cls, name), (method, code)) != (method, code):
        return True
    owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
    if owner.__module__.partition(".")[0] != "timm":
        return False
    written = type(method) is FunctionType and method.__globals__ is vars(sys.modules[owner.__module__])
    return not written or method.__qualname__ != f"{owner.__qualname__}.{name}"
