"""Regressions of public reports: what people do with a vision transformer of timm around `apply`.

A report becomes a test here, whose docstring says what was done.
"""

import copy
import io
import sys
import warnings

import onnx
import onnxruntime
import pytest
import timm
import torch
from checks import default_dtype, gradients, run_program, set_fused_attention, shapes
from families import FAMILIES, images, make
from timm.models.vision_transformer import VisionTransformer
from timm.utils import AttentionExtract
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from token_merge_plugin import (
    ConfigError,
    PatchStateError,
    UnsupportedModelError,
    apply,
    full_grid,
    remove,
    restore,
)
from token_merge_plugin.adapters import find_adapter


def as_if_patched_last(change, *, options):
    """Return the outputs of a model patched before a change, and of one patched after it."""
    outputs = []
    for order in (("patch", "change"), ("change", "patch")):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4, num_classes=3).eval()
        for step in order:
            apply(model, 0.7, **options) if step == "patch" else change(model)
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(model(torch.randn(2, 3, *model.patch_embed.img_size)))
    return outputs


def test_a_patched_model_whose_pooling_is_changed_chooses_tokens_as_if_patched_after_it():
    """A package that builds on timm changes the model that it made, which was patched as it was made."""
    before, after = as_if_patched_last(lambda model: model.reset_classifier(0, "avg"), options={})
    assert torch.equal(before, after)


def test_a_patched_model_whose_image_size_is_changed_sees_the_scales_of_the_new_grid():
    """A package that builds on timm gives the model that it made another image size."""
    before, after = as_if_patched_last(
        lambda model: model.set_input_size((96, 128)), options={"multi_scale": "descriptors"}
    )
    assert torch.equal(before, after)


def test_feature_extractors_by_hooks_are_refused_where_a_hook_would_see_fewer_tokens():
    """A segmentation or detection model takes its features from hooks on the blocks."""
    model = timm.create_model("test_vit", features_only=True, feature_cls="hook")
    with pytest.raises(UnsupportedModelError, match="feature_cls='getter'"):
        apply(model, 0.5)
    x = torch.randn(1, 3, 160, 160)
    model = timm.create_model("test_vit", features_only=True, feature_cls="getter")
    expected = shapes(model(x))
    assert shapes(apply(model, 0.5)(x)) == expected


def test_pruning_to_intermediate_layers_after_apply_restores_behind_the_new_last_block():
    """The last blocks are cut off by timm's own method, once the model is patched."""
    model = make()
    x = images()
    shape = model.forward_features(x).shape
    apply(model, 0.5)
    model.prune_intermediate_layers([2])
    assert len(model.blocks) == 3
    assert model.forward_features(x).shape == shape


def test_blocks_taken_away_by_hand_are_noticed():
    """The last block is cut off by hand, once the model is patched."""
    model = apply(make(), 0.5)
    del model.blocks[-1]
    with pytest.raises(PatchStateError, match="Apply again"):
        model(images())
    assert apply(model, 0.5)(images()).shape == (2, 5)


def test_tokens_added_between_blocks_are_noticed():
    """Prompts are added between blocks, as deep prompt tuning does."""
    model = apply(make(), 0.5)
    model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat((output, output[:, :1]), 1))
    with pytest.raises(PatchStateError, match="no tokens added or taken away"):
        model(images())


def test_a_loop_over_the_blocks_restores_the_grid():
    """The forward pass is written out by hand, to take features in between."""
    model = apply(make(), 0.5)
    x = images()
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.norm(tokens), model.forward_features(x))


def replaced(module, monkeypatch):
    """Replace the forward of a module's class by one that does the same."""
    original = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, *args, **options: original(self, *args, **options))


