"""`apply` and `remove`: the only file that alters a model.

A patched module has a subclass of its class in `__class__`, and one attribute more. wrapt's proxies were tried for
this and cannot keep the promises: a `FunctionWrapper` on a block's forward breaks `torch.compile(fullgraph=True)`
and can be neither deep-copied nor pickled. wrapt does what it is best at, at the edges: adapters are registered by
its import hooks.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from token_merge_plugin.adapters import Adapter, find_adapter, missing, registered_adapters
from token_merge_plugin.adapters.base import Patched, Place, check_structure, patched_class, unwrapped
from token_merge_plugin.adapters.refused import REFUSED
from token_merge_plugin.config import (
    BY_CLASS_ATTENTION,
    MANY_PATCHES,
    KeepRate,
    MergeConfig,
    MergeOptions,
)
from token_merge_plugin.errors import ConfigError, PatchStateError, UnsupportedModelError, first_line
from token_merge_plugin.method.multiscale import MultiScaleFusion
from token_merge_plugin.method.state import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


class Change(NamedTuple):
    """What is done to one module: its patched class, its place in the plan, and the learned part that it is given."""

    module: nn.Module
    cls: type[nn.Module]
    place: Place
    fusion: MultiScaleFusion | None = None

    @property
    def parts(self) -> tuple[type[Patched], type[nn.Module]]:
        """The mixin and the original class, also where another library has made a subclass since."""
        return self.cls._token_merge_parts  # type: ignore[attr-defined]

    @property
    def wrapped(self) -> bool:
        """Whether another library, such as FSDP2, has made the patched class another one."""
        return "_token_merge_parts" not in vars(self.cls)


def apply(model: Model, keep_rate: KeepRate | MergeConfig = 0.7, **options: "Unpack[MergeOptions]") -> Model:
    """Patch a timm vision transformer, in place, so that it merges tokens on the way through.

    Args:
        model: a supported model, or a module that contains some, such as a segmentation model. One that is patched
            already is patched anew.
        keep_rate: share of the image tokens that each stage keeps, in (0, 1]; see `MergeConfig`, which can also be
            given here. 1.0 is the unpatched model.
        options: the other fields of `MergeConfig`, by name.

    Returns:
        The same model.

    Raises:
        ConfigError: an option is not allowed, or does not fit the model.
        UnsupportedModelError: there is no model that a registered adapter serves, or one has a part that is not
            known.
        PatchStateError: the model is compiled, or in the middle of a forward pass.

        After any of these, and whatever else is raised on the way, the model is exactly as it was.
    """
    config = MergeConfig.of(keep_rate, **options)
    _check_model(model)
    with _all_or_nothing(model):
        before = _patches(model)
        learned = [change.fusion for change in before if change.fusion is not None]
        _unpatch(before)
        after = [change for part, adapter in _served(model) for change in _changes(part, adapter, config, learned)]
        _patch(_wrapped_as_before(before, after))
        return model


def remove(model: Model) -> Model:
    """Undo `apply`, in place: the model is bit for bit what it was. Without effect on a model that is not patched.

    Raises:
        PatchStateError: the model is compiled, in the middle of a forward pass, or was sharded after `apply`.
    """
    _check_model(model)
    changes = _patches(model)
    for change in changes:
        if change.wrapped:
            raise PatchStateError(
                f"A patched module was made a {change.cls.__name__} since. Undo that first, or remove before it."
            )
    with _all_or_nothing(model):
        _unpatch(changes)
        return model


def is_patched(model: nn.Module) -> bool:
    """Return whether `apply` has patched the model, or a model in it."""
    return any(isinstance(module, Patched) for module in model.modules())


def config_of(model: nn.Module) -> MergeConfig | None:
    """Return the options by which the model, or the first model in it, is patched; None where it is not."""
    plans = plans_of(model)
    return plans[0].config if plans else None


@contextmanager
def full_grid(model: nn.Module) -> Iterator[nn.Module]:
    """Have every block of a patched model give the full patch grid back, as an unpatched one does.

    For loops over blocks that keep what each returns: where a model is called that has hooks on its blocks, they do so
    as it is. Inside of the blocks, tokens are as few as without; outputs are the same but for rounding. It is of the
    thread that enters it.

        with token_merge_plugin.full_grid(model):
            for block in model.blocks:
                x = block(x)  # [B, P + N, C]

    Raises:
        PatchStateError: the model is in the middle of a forward pass.
    """
    if _running(set(model.modules())):
        raise PatchStateError("The model is in the middle of a forward pass. Enter full_grid around it.")
    with ExitStack() as stack:
        for plan in plans_of(model):
            stack.enter_context(plan.whole_grid())
        yield model


def restore(model: nn.Module, tokens: Tensor) -> Tensor:
    """Put what a hook sees inside of a block on the full patch grid: each patch gets what the token has that holds it.

    To be called in the hook, while the forward pass of the model is under way.

    Args:
        model: patched, or not: then tokens are returned as they are.
        tokens: [B, P + K, D], prefix and image tokens, such as the output of an attention layer or an MLP; those of all
            patches, as hooks on norms see them, are returned as they are. Where blocks attend within windows, B counts
            windows.

    Returns:
        [B, P + N, D].

    Raises:
        PatchStateError: the tokens are not as many as the pass under way has, or are no sequences.
    """
    for plan in plans_of(model):
        state = plan.current()
        if state is None or state.merged is None:
            continue
        expected = state.num_tokens()
        if tokens.dim() != 3:
            raise PatchStateError(f"Tokens are [B, P + K, D], and these are {list(tokens.shape)}. Reshape them first.")
        if tokens.shape[1] == state.num_prefix_tokens + state.num_patches:
            return tokens
        if tokens.shape[1] != expected:
            raise PatchStateError(
                f"The pass under way has {expected} tokens, and there are {tokens.shape[1]}: in front of a stage there "
                "are more than behind it. Restore what comes behind it, or take the block's output in full_grid(model)."
            )
        return plan.on_patches(state, tokens)
    return tokens


def plans_of(model: nn.Module) -> list[Plan]:
    """Return the plan of each patched model in `model`, itself included."""
    plans = [module._token_merge.plan for module in model.modules() if isinstance(module, Patched)]
    return list({id(plan): plan for plan in plans}.values())


def supported_models() -> list[str]:
    """Return timm's names of the models that are served, sorted."""
    return sorted(name for names in models_by_adapter().values() for name in names)


