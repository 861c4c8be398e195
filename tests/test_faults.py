"""Each kind of fault that `test_reports.py` has for a few models, over every kind of model that is served.

One model of each family by default, every one of the table with `pytest -m sweep`.
"""

import copy
from contextlib import nullcontext, suppress
from functools import cache, partial

import pytest
import torch
from checks import default_dtype, gradients, shapes, tensors
from families import FAMILIES, KINDS, images, make
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from token_merge_plugin import PatchStateError, apply, full_grid, remove, restore
from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.adapters.base import Patched

FIRST = [next(iter(table)) for table in FAMILIES.values()]


def of_families(*names):
    """Return the kinds of some families, those that are not the first of theirs for the sweep."""
    return [
        pytest.param(kind, marks=[] if kind in FIRST else pytest.mark.sweep)
        for name in names
        for kind in FAMILIES[name]
    ]


NORMS = ("norm1", "norm2")
every_family = pytest.mark.parametrize("kind", of_families(*FAMILIES))


def blocks_of(model):
    """Return the blocks of a model, as its adapter counts them."""
    return [block for part in served(model) for block in find_adapter(part).blocks(part)]


@cache
def _small(kind):
    model = make(kind)
    if kind.startswith(("VOLO", "NesT", "GCViT", "Twins")):
        blocks = set(blocks_of(model))
        for run in model.modules():
            if isinstance(run, (nn.Sequential, nn.ModuleList)) and blocks.issuperset(run):
                del run[2:]
    return model


def small(kind):
    """Return a model of the table, with two blocks in a row of those that have many whatever they are given."""
    return copy.deepcopy(_small(kind))


def served(model):
    return [part for part in model.modules() if find_adapter(part)][:1]


def attention_of(model, block):
    """Return the attention layers of a block."""
    (part,) = served(model)
    return find_adapter(part).layers(block)


def put(model, old, new):
    """Put a module in the place of another one."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def trained(model, x):
    """Return the gradient of each parameter, by name, with the same random numbers for each call."""
    torch.manual_seed(0)
    return gradients(model.train(), x)[1]


@every_family
@pytest.mark.parametrize("first", ["apply", "wrap"])
def test_wrappers_for_activation_checkpointing_train_in_either_order(kind, first):
    def wrap(model):
        blocks = {id(block) for block in blocks_of(model)}
        apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
        return model

    x = images(kind)
    expected = trained(apply(small(kind), 0.6), x)
    model = small(kind)
    found = trained(wrap(apply(model, 0.6)) if first == "apply" else apply(wrap(model), 0.6), x)
    assert len(found) == len(expected)
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def recompute(module, **options):
    """Have somebody else recompute a module in the backward pass, by a forward that is replaced on the instance."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: checkpoint(partial(forward, **kwargs), *args, **options)


@every_family
def test_blocks_that_others_recompute_have_the_gradients_of_blocks_that_nobody_does(kind):
    x = images(kind)
    model = apply(small(kind), 0.6)
    expected = trained(model, x)
    for block in blocks_of(model)[::2]:
        recompute(block, use_reentrant=False)
    torch.testing.assert_close(trained(model, x), expected, rtol=1e-3, atol=1e-4)
    model = apply(small(kind), 0.6)
    for block in blocks_of(model)[::2]:
        recompute(block, use_reentrant=True)
    if find_adapter(*served(model)).on_entry:
        torch.testing.assert_close(trained(model, x), expected, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(PatchStateError, match="use_reentrant=False"):
            trained(model, x)


@every_family
def test_runs_of_blocks_can_be_recomputed(kind):
    x = images(kind)
    model = apply(small(kind), 0.6)
    expected = trained(model, x)
    blocks = set(blocks_of(model))
    runs = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(blocks.intersection(m)) > 1]
    for run in runs:
        run.forward = lambda x, *args, run=run: checkpoint_sequential(list(run), 2, x, use_reentrant=False)
    torch.testing.assert_close(trained(model, x), expected, rtol=1e-3, atol=1e-4)