@pytest.mark.parametrize("kind", [next(iter(table)) for table in FAMILIES.values()])
def test_a_forward_replaced_on_the_class_of_blocks_or_attention_layers_is_refused(kind, monkeypatch):
    """Attention.forward is replaced, to use a kernel of one's own or to keep the attention maps."""
    model = make(kind)
    (adapter, part) = next((find_adapter(part), part) for part in model.modules() if find_adapter(part))
    block = adapter.blocks(part)[-1]
    for module in [block, *adapter.layers(block)]:
        with monkeypatch.context() as patch:
            replaced(module, patch)
            with pytest.raises(UnsupportedModelError, match="forward was replaced on the class"):
                apply(model, 0.6)
    apply(model, 0.6)


def test_a_forward_replaced_before_the_package_is_imported_is_refused():
    """The same, at the top of a script whose last import is this package."""
    program = """
import functools, timm
from timm.layers import Attention
original = Attention.forward

@functools.wraps(original)
def forward(self, *args, **options):
    return original(self, *args, **options)

Attention.forward = forward
from token_merge_plugin import UnsupportedModelError, apply
try:
    apply(timm.create_model("test_vit"), 0.6)
except UnsupportedModelError as error:
    print(error)
"""
    done = run_program(sys.executable, "-c", program)
    assert "timm.layers.attention.Attention.forward was replaced on the class" in done.stdout, done.stderr


@pytest.mark.parametrize(("kind", "method"), [("Swin", "_attn"), ("MaxViT", "_partition_attn")])
def test_a_method_that_a_merged_block_would_pass_over_is_refused_if_it_is_not_timms(kind, method):
    """A block's method is replaced on an instance, and overridden in a subclass."""
    model = make(kind)
    block = next(module for module in model.modules() if hasattr(module, method))
    setattr(block, method, getattr(block, method))
    with pytest.raises(UnsupportedModelError, match=f"The {method} of a .* was replaced on the instance"):
        apply(model, 0.6)
    delattr(block, method)
    block.__class__ = type("Own", (type(block),), {method: lambda self, x: x})
    with pytest.raises(UnsupportedModelError, match="Own is no block"):
        apply(model, 0.6)


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_layers_are_found_by_the_names_of_their_classes(kind):
    """A configuration of FSDP or of a device map names Block; a profiler sums up by class."""
    model = make(kind)
    names = [type(module).__name__ for module in model.modules()]
    apply(model, 0.6)
    assert [type(module).__name__ for module in model.modules()] == names
    assert "TokenMerge" in repr(model)
    assert "TokenMerge" not in repr(remove(model))


class Renamed(VisionTransformer):
    """Keeps its blocks under another name."""

    def __init__(self, **options):
        super().__init__(**options)
        self.layers = self.blocks
        del self.blocks


class Unlike(VisionTransformer):
    """Has something else under the name of the blocks."""

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks = None


@pytest.mark.parametrize("cls", [Renamed, Unlike])
def test_a_subclass_that_lacks_what_its_family_has_is_refused_by_name(cls):
    """A subclass of timm's model keeps its blocks elsewhere."""
    model = cls(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(UnsupportedModelError, match=f"{cls.__name__} is a model of the family .* register_adapter"):
        apply(model, 0.6)


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_scripting_is_refused_with_what_works_instead(kind):
    """validate.py --torchscript scripts the model."""
    model = apply(make(kind), 0.6)
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(PatchStateError, match=r"cannot be scripted. Use torch.jit.trace"):
            torch.jit.script(whole)


def test_symbolic_tracing_is_refused_with_what_works_instead():
    """A feature extractor is made by torch.fx."""
    for kind, name in (("ViT", "VisionTransformer"), ("Swin", "SwinTransformer"), ("XCiT", "Xcit")):
        with pytest.raises(PatchStateError, match=rf"torch.fx cannot trace a {name}.* Use torch.export"):
            torch.fx.symbolic_trace(apply(make(kind), 0.6))


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_another_default_dtype_changes_nothing(kind, dtype):
    """torch.set_default_dtype is called somewhere else in the program, for other tensors."""
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model(x)
    with default_dtype(dtype):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["EVA-02", "DINOv3"])