def models_by_adapter() -> dict[Adapter, list[str]]:
    """Return timm's names of the models that each adapter serves, for adapters that serve any."""
    import timm

    known = set(timm.list_modules())
    served = {}
    for adapter in registered_adapters():
        modules = known.intersection(adapter.timm_modules)
        if modules:
            served[adapter] = sorted(name for module in modules for name in timm.list_models(module=module))
    return served


class StageChoices(NamedTuple):
    """Where a model can reduce tokens.

    Attributes:
        sections: runs of blocks through which tokens may stay fewer. Blocks that give back the grid are runs of their
            own.
        default: schedule of a keep rate by default, {block: rate}.
        equal_rates: stages of the family's schedule by equal rates.
    """

    sections: list[range]
    default: Callable[[float], dict[int, float]]
    equal_rates: tuple[int, ...]

    @property
    def blocks(self) -> list[int]:
        """The blocks of all sections."""
        return [block for section in self.sections for block in section]


def stage_choices(model: nn.Module) -> StageChoices:
    """Return where a model can reduce tokens, and where it does so by default.

    Raises:
        UnsupportedModelError: there is no model that is served in `model`, or there are several.
    """
    served = _served(model)
    if len(served) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} has {len(served)} vision transformers. Give one of them.")
    part, adapter = served[0]
    sections, stages, depth = adapter.sections(part), adapter.default_stages(part), len(adapter.blocks(part))
    by_numbers = _by_numbers(adapter, sections)

    def default(keep_rate: float) -> dict[int, float]:
        return dict(MergeConfig(keep_rate).amounts(depth, stages, sections, by_numbers))

    if adapter.on_entry:
        single = [range(block, block + 1) for section in sections for block in section]
        return StageChoices(single, default, stages)
    return StageChoices(sections, default, stages)


def _by_numbers(adapter: Adapter, sections: list[range]) -> bool:
    """Return whether small keep rates mean equal numbers if nothing else is asked for: tokens stay fewer to the end."""
    return not adapter.on_entry and len(sections) == 1


