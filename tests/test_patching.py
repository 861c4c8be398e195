"""`apply`, `remove` and the registry: what they refuse, and that a refusal changes nothing."""

import ast
import gc
import pickle
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import timm
import torch
from checks import EXAMPLES, contents, interrupted, run_program
from families import DEPTH, images, make
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

import token_merge_plugin
from token_merge_plugin import (
    ConfigError,
    MergeConfig,
    PatchStateError,
    UnsupportedModelError,
    apply,
    patching,
    register_adapter,
    remove,
    supported_models,
)
from token_merge_plugin.adapters import registry, vit
from token_merge_plugin.adapters.base import Patched, known_mixin
from token_merge_plugin.method.multiscale import MultiScaleFusion
from token_merge_plugin.method.state import Plan
from token_merge_plugin.trial.counting import count_macs


def classes(model):
    return [type(module) for module in model.modules()]


def refused(model, error, match, *args, **options):
    """Assert that `apply` raises, and that the model is as it was: patched or not."""
    before, attributes = classes(model), [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(error, match=match):
        apply(model, *args, **options)
    assert classes(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize(
    ("keep_rate", "options"),
    [
        (0, {}),
        (float("nan"), {}),
        ("0.7", {}),
        ((0.7, 0.7), {}),
        ({DEPTH: 0.7}, {}),
        (0.7, {"stages": (0, DEPTH)}),
        (0.7, {"importance": "class"}),
        (0.7, {"no_such_option": 1}),
    ],
)
def test_options_that_are_not_allowed_leave_the_model_as_it_was(keep_rate, options):
    refused(make(), ConfigError, "keep_rate|Block|importance|option", keep_rate, **options)


def test_a_refusal_leaves_a_patched_model_as_it_was_patched():
    model = apply(make(), 0.5)
    x = images()
    expected = model(x)
    place = model.blocks[1]._token_merge
    refused(model, ConfigError, "Block 9 does not exist", {9: 0.5})
    assert model.blocks[1]._token_merge is place
    assert torch.equal(model(x), expected)


def test_class_attention_without_a_class_token_is_refused():
    refused(make("ViT, no class token, average"), ConfigError, "needs a class token", 0.5, importance="class_attention")


def test_class_attention_can_be_asked_for_where_the_class_token_is_not_read():
    model = apply(make("ViT, average"), 0.5, importance="class_attention")
    assert model(images()).shape == (2, 5)


def test_a_model_that_is_not_served_is_refused_by_name_and_the_families_are_listed():
    model = timm.create_model("resnet18")
    refused(model, UnsupportedModelError, r"ResNet is no model that is served.*Families served: ViT and DeiT")


def test_a_feature_extractor_of_a_model_that_is_not_served_is_refused():
    refused(timm.create_model("resnet18", features_only=True), UnsupportedModelError, "FeatureListNet is no model that")


def test_a_part_of_another_timm_is_refused_by_what_it_lacks():
    model = make()
    del model.blocks[1].attn.num_heads
    refused(model, UnsupportedModelError, r"Attention of timm .* it has no num_heads")


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class OfAnotherTimm(Scaled):
    def forward(self, x, mask=None, scale=1.0):
        return x * scale


class MergingScaled(Patched):
    def forward(self, x, scale=1.0):
        return x * scale


def test_a_forward_of_another_timm_is_refused_by_what_it_takes():
    assert known_mixin(Scaled(), {Scaled: MergingScaled}) is MergingScaled
    with pytest.raises(UnsupportedModelError, match=r"OfAnotherTimm .* takes \(mask, scale\), and may take \(scale\)"):
        known_mixin(OfAnotherTimm(), {OfAnotherTimm: MergingScaled})


def test_a_family_that_timm_is_too_old_for_is_refused_with_the_version_that_it_needs(monkeypatch):
    model = timm.create_model("pvt_v2_b0")
    reason = "It needs timm 9.0.0 or newer, and this is 1.0.0."
    monkeypatch.setitem(registry.missing, "timm.models.pvt_v2", reason)
    refused(model, UnsupportedModelError, f"timm.models.pvt_v2 is not served here. {reason}")


def run_with(preparation):
    """Return the families that are missing if timm is another one, and that others are served."""
    program = f"""
import timm
{preparation}
import token_merge_plugin
from token_merge_plugin.adapters import missing
token_merge_plugin.apply(timm.create_model("test_vit"), 0.7)
print(missing)
"""
    done = run_program(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_a_family_whose_timm_is_too_old_is_missing_and_the_others_are_served():
    missing = run_with("timm.__version__ = '1.0.20'")
    assert missing["timm.models.xcit"] == "It needs timm 1.0.21 or newer, and this is 1.0.20."
    assert "timm.models.naflexvit" not in missing


def test_a_family_of_which_timm_has_renamed_a_class_is_missing_and_the_others_are_served():
    missing = run_with("import timm.models.swin_transformer as swin; del swin.WindowAttention")
    assert "WindowAttention" in missing["timm.models.swin_transformer_v2_cr"]


def test_a_family_that_was_looked_at_is_refused_with_the_reason():
    refused(timm.create_model("pvt_v2_b0"), UnsupportedModelError, "PyramidVisionTransformerV2 .* each MLP has a conv")


def test_something_that_is_no_module_is_refused():
    with pytest.raises(UnsupportedModelError, match="'vit' is a str"):
        apply("vit")


def test_a_model_without_blocks_is_refused():
    model = make()
    model.blocks = nn.Sequential()
    refused(model, UnsupportedModelError, "no blocks")


class Strict(Block):
    """A block that takes attributes only while it is made, or none of one name."""

    closed = None

    def __setattr__(self, name, value):
        if self.closed == name:
            raise TypeError(f"{name} is not to be set")
        super().__setattr__(name, value)


@pytest.mark.parametrize("name", ["_token_merge", "__class__"])
@pytest.mark.parametrize("block", range(DEPTH))
def test_a_block_that_takes_no_attributes_leaves_the_model_as_it_was(name, block):
    model = make(block_fn=Strict)
    before = contents(model)
    vars(model.blocks[block])["closed"] = name
    with pytest.raises(TypeError, match="not to be set"):
        apply(model, 0.5)
    del vars(model.blocks[block])["closed"]
    assert contents(model) == before


# The functions of `patching` in which a model may be half patched.
STEPS = ("apply", "remove", "_patch", "_unpatch", "_wrapped_as_before")


def altering(code):
    return code.co_filename == patching.__file__ and code.co_name in STEPS


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda model: apply(model, 0.5, multi_scale="learned"), id="apply"),
        pytest.param(lambda model: apply(model, 1.0), id="apply nothing"),
        pytest.param(remove, id="remove"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_an_interrupt_at_any_step_leaves_the_model_as_it_was(patched, call):
    """While keep rates change, learned fusion is kept with it."""
    model = timm.create_model("test_vit", depth=2)
    if patched:
        apply(model, 0.7, multi_scale="learned", stages=(1,))
    before, step = contents(model), 1
    while interrupted(lambda: call(model), step, altering) == step:
        assert contents(model) == before
        step += 1
    assert step > 5


class OwnForward(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * 2


class OwnName(Block):
    """Another name and no other forward."""


class OwnAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


def test_a_block_with_its_own_forward_is_refused():
    refused(make(block_fn=OwnForward), UnsupportedModelError, "OwnForward is no block .* forward of its own")


def test_an_attention_layer_with_its_own_forward_is_refused():
    refused(make(attn_layer=OwnAttention), UnsupportedModelError, "OwnAttention is no block or attention layer")


def test_a_block_class_that_is_not_known_is_refused_even_if_only_one_is_of_it():
    model = make()
    model.blocks[DEPTH - 1] = nn.Identity()
    refused(model, UnsupportedModelError, "Identity is no block")


def test_a_block_with_a_part_that_is_not_known_is_refused():
    model = make()
    model.blocks[0].adapter = nn.Linear(32, 32)
    refused(model, UnsupportedModelError, "parts that are not known here: adapter")


def test_a_forward_replaced_on_the_instance_is_refused():
    model = make()
    model.blocks[2].forward = model.blocks[2].forward
    refused(model, UnsupportedModelError, "was replaced on the instance")


def test_a_subclass_without_its_own_forward_is_served():
    model = apply(make(block_fn=OwnName), 0.5)
    assert model(images()).shape == (2, 5)
    remove(model)
    assert type(model.blocks[2]) is OwnName


def test_a_compiled_model_is_refused():
    compiled = torch.compile(make())
    refused(compiled, PatchStateError, "is compiled")
    model = make()
    model.compile()
    refused(model, PatchStateError, "is compiled")


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PatchStateError, match="scripted"):
        apply(model, 0.5)


@pytest.mark.parametrize("first", [None, 0.5])
@pytest.mark.parametrize("call", [apply, remove])
def test_a_model_in_the_middle_of_a_forward_pass_is_refused(first, call):
    model = make()
    if first:
        apply(model, first)
    x = images()
    expected = model(x)
    seen = []

    def hook(*_):
        with pytest.raises(PatchStateError, match="middle of a forward pass"):
            call(model)
        seen.append(True)

    handle = model.blocks[2].mlp.register_forward_hook(hook)
    assert torch.equal(model(x), expected)
    assert seen
    handle.remove()
    call(model)  # and when it has returned, it works


@pytest.mark.parametrize("undo", [False, True])
def test_a_patched_model_is_freed_with_its_last_reference(undo):
    model = apply(make(), 0.5)
    model(images())
    if undo:
        remove(model)
    reference = weakref.ref(model)
    gc.disable()  # without waiting for it to find cycles
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_forward_pass_in_another_thread_is_noticed():
    model = make()
    inside, go_on = threading.Event(), threading.Event()

    def hook(*_):
        inside.set()
        go_on.wait(60)

    model.blocks[0].register_forward_hook(hook)
    thread = threading.Thread(target=model, args=(images(),))
    thread.start()
    try:
        assert inside.wait(60)
        refused(model, PatchStateError, "middle of a forward pass")
    finally:
        go_on.set()
        thread.join()


def test_remove_without_apply_and_twice_is_without_effect():
    model = make()
    before = classes(model)
    assert remove(model) is model
    remove(remove(apply(model, 0.5)))
    assert classes(model) == before


def test_apply_again_plans_anew():
    model = make()
    x = images()
    fresh = apply(make(), 0.5)(x)
    assert torch.equal(apply(apply(model, 0.9), 0.5)(x), fresh)
    assert type(model.blocks[1]).__mro__.count(vit.MergingBlock) == 1
    before = classes(make())
    assert classes(apply(model, 1.0)) == before


def test_a_config_is_accepted_and_options_override_it():
    model = make()
    x = images()
    config = MergeConfig(0.5, similarity="keys")
    expected = apply(model, 0.5, similarity="keys", importance="uniform")(x)
    assert torch.equal(apply(model, config, importance="uniform")(x), expected)


def test_models_inside_a_larger_module_are_found():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.other, self.head = make(), make("ViT, no class token, average"), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.image(x) + self.other(x))

    model = Wrapper()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    apply(model, 0.5)
    assert isinstance(model.image.blocks[3], vit.MergingBlock)
    assert isinstance(model.other.blocks[3], vit.MergingBlock)
    assert model(x).shape == (2, 2)
    assert not torch.equal(model(x), expected)
    assert torch.equal(remove(model)(x), expected)


def test_a_failed_forward_pass_leaves_nothing_behind():
    model = apply(make(), 0.5)
    x = images()
    expected = model(x)

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.blocks[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x)
    handle.remove()
    assert model._token_merge.plan.current() is None
    assert torch.equal(model(x), expected)


def test_a_pass_given_up_half_way_does_not_reach_the_next_one():
    model = apply(make(), 0.5)
    x = images()
    expected = model(x)
    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks[:3]:
        tokens = block(tokens)
    assert torch.equal(model(x), expected)


def test_a_block_called_on_its_own_is_an_unpatched_block():
    model = make()
    x = torch.randn(1, 10, 32)
    expected = model.blocks[2](x)
    apply(model, 0.5)
    assert torch.equal(model.blocks[2](x), expected)


def test_supported_models_are_timms_names_of_the_families():
    names = supported_models()
    assert {"deit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"} <= set(names)
    assert "resnet18" not in names
    assert names == sorted(names)


def test_an_adapter_from_outside_the_package_serves_a_class_that_nobody_here_knows():
    from custom_model import CustomViT

    model = CustomViT().eval()
    x = torch.randn(2, 3, 32, 32)
    refused(model, UnsupportedModelError, "CustomViT is no model that is served")
    expected, macs = model(x), count_macs(model, x)
    import custom_adapter

    try:
        assert apply(model, 0.5)(x).shape == expected.shape
        assert not torch.equal(model(x), expected)
        assert count_macs(model, x) < 0.7 * macs
        assert apply(model, 0.5)._token_merge.plan.num_class_tokens == 1
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        assert torch.equal(remove(model)(x), expected)
        assert "Custom ViT" in [adapter.family for adapter in registry.registered_adapters()]
    finally:
        del registry._registry[CustomViT]
    code = Path(custom_adapter.__file__).read_text()
    assert len(code.splitlines()) < 40
    assert code in (EXAMPLES / "README.md").read_text()


def test_the_nearest_registered_class_decides():
    class Mine(VisionTransformer):
        pass

    @register_adapter(Mine)
    class MineAdapter(vit.VisionTransformerAdapter):
        family = "mine"

    try:
        assert isinstance(registry.find_adapter(Mine(depth=1, embed_dim=8, num_heads=1)), MineAdapter)
        assert not isinstance(registry.find_adapter(make()), MineAdapter)
    finally:
        del registry._registry[Mine]


def test_every_error_of_the_package_has_the_common_base():
    for name in token_merge_plugin.__all__:
        thing = getattr(token_merge_plugin, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            assert issubclass(thing, token_merge_plugin.TokenMergeError)


@torch.no_grad()
def test_a_model_that_was_pickled_by_version_0_1_0_names_modules_that_have_moved_and_loads(monkeypatch):
    model, x = apply(make(), 0.6, multi_scale="learned"), images()
    expected = model(x)
    for cls in (Plan, MultiScaleFusion):
        former = cls.__module__.replace(".method.", ".")
        assert former != cls.__module__
        monkeypatch.setattr(cls, "__module__", former)
    pickled = pickle.dumps(model)
    monkeypatch.undo()
    assert b"token_merge_plugin.state" in pickled
    assert b"token_merge_plugin.multiscale" in pickled
    assert torch.equal(pickle.loads(pickled)(x), expected)