@torch.no_grad()
def test_rotary_models_export_by_tracing(kind):
    """torch.onnx.export without Dynamo, which makes a tensor of a flag on its way through timm."""
    model, x = apply(make(kind, depth=2), {1: 0.6}), images(kind)
    session = onnxruntime.InferenceSession(exported_by_tracing(model, x).SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-4)


class LoRA(nn.Module):
    """A low-rank product beside a linear layer, which shows that layer's weight as its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("kind", ["EVA-02", "BEiT", "Swin V2"])
@torch.no_grad()
def test_a_lora_on_a_layer_whose_biases_timm_keeps_apart_counts_in_merged_blocks(kind):
    """LoRA is put on qkv, with qkv_bias_separate=True, so that timm calls the layer."""
    model, x = make(kind), images(kind)
    folded = copy.deepcopy(model)
    layers = [[m for m in half.modules() if hasattr(m, "qkv_bias_separate")] for half in (model, folded)]
    for attention, other in zip(*layers, strict=True):
        attention.qkv_bias_separate = True
        attention.qkv = LoRA(attention.qkv)
        other.qkv.weight.add_(attention.qkv.up.weight @ attention.qkv.down.weight)
    torch.testing.assert_close(apply(model, 0.6)(x), apply(folded, 0.6)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "DINOv3", "Swin", "ConViT", "TNT"])
@torch.no_grad()
def test_attention_maps_are_extracted_from_every_block(kind):
    """timm's own AttentionExtract hooks attn_drop; attention rollout does the same."""
    model, x = make(kind), images(kind)
    set_fused_attention(model, False)
    unpatched = AttentionExtract(model, method="hook")(x)
    apply(model, 0.6)
    patched = AttentionExtract(model, method="hook")(x)
    assert patched.keys() == unpatched.keys()
    for attention in patched.values():
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=1e-4, atol=1e-4)


