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
from checks import run_program, set_fused_attention, shapes
from families import FAMILIES, images, make
from timm.models.vision_transformer import VisionTransformer
from timm.utils import AttentionExtract
from torch import nn

from token_merge_plugin import PatchStateError, UnsupportedModelError, apply, remove
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
    with pytest.raises(PatchStateError, match=r"torch.fx cannot trace a VisionTransformer.* Use torch.export"):
        torch.fx.symbolic_trace(apply(make(), 0.6))


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_another_default_dtype_changes_nothing(kind, dtype):
    """torch.set_default_dtype is called somewhere else in the program, for other tensors."""
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model(x)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


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