RESIZED = {
    "half": lambda x: x[..., : x.shape[2] // 2, : x.shape[3] // 2],
    "wide": lambda x: torch.cat((x, x), dim=3),
    "tall": lambda x: torch.cat((x, x), dim=2),
}


@every_family
@pytest.mark.parametrize("resize", RESIZED)
@torch.no_grad()
def test_an_image_of_another_size_is_taken_where_it_is_unpatched(kind, resize):
    """Positions are looked up for merged tokens, where the unpatched model would add too many or too few."""
    model, x = small(kind), RESIZED[resize](images(kind))
    try:
        shape = model(x).shape
    except (RuntimeError, AssertionError, ValueError):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            apply(model, 0.6)(x)
    else:
        assert apply(model, 0.6)(x).shape == shape


# Those whose positions are of the first tokens, and those that keep a grid, take no prompts unpatched.
PROMPTED = ("vit", "cait", "lvvit")


def prompted(model, number=2):
    """Put tokens in front of the first block, and take them away behind the last."""

    def add(module, args):
        x, *rest = args
        return (torch.cat((x.new_full((len(x), number, x.shape[2]), 3.0), x), dim=1), *rest)

    blocks = blocks_of(model)
    blocks[0].register_forward_pre_hook(add)
    blocks[-1].register_forward_hook(lambda module, args, output: output[:, number:])
    return model


@pytest.mark.parametrize("kind", of_families(*PROMPTED))
@torch.no_grad()
def test_prompts_are_noticed_and_where_they_are_declared_never_merged(kind):
    model, x = prompted(small(kind)), images(kind)
    expected = model(x)
    with pytest.raises(PatchStateError, match="num_prefix_tokens"):
        apply(model, 0.6)(x)
    (part,) = served(model)
    number = find_adapter(part).num_prefix_tokens(part) + 2
    torch.testing.assert_close(apply(model, 1 - 1e-9, num_prefix_tokens=number)(x), expected, rtol=1e-3, atol=1e-4)
    first = []
    blocks_of(model)[-1].register_forward_pre_hook(lambda module, args: first.append(args[0][:, :2]))
    apply(model, 0.2, num_prefix_tokens=number)(x)
    torch.testing.assert_close(*first[0].unbind(1))  # alike as they went in, and each still one token


def check_that_hooks_see_what_they_see_unpatched(kind, modules_of, look):
    """Hook modules of a model, and compare what `look` makes of their calls, and the model's output, once patched."""
    model, x = small(kind), images(kind)
    seen = []
    for module in modules_of(model):
        module.register_forward_hook(lambda module, args, output: seen.append(look(args, output)))
    model(x)
    unpatched = seen.copy()
    expected = apply(small(kind), 0.6)(x)
    apply(model, 0.6)
    for context in (nullcontext(), full_grid(model)):
        seen.clear()
        with context:
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        assert seen == unpatched


@every_family
@torch.no_grad()
def test_hooks_on_blocks_see_the_full_grid(kind):
    check_that_hooks_see_what_they_see_unpatched(kind, blocks_of, lambda args, output: shapes(tensors(output)))


@every_family
@torch.no_grad()
def test_hooks_on_norms_see_all_patches(kind):
    """Grad-CAM's usual targets. Those of windowed models see all patches of their windows, or grids, once restored."""
    if find_adapter(served(small(kind))[0]).on_entry:
        pytest.skip("its norms see windows: see the next test")

    def norms_of(model):
        return [norm for block in blocks_of(model) for name, norm in block.named_children() if name in NORMS]

    # VOLO's are images of tokens unpatched, and sequences of them patched.
    check_that_hooks_see_what_they_see_unpatched(kind, norms_of, lambda args, output: (args[0].numel(), output.numel()))


@every_family
@torch.no_grad()
def test_a_hook_inside_of_a_block_restores_what_it_sees(kind):
    """As sequences of tokens, or of those of windows; images of one row, of convolutions, are refused."""
    model, x = small(kind), images(kind)
    seen = {}

    def see(index, output):
        with suppress(PatchStateError):  # of images of one row, in blocks of convolutions
            seen[index] = restore(model, output).numel()

    for index, block in enumerate(blocks_of(model)):
        getattr(block, "norm2", block).register_forward_hook(
            lambda module, args, output, index=index: see(index, tensors(output)[0])
        )
    model(x)
    unpatched = dict(seen)
    apply(model, 0.6)
    seen.clear()
    model(x)
    if kind.startswith("Swin V2"):  # its norms behind attention see windows, with what pads them
        assert all(number >= unpatched[index] for index, number in seen.items())
    else:
        assert seen == {index: unpatched[index] for index in seen}


@every_family
@torch.no_grad()
def test_a_model_that_is_called_inside_of_its_own_pass_begins_one_of_its_own(kind):
    model, x, other = apply(small(kind), 0.6), images(kind), images(kind, seed=7)
    expected, of_other = model(x), model(other)
    for block in blocks_of(model)[::3]:
        inner = []

        def call(module, args, output, inner=inner):
            if not inner:
                inner.append(None)
                inner[0] = model(other)

        handle = block.register_forward_hook(call)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(inner[0], of_other)
        handle.remove()


def fresh_block(model, other):
    put(model, blocks_of(model)[0], blocks_of(other)[0])


def no_block(model, other):
    block = blocks_of(model)[0]
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is block:
                del parent._modules[name]


def swapped(model, other):
    blocks = blocks_of(model)
    same = [block for block in blocks[1:] if type(block) is type(blocks[0])]
    put(model, blocks[0], same[-1])


def fresh_attention(model, other):
    for index, block in enumerate(blocks_of(model)):
        for layer, new in zip(attention_of(model, block), attention_of(other, blocks_of(other)[index]), strict=True):
            put(model, layer, new)


@every_family
@pytest.mark.parametrize("change", [fresh_block, no_block, fresh_attention])
@torch.no_grad()
def test_a_model_that_is_changed_after_apply_says_so_when_it_is_called(kind, change):
    model, x = apply(small(kind), 0.6), images(kind)
    if change is fresh_attention and not any(attention_of(model, block) for block in blocks_of(model)):
        pytest.skip("its blocks are their own attention layers: see fresh_block")
    change(model, small(kind))
    with pytest.raises(PatchStateError, match=r"was changed since apply.* Apply again"):
        model(x)


@every_family
@torch.no_grad()
def test_a_forward_replaced_on_the_class_after_apply_is_noticed(kind, monkeypatch):
    model, x = apply(small(kind), 0.6), images(kind)
    expected = model(x)
    block = next(block for block in blocks_of(model) if isinstance(block, Patched))
    for module in [block, *attention_of(model, block)]:
        _, original = module._token_merge_parts
        with monkeypatch.context() as patch:
            forward = original.forward
            patch.setattr(original, "forward", lambda self, *args, **options: forward(self, *args, **options))  # noqa: B023
            with pytest.raises(PatchStateError, match=r"was replaced on the class\. Put the original back"):
                model(x)
    torch.testing.assert_close(model(x), expected)


def wrapped(forward):
    """Return a forward that calls the one that it replaces, as accelerate's hooks do."""
    return lambda *args, **options: forward(*args, **options)


@every_family
@torch.no_grad()
def test_attention_that_is_passed_over_on_an_instance_is_noticed(kind):
    """The forward of a layer is replaced after `apply`, to keep the attention maps."""
    model, x = apply(small(kind), 0.6), images(kind)
    expected = model(x)
    layers = [
        layer
        for block in blocks_of(model)
        for layer in attention_of(model, block)
        if isinstance(layer, Patched) and layer._token_merge.block in layer._token_merge.plan.schedule
    ]
    for layer in layers:
        layer.forward = wrapped(layer.forward)
    torch.testing.assert_close(model(x), expected)
    if not layers or kind == "ViT, parallel pairs":
        return  # its blocks are their own, or have another one beside it
    _, original = layers[-1]._token_merge_parts
    layers[-1].forward = partial(original.forward, layers[-1])
    # One with positions, or that takes a grid, cannot take the tokens that it is given.
    by_itself = "must match|shape .* is invalid|not enough values to unpack|unexpected keyword argument"
    with pytest.raises(Exception, match=rf"The attention of block \d+ was passed over|{by_itself}"):
        model(x)


@every_family
@torch.no_grad()
def test_a_stage_that_is_passed_over_on_an_instance_is_noticed(kind):
    model, x = apply(small(kind), 0.6), images(kind)
    expected = model(x)
    blocks = [block for block in blocks_of(model) if isinstance(block, Patched)]
    for block in blocks:
        block.forward = wrapped(block.forward)
    torch.testing.assert_close(model(x), expected)
    if find_adapter(served(model)[0]).on_entry:
        return  # each of its blocks restores the grid, whichever forward it has
    stage = next(block for block in blocks if block._token_merge.block in block._token_merge.plan.schedule)
    _, original = stage._token_merge_parts
    stage.forward = partial(original.forward, stage)
    with pytest.raises(
        PatchStateError, match=r"Block \d+, which reduces tokens, was passed over|The last block did not run"
    ):
        model(x)


# Those that say how many tokens are in front of the patches, and those that say how large their grid is.
COUNTED = ("vit", "eva", "beit", "relpos", "naflexvit", "convit", "gemma4_vit", "qwen3_vit", "deepseek_vit")


@pytest.mark.parametrize("kind", of_families(*COUNTED))
@torch.no_grad()
def test_a_token_more_in_front_of_the_patches_is_noticed(kind):
    """Registers are added, or the class token is taken away, after `apply`."""
    model = apply(small(kind), 0.6)
    (part,) = served(model)
    part.num_prefix_tokens += 1
    with pytest.raises(PatchStateError, match=r"was changed since apply: there are \d+ prefix tokens, and were \d"):
        model(images(kind))


@pytest.mark.parametrize("kind", of_families("beit", "relpos", "cait", "convit", "lvvit", "volo", "pit"))
@torch.no_grad()
def test_another_patch_embedding_is_noticed(kind):
    model, other = apply(small(kind), 0.6), make(kind, img_size=KINDS[kind][1]["img_size"] // 2)
    model.patch_embed = other.patch_embed
    if hasattr(model, "pos_embed"):
        model.pos_embed = other.pos_embed
    with pytest.raises(PatchStateError, match="was changed since apply: the patch grid is"):
        model(images(kind)[..., ::2, ::2])


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_another_default_dtype_changes_nothing(kind, dtype):
    model, x = apply(small(kind), 0.6), images(kind)
    expected = model(x)
    with default_dtype(dtype):
        output = model(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@every_family
def test_layers_are_found_by_the_names_of_their_classes(kind):
    model = small(kind)
    names = [type(module).__name__ for module in model.modules()]
    apply(model, 0.6)
    assert [type(module).__name__ for module in model.modules()] == names
    assert "token merging: method='merge', keep_rate=0.6" in repr(model)
    assert "TokenMerge" not in repr(remove(model))


@every_family
@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_scripting_and_symbolic_tracing_are_refused_with_what_works_instead(kind):
    model = apply(small(kind), 0.6)
    with pytest.raises(PatchStateError, match=r"cannot be scripted. Use torch.jit.trace"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace .* Use torch.export|^'len' is not supported"):
        torch.fx.symbolic_trace(model)  # in Hiera, timm's own code cannot be traced


@every_family
def test_an_error_at_the_last_module_leaves_the_model_as_it_was(kind):
    model = small(kind)
    last = blocks_of(model)[-1]

    class Strict(type(last)):
        def __setattr__(self, name, value):
            if name in ("_token_merge", "__class__"):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    object.__setattr__(last, "__class__", Strict)
    before = [(type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]
    on_entry = find_adapter(served(model)[0]).on_entry  # then only blocks that are stages are patched
    with pytest.raises(KeyboardInterrupt):
        apply(model, 0.6, stages=(len(blocks_of(model)) - 1,) if on_entry else None)
    assert [(type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()] == before