def exported_by_tracing(model, x, **options):
    """Return the graph that torch.onnx.export makes without Dynamo."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, **options)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("kind", ["ViT", "Swin", "XCiT"])
@torch.no_grad()
def test_a_model_exported_by_tracing_takes_a_batch_of_any_size(kind):
    """torch.onnx.export without Dynamo, with a dynamic batch."""
    model, x = apply(make(kind), 0.6), images(kind, batch=3)
    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "opset_version": 17}
    session = onnxruntime.InferenceSession(exported_by_tracing(model, x[:2], **options).SerializeToString())
    for some in (x[:1], x):
        (output,) = session.run(None, {"x": some.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(some), rtol=1e-3, atol=1e-4)


def test_attention_without_fused_kernels_exports_without_dropout():
    """A model is exported to ONNX by tracing, with fused attention off, for a runtime that knows no Dropout."""
    model = make()
    set_fused_attention(model, False)
    graph = exported_by_tracing(apply(model, 0.6), images()).graph
    assert "Softmax" in {node.op_type for node in graph.node}
    assert "Dropout" not in {node.op_type for node in graph.node}


class Prompted(torch.nn.Module):
    """Learned prompts in front of the class token, or behind it, in a forward pass written out by hand."""

    def __init__(self, model, before, prompts=6):
        super().__init__()
        torch.manual_seed(9)
        self.model, self.before = model, before
        self.prompts = torch.nn.Parameter(torch.randn(1, prompts, model.embed_dim))

    def forward(self, x):
        tokens = self.model._pos_embed(self.model.patch_embed(x))
        prompts, place = self.prompts.expand(len(x), -1, -1), 0 if self.before else 1
        tokens = torch.cat((tokens[:, :place], prompts, tokens[:, place:]), dim=1)
        tokens = self.model.norm(self.model.blocks(tokens))
        return self.model.head(tokens[:, self.prompts.shape[1] if self.before else 0])


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_prompts_are_noticed_and_where_they_are_declared_never_merged(before):
    x = images()
    with pytest.raises(PatchStateError, match=r"given 71 tokens, where 1 prefix tokens and a grid of 8 x 8"):
        apply(Prompted(make(), before), 0.7)(x)
    expected = Prompted(make(), before)(x)
    plain = (apply(make(), 0.7)(x) - make()(x)).norm()
    prompted = apply(Prompted(make(), before), 0.7, num_prefix_tokens=7)
    assert (prompted(x) - expected).norm() < 3 * plain
    seen = []
    prompted.model.blocks[-1].attn.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    prompted(x)
    assert seen[0] < 7 + 64
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="num_prefix_tokens"):
            apply(make(), 0.7, num_prefix_tokens=wrong)


def no_class_token(model):
    model.cls_token, model.has_class_token, model.num_prefix_tokens = None, False, 0
    model.pos_embed = torch.nn.Parameter(model.pos_embed[:, 1:])


def registers(model):
    model.reg_token = torch.nn.Parameter(torch.zeros(1, 2, model.embed_dim))
    model.num_prefix_tokens, model.no_embed_class = 3, True
    model.pos_embed = torch.nn.Parameter(model.pos_embed[:, 1:])


def another_attention(model):
    model.blocks[2].attn = make().blocks[2].attn


def delete(model):
    del model.blocks[1]


def cut_front(model):
    model.blocks = model.blocks[2:]


def identity(model):
    model.blocks[1] = torch.nn.Identity()


def fresh_block(model):
    model.blocks[0] = make().blocks[0]


def another_grid(model):
    model.patch_embed = make("ViT, any image size", img_size=48, dynamic_img_size=False).patch_embed
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 145, model.embed_dim))


@pytest.mark.parametrize(
    "change",
    [no_class_token, registers, another_attention, delete, cut_front, identity, fresh_block, another_grid],
)
@torch.no_grad()
def test_a_model_that_is_changed_after_apply_says_so_when_it_is_called(change):
    """Layers are pruned, replaced or initialised anew; registers are added, or the class token is taken away."""
    model = apply(make(), 0.6)
    change(model)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(PatchStateError, match=r"was changed since apply.* Apply again"):
            call(images())
    if change is not identity:  # which is no block that anybody knows
        assert apply(model, 0.6) is model


def recomputed(model, x, blocks, **options):
    """Gradients of a forward pass written out by hand, in which somebody else checkpoints some blocks."""
    model.zero_grad()
    tokens = model._pos_embed(model.patch_embed(x))
    for index, block in enumerate(model.blocks):
        tokens = checkpoint(block, tokens, **options) if index in blocks else block(tokens)
    model.forward_head(model.norm(tokens)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("blocks", [(0,), (1, 3), (0, 1, 2, 3)])
def test_blocks_that_others_recompute_have_the_gradients_of_blocks_that_nobody_does(blocks):
    model, x = apply(make().train(), 0.6), images()
    expected = recomputed(model, x, ())
    for _ in range(2):
        torch.testing.assert_close(recomputed(model, x, blocks, use_reentrant=False), expected)
    if blocks == (0,):  # where the pass begins, all that is needed are the tokens
        torch.testing.assert_close(recomputed(model, x, blocks, use_reentrant=True), expected)
    else:
        with pytest.raises(PatchStateError, match="use_reentrant=False"):
            recomputed(model, x, blocks, use_reentrant=True)
    torch.testing.assert_close(recomputed(model, x, ()), expected)


def test_a_segment_of_blocks_can_be_recomputed():
    model, x = apply(make().train(), 0.6), images()
    expected = recomputed(model, x, ())
    model.zero_grad()
    tokens = model._pos_embed(model.patch_embed(x))
    tokens = checkpoint_sequential(list(model.blocks), 2, tokens, use_reentrant=False)
    model.forward_head(model.norm(tokens)).square().sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("first", ["apply", "wrap"])
@pytest.mark.parametrize("kind", ["ViT", "ViT, average", "EVA-02", "Swin", "CaiT", "PiT"])
def test_wrappers_for_activation_checkpointing_train_in_either_order(kind, first):
    def wrap(model):
        adapter = find_adapter(model)
        blocks = {id(block) for block in adapter.blocks(model)}
        apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
        return model

    x = images(kind)
    _, expected = gradients(apply(make(kind).train(), 0.6), x)
    model = make(kind).train()
    model = wrap(apply(model, 0.6)) if first == "apply" else apply(wrap(model), 0.6)
    _, found = gradients(model, x)
    assert len(found) == len(expected)
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_is_called_inside_of_its_own_pass_begins_one_of_its_own():
    """A hook, or a teacher that shares the model, calls it again."""
    model, x, other = apply(make(), 0.6), images(), images(seed=7)
    expected, of_other = model(x), model.forward_features(other)
    inner = []

    def call(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = model.forward_features(other)

    model.blocks[2].mlp.register_forward_hook(call)
    assert torch.equal(model(x), expected)
    assert torch.equal(inner[0], of_other)


@pytest.mark.parametrize("kind", ["ViT", "ViT, average", "EVA-02", "CaiT"])
@torch.no_grad()
def test_hooks_on_blocks_see_the_full_grid_and_others_where_that_is_asked_for(kind):
    """Grad-CAM, retrieval features and dense heads hook the blocks, or a norm inside of one."""
    model, x = apply(make(kind), 0.5), images(kind)
    expected, counts, seen = model(x), [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
        block.register_forward_hook(lambda module, args, output: seen.append(output))
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
        block.attn.register_forward_hook(lambda module, args, output: counts.append(restore(model, output).shape[1]))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    tokens = seen[0].shape[1]
    assert counts == [tokens] * 4 * len(seen)
    if kind != "CaiT":
        grids = model.forward_intermediates(x, intermediates_only=True, norm=False, output_fmt="NLC")
        for output, grid in zip(seen[: len(grids)], grids, strict=True):
            torch.testing.assert_close(output[:, -grid.shape[1] :], grid, rtol=1e-4, atol=1e-4)


def test_grad_cam_on_the_last_norm():
    """Its usual target: the gradient of a class by the patches in front of the last attention layer."""
    model, x = make(), images()
    seen = []
    model.blocks[-1].norm1.register_forward_hook(lambda module, args, output: seen.append(output))
    for rate in (1.0, 1 - 1e-9, 0.5):
        logits = apply(model, rate)(x)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), seen[-1])
        assert gradient.shape == seen[0].shape
        assert gradient[:, 1:].abs().sum() > 0
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    merged = model.blocks[-1].norm1
    merged._forward_hooks.clear()
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    assert model.blocks[-1].norm1 is merged


@pytest.mark.parametrize("kind", ["ViT", "ViT, average", "EVA-02"])
@torch.no_grad()
def test_a_loop_over_blocks_sees_the_full_grid_where_that_is_asked_for(kind):
    """As lightly's models do: every block is called by hand, and what it returns is kept."""
    model, x = apply(make(kind), 0.5), images(kind)
    expected = model.forward_features(x)

    def tokens_by_hand():
        tokens, rope = model.patch_embed(x), None
        tokens = model._pos_embed(tokens)
        if isinstance(tokens, tuple):
            tokens, rope = tokens
        counts = []
        for block in model.blocks:
            tokens = block(tokens) if rope is None else block(tokens, rope=rope)
            counts.append(tokens.shape[1])
        return model.norm(tokens), counts

    with full_grid(model):
        output, counts = tokens_by_hand()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert set(counts) == {expected.shape[1]}
    assert min(tokens_by_hand()[1]) < expected.shape[1]