def _by_mean_keys(adapter: Adapter, grid_size: tuple[int, int] | None) -> bool:
    """Return whether tokens are compared by their mean keys if nothing else is asked for."""
    return adapter.compares_mean_keys and grid_size is not None and math.prod(grid_size) >= MANY_PATCHES


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every module of the model back as it was if anything is raised: an interrupt, or by a module itself."""
    before = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, children in before:
            # Past the module's own __setattr__, which may be what raised.
            object.__setattr__(module, "__class__", cls)
            for kept, now in ((attributes, vars(module)), (children, module._modules)):
                now.clear()
                now.update(kept)
        raise


def _patch(changes: list[Change]) -> None:
    for module, cls, place, fusion in changes:
        module._token_merge = place  # type: ignore[assignment]
        module.__class__ = cls
        if fusion is not None:
            module.token_merge_fusion = fusion


def _unpatch(changes: list[Change]) -> None:
    for change in changes:
        module = change.module
        if change.fusion is not None:
            del module.token_merge_fusion
        module.__class__ = change.parts[1]
        del module._token_merge


def _patches(model: nn.Module) -> list[Change]:
    """Return what was done to the model, in the form in which `_patch` does it."""
    return [
        Change(module, type(module), module._token_merge, module._modules.get("token_merge_fusion"))  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(module, Patched)
    ]


def _wrapped_as_before(before: list[Change], after: list[Change]) -> list[Change]:
    """Return the new changes, with the classes that another library has made of patched ones since.

    Raises:
        PatchStateError: such a module would not be patched as it was.
    """
    wrapped = {change.module: change for change in before if change.wrapped}
    new = {change.module: change for change in after}
    for module, old in wrapped.items():
        if module not in new or (new[module].parts, new[module].fusion) != (old.parts, old.fusion):
            raise PatchStateError(
                f"A patched module was made a {old.cls.__name__} since. Keep rates may change now, but not which "
                "modules are patched and how. Undo that first, or apply before it."
            )
    return [change._replace(cls=wrapped[change.module].cls) if change.module in wrapped else change for change in after]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{model!r} is a {type(model).__name__}. Give a torch.nn.Module.")
    modules = set(model.modules())
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise PatchStateError("The model is scripted. Apply token merging first, then trace or export.")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise PatchStateError("The model is compiled. Apply or remove token merging first, then torch.compile.")
    if _running(modules):
        raise PatchStateError("The model is in the middle of a forward pass. Wait until it has returned.")


def _running(modules: set[nn.Module]) -> bool:
    """Return whether a thread is inside of a call of one of the modules."""
    frame: FrameType | None = None
    try:
        for frame in sys._current_frames().values():  # one for each thread
            while frame is not None:
                if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") in modules:
                    return True
                frame = frame.f_back
        return False
    finally:
        del frame  # one of them is this function's own: a cycle that would keep the model alive


def _served(model: nn.Module) -> list[tuple[nn.Module, Adapter]]:
    """Return every served model in `model`, itself included, with its adapter."""
    served: list[tuple[nn.Module, Adapter]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        adapter = find_adapter(module)
        if adapter is not None and module not in inside and adapter.serves(module):
            served.append((module, adapter))
            inside.update(module.modules())
    if not served:
        families = ", ".join(dict.fromkeys(adapter.family for adapter in registered_adapters()))
        modules = {type(module).__module__ for module in model.modules()}
        reasons = [f"{name} was looked at: {reason} " for name, reason in REFUSED.items() if name in modules]
        reasons += [f"{name} is not served here. {reason} " for name, reason in missing.items() if name in modules]
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model that is served, and contains none. "
            + "".join(reasons)
            + f"Families served: {families}. supported_models() lists timm's names; register_adapter serves a class of "
            "your own."
        )
    return served


def _changes(model: Any, adapter: Adapter, config: MergeConfig, learned: list[MultiScaleFusion]) -> list[Change]:
    """Plan what is to be done to a served model, without touching it."""
    with _looked_at(model, adapter):
        blocks = [unwrapped(block) for block in adapter.blocks(model)]
        mixins = [list(adapter.mixins(block)) for block in blocks]
        sections, default = adapter.sections(model), adapter.default_stages(model)
        class_tokens, grid_size = adapter.num_class_tokens(model), adapter.grid_size(model)
        num_prefix_tokens = adapter.num_prefix_tokens(model)
    check_structure(model, adapter.model_mixin)
    if config.num_prefix_tokens is not None:
        if adapter.on_entry or config.num_prefix_tokens < num_prefix_tokens:
            raise ConfigError(
                f"num_prefix_tokens={config.num_prefix_tokens} does not fit this {type(model).__name__}, which has "
                f"{num_prefix_tokens} of its own. Give the number of all tokens in front of the patches."
            )
        # Which of them is the class token is not known.
        num_prefix_tokens, class_tokens = config.num_prefix_tokens, 0
    if not blocks:
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks, so there is nothing to patch.")
    if adapter.on_entry:
        _check_on_entry(model, config)
    if config.multi_scale != "off" and not adapter.in_rows:
        raise ConfigError(
            f"multi_scale={config.multi_scale!r} needs to know which tokens are neighbours, and the order in which "
            f"{type(model).__name__} keeps them does not tell. Leave it at 'off'."
        )
    schedule = config.amounts(len(blocks), default, sections, _by_numbers(adapter, sections))
    for block in schedule:
        if not any(block in section for section in sections):
            allowed = ", ".join(str(b) for section in sections for b in section)
            raise ConfigError(
                f"Block {block} of this {type(model).__name__} cannot reduce tokens: it changes the grid, or is of "
                f"another kind. Choose from blocks {allowed}."
            )
    if config.multi_scale == "learned":
        _check_learned(model, adapter, sections)
    fused = min(schedule, default=None) if config.multi_scale == "learned" else None
    if config.importance == "class_attention" and not class_tokens:
        raise ConfigError(
            f"importance='class_attention' needs a class token, and this {type(model).__name__} has none. "
            "Leave importance at 'auto', or choose 'uniform'."
        )
    if config.method in BY_CLASS_ATTENTION and not class_tokens:
        raise ConfigError(
            f"method={config.method!r} keeps the tokens that the class token attends to, and this "
            f"{type(model).__name__} has none. Choose 'merge', 'tome', 'late_tome' or 'random'."
        )
    if not schedule:
        return []
    plan = Plan(
        config=config,
        schedule=schedule,
        sections=tuple(sections),
        num_prefix_tokens=num_prefix_tokens,
        num_class_tokens=class_tokens,
        grid_size=grid_size,
        similarity=config.similarity or ("mean_keys" if _by_mean_keys(adapter, grid_size) else "tokens"),
        checkpointing=getattr(model, "grad_checkpointing", False),
    )
    changes = [Change(model, patched_class(adapter.model_mixin, type(model)), Place(plan, -1))]
    for index, of_block in enumerate(mixins):
        if not adapter.on_entry or index in schedule:
            fusion = _fusion(model, of_block[0][0], learned) if index == fused else None
            (outer, outer_mixin), *layers = of_block
            changes += [Change(layer, patched_class(mixin, type(layer)), Place(plan, index)) for layer, mixin in layers]
            changes.append(Change(outer, patched_class(outer_mixin, type(outer)), Place(plan, index), fusion))
    return changes


@contextmanager
def _looked_at(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Refuse a model of a known class that has not got what the family's adapter looks for in it."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a model of the family {adapter.family} by its class, but not by its parts: "
            f"{first_line(error)}. Serve it with an adapter of your own: register_adapter."
        ) from error


def _fusion(model: Any, block: nn.Module, learned: list[MultiScaleFusion]) -> MultiScaleFusion:
    """Return a multi-scale fusion for a block: one that the model had before, or a new one."""
    for fusion in learned:
        if fusion.gates.shape[1] == model.embed_dim:
            learned.remove(fusion)
            return fusion
    parameter = next(block.parameters())
    return MultiScaleFusion(model.embed_dim, parameter.device, parameter.dtype).train(block.training)


def _check_learned(model: Any, adapter: Adapter, sections: list[range]) -> None:
    """Refuse learned multi-scale fusion where the tokens in front of the first stage are not one grid of one width."""
    grid = adapter.grid_size(model) is not None or getattr(model, "dynamic_img_size", False)
    if len(sections) != 1 or not isinstance(getattr(model, "embed_dim", None), int) or not grid:
        raise ConfigError(
            f"multi_scale='learned' needs tokens of one width on one known grid, which this {type(model).__name__} "
            "does not have. Leave multi_scale at 'off'."
        )


def _check_on_entry(model: nn.Module, config: MergeConfig) -> None:
    """Refuse options that need what attention saw, which is not there yet when tokens merge on entry to a block.

    Without any importance, similarity is all there is to choose by.
    """
    fit: dict[str, tuple] = {
        "method": ("merge",),
        "importance": ("auto", "uniform"),
        "similarity": (None, "tokens"),
        "multi_scale": ("off",),
    }
    for name, allowed in fit.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not fit this {type(model).__name__}, whose blocks merge tokens "
                f"on entry, before they attend. Choose {' or '.join(repr(value) for value in allowed if value)}."
            )