@torch.no_grad()
def test_hooks_of_torch_itself_do_not_ask_for_the_grid():
    """FSDP2 has hooks on every block, which do not look at tokens."""
    model, counts = apply(make(), {1: 0.5}), []

    def hook(module, args):
        counts.append(args[0].shape[1])

    model.blocks[2].register_forward_pre_hook(hook)
    model(images())
    hook.__module__ = "torch.distributed.fsdp"
    model(images())
    model.blocks[2].register_forward_hook(lambda module, args, output: None)
    model(images())
    assert counts == [65, 33, 65]


def test_a_hook_that_restores_what_comes_before_a_stage_is_told_so():
    model = apply(make(), {2: 0.5, 3: 0.5})
    model.blocks[3].attn.register_forward_hook(lambda module, args, output: restore(model, output[:, :-1]))
    with pytest.raises(PatchStateError, match="The pass under way has 33 tokens, and there are 32"):
        model(images())
    assert torch.equal(restore(make(), torch.ones(1, 2, 3)), torch.ones(1, 2, 3))


@torch.no_grad()
def test_a_hook_that_restores_an_image_of_tokens_is_told_so():
    model = apply(make("CoAtNet"), 0.6)
    model.stages[2].blocks[0].norm2.register_forward_hook(lambda module, args, output: restore(model, output))
    with pytest.raises(PatchStateError, match=r"Tokens are \[B, P \+ K, D\], and these are .* Reshape them"):
        model(images("CoAtNet"))


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 0.5 * weight


def low_rank(model):
    """LoRA by hooks: beside each qkv, whose module stays as it is."""
    torch.manual_seed(3)
    for layer in [module.qkv for module in model.modules() if hasattr(module, "qkv")]:
        weight = 0.05 * torch.randn_like(layer.weight)
        layer.register_forward_hook(lambda module, args, output, weight=weight: output + args[0] @ weight.T)


def parametrized(model):
    for layer in [module.qkv for module in model.modules() if hasattr(module, "qkv")]:
        parametrize.register_parametrization(layer, "weight", Scaled())


def attributed(model):
    """As attribution libraries do: hooks that change what blocks return."""
    for block in find_adapter(model).blocks(model):
        block.register_forward_hook(lambda module, args, output: 1.1 * output)


@pytest.mark.parametrize("kind", ["ViT", "EVA-02", "DeiT, distilled", "Swin"])
@pytest.mark.parametrize("change", [low_rank, parametrized, attributed])
@torch.no_grad()
def test_what_others_hang_on_to_the_layers_counts_in_merged_blocks(kind, change):
    model, x = make(kind), images(kind)
    patched = apply(copy.deepcopy(model), 1 - 1e-9)
    change(model)
    change(patched)
    torch.testing.assert_close(patched(x), model(x), rtol=1e-4, atol=1e-4)
    merged = apply(model, 0.6)(x)
    torch.testing.assert_close(apply(patched, 0.6)(x), merged)


def test_a_parametrization_of_an_attention_layers_own_parameter_is_refused_in_either_order():
    """torch makes another class of the layer, and puts the parametrizations into it as a part."""
    model = make("Swin")
    layer = model.layers[0].blocks[0].attn
    apply(model, 0.6)
    parametrize.register_parametrization(layer, "relative_position_bias_table", Scaled())
    with pytest.raises(PatchStateError, match="Undo that first"):
        remove(model)
    parametrize.remove_parametrizations(layer, "relative_position_bias_table")
    remove(model)
    parametrize.register_parametrization(layer, "relative_position_bias_table", Scaled())
    with pytest.raises(UnsupportedModelError, match="parts that are not known here: parametrizations"):
        apply(model, 0.6)


@pytest.mark.parametrize("kind", ["ViT", "EVA-02", "Swin"])
def test_gradients_of_each_image_are_those_of_the_image_alone(kind):
    """Differential privacy and influence functions take them by vmap over functional_call."""
    model, x = apply(make(kind), 0.6), images(kind)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    alone = grad(loss)(parameters, x[1])
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name][1], gradient, rtol=1e-3, atol=1e-4)
