"""The invariants of token merging, over one model of each kind of each family; `pytest -m sweep` for all of timm."""

import copy
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from checks import COPIES, calls, gradients, onnx_runtime, set_fused_attention, shapes
from families import DIFFERENT, FAMILIES, KINDS, LEFT_OUT, TIMM, fingerprint, images, make, wrap_linears
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from token_merge_plugin import adapters, apply, remove
from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.adapters.base import Patched, PatchedGridModel, PatchedModel
from token_merge_plugin.trial.counting import count_macs

# The families whose blocks each give the whole grid back.
GRIDS = ("swin", "maxxvit", "davit", "gcvit", "nest", "sam", "tnt", "twins", "xcit")

# The oldest timm by which every family is served.
NEWEST_NEEDED = max(map(adapters.numbers, adapters.NEEDS_TIMM.values()))

# Read with a default, or where another attribute says that it is there.
MAY_BE_MISSED = (
    "_checkpoint_wrapped_module",
    "fused_attn",
    "softmax",
    "attn",
    "attn_drop",
    "q_bias",
    "k_bias",
    "v_bias",
    "qkv_bias",
    "qkv_bias_separate",
    "rotate_half",
    "dynamic_mask",
    "get_attn_mask",
    "rel_pos_h",
    "rel_pos_w",
    "legacy",
)

every_kind = pytest.mark.parametrize("kind", KINDS)
# Seconds for each: all of them with `pytest -m sweep`.
different_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in DIFFERENT else pytest.mark.sweep) for kind in KINDS]
)


def test_the_table_has_models_of_every_family():
    lacking = {adapters.FAMILIES[family] for family in adapters.missing}
    assert set(FAMILIES) == set(adapters.FAMILIES.values()) - {"features"} - lacking  # features are of the others


def test_the_newest_timm_is_served_whole():
    """What this package needs of timm is there, and nothing of the table is left out."""
    assert NEWEST_NEEDED > TIMM or not (adapters.missing or LEFT_OUT)


@every_kind
@torch.no_grad()
def test_patched_and_removed(kind):
    """Keep rate 1 is the unpatched model, 0.6 saves, keeps every shape and stays finite, `remove` is bit-exact."""
    model, x = make(kind), images(kind)
    adapter = next(adapter for module in model.modules() if (adapter := find_adapter(module)))
    assert kind in FAMILIES[type(adapter).__module__.rpartition(".")[2]]
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    before, tensors = fingerprint(model), copy.deepcopy(model.state_dict())
    features, output, macs = model.forward_features(x), model(x), count_macs(model, x)
    assert torch.equal(apply(model, 1.0)(x), output)
    assert fingerprint(model) == before

    # The convolutions of a hybrid stay as they are, and its four tokens are rounded up in every stage.
    hybrid = kind == "ViT behind a ResNet"
    assert apply(model, 0.3 if hybrid else 0.6) is model
    assert fingerprint(model) != before
    assert list(model.state_dict()) == before["keys"]
    model.load_state_dict(tensors, strict=True)
    merged_features, merged = model.forward_features(x), model(x)
    assert shapes(merged_features) == shapes(features)
    assert merged.shape == output.shape
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, output)
    if "encoder" not in kind:  # timm's encoders of language models have no head
        torch.testing.assert_close(model.forward_head(merged_features), merged)
    assert count_macs(model, x) < (0.95 if hybrid else 0.9) * macs

    assert remove(model) is model
    assert fingerprint(model) == before
    assert torch.equal(model(x), output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


@every_kind
@torch.no_grad()
def test_stages_that_keep_every_token_give_the_unpatched_output(kind):
    """The patched code runs, and has nothing to merge."""
    model, x = make(kind), images(kind)
    features, output = model.forward_features(x), model(x)
    apply(model, 1 - 1e-9)
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)


@every_kind
@torch.no_grad()
def test_what_is_read_of_a_module_is_declared(kind, monkeypatch):
    """What a timm must have is looked for by `apply`, so that nothing can be missed in a forward pass."""
    model, x = apply(make(kind), 0.6), images(kind)
    undeclared = set()

    def watch(cls):
        mixin = cls._token_merge_parts[0]
        known = {*mixin.parts, *mixin.reads, *dir(mixin), *dir(nn.Module()), "_token_merge", *MAY_BE_MISSED}

        def read(module, name):
            if sys._getframe(1).f_globals["__name__"].startswith("token_merge_plugin.adapters") and name not in known:
                undeclared.add((mixin.__name__, name))
            return super(cls, module).__getattribute__(name)

        monkeypatch.setattr(cls, "__getattribute__", read, raising=False)

    for cls in {type(module) for module in model.modules() if isinstance(module, Patched)}:
        if not issubclass(cls, PatchedModel | PatchedGridModel):  # which adapters look at, too
            watch(cls)
    model(x)
    assert not undeclared


@every_kind
@torch.no_grad()
def test_intermediate_features_keep_their_shapes(kind):
    model, x = make(kind), images(kind)
    if not hasattr(model, "forward_intermediates"):
        pytest.skip(f"timm's {type(model).__name__} has no forward_intermediates")
    prunes = hasattr(model, "prune_intermediate_layers")
    assert prunes or NEWEST_NEEDED > TIMM, "every model of the newest timm does"
    calls = [{}, {"intermediates_only": True}]
    if (
        getattr(model, "num_prefix_tokens", 0)
        and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    ):
        calls.append({"return_prefix_tokens": True})
    expected = [model.forward_intermediates(x, **options) for options in calls]
    apply(model, 0.6)
    results = [model.forward_intermediates(x, **options) for options in calls]
    assert [shapes(result) for result in results] == [shapes(result) for result in expected]
    torch.testing.assert_close(results[0][0], model.forward_features(x))
    if prunes:
        model.prune_intermediate_layers(1)
        assert shapes(model.forward_intermediates(x, intermediates_only=True)[-1]) == shapes(results[1][-1])


@every_kind
@torch.no_grad()
def test_feature_extractors_keep_their_shapes(kind):
    x = images(kind)
    try:
        model = make(kind, features_only=True)
    except RuntimeError as error:
        assert NEWEST_NEEDED > TIMM, "every model of the newest timm has them"
        pytest.skip(f"with timm {timm.__version__}: {error}")
    expected = model(x)
    apply(model, 0.4)  # of a handful of tokens, each stage keeps a little more than it was asked for
    features = model(x)
    assert shapes(features) == shapes(expected)
    assert any(not torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(remove(model)(x), expected, strict=True))


@every_kind
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind):
    # With images of noise, two merges may cost the same but for rounding: not with these.
    model, x = apply(make(kind), 0.6), images(kind, batch=3, seed=2)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


@different_kinds
@torch.no_grad()
def test_compiles_without_a_graph_break_and_without_recompiling_on_equal_shapes(kind):
    torch._dynamo.reset()
    model = apply(make(kind), 0.6)
    inputs = [images(kind, seed=seed) for seed in (1, 5, 1)]
    expected = [model(x) for x in inputs]  # in the first pass, timm's ConViT makes itself a buffer
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close([compiled(x) for x in inputs], expected)
    assert backend.frame_count == 1


@every_kind
def test_copies_are_patched_models_of_their_own(kind):
    model, x = make(kind), images(kind)
    expected, unpatched = model(x), [type(module) for module in model.modules()]
    classes = [type(module) for module in apply(model, 0.6).modules()]
    merged, gradient = gradients(model, x)
    for copied in COPIES.values():
        twin = copied(model)
        assert [type(module) for module in twin.modules()] == classes
        output, found = gradients(twin, x)
        torch.testing.assert_close(output, merged, rtol=0, atol=0)
        torch.testing.assert_close(found, gradient)
        assert torch.equal(remove(twin)(x), expected)
        assert [type(module) for module in twin.modules()] == unpatched
    torch.testing.assert_close(gradients(model, x)[0], merged, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if not kind.startswith(("ConViT", "PiT", "CrossViT", "Twins"))],  # timm's cannot
)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, x = make(kind).train(), images(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not module.inplace:  # in place, timm's TNT cannot be trained
            module.p = 0.1
    model.set_grad_checkpointing(False)
    apply(model, 0.6)
    torch.manual_seed(0)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(model, x), expected)
    for patched in (model, remove(model)):
        assert any(getattr(module, "grad_checkpointing", False) for module in patched.modules())


@every_kind
@torch.no_grad()
def test_attention_with_and_without_fused_kernels_agrees(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    outputs = []
    for fused in (True, False):
        set_fused_attention(model, fused)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_every_module_that_timm_calls_is_called(kind):
    """Hooks see what they saw, and layers that another library has wrapped count: nobody reads a weight behind them."""
    model, x = make(kind), images(kind)
    set_fused_attention(model, False)
    model(x)  # in its first pass, timm's ConViT reads a weight
    expected = apply(copy.deepcopy(model), 0.6)(x)
    unpatched = calls(wrap_linears(model), x)
    patched = calls(apply(model, 0.6), x)
    assert patched.keys() == unpatched.keys()
    matrices = [name for name in unpatched if name.endswith(("attn_drop", "softmax", "rel_pos", "proj_l", "proj_w"))]
    assert [patched[name] for name in matrices] == [unpatched[name] for name in matrices]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@every_kind
@torch.no_grad()
def test_autocast(kind):
    model, x = make(kind), images(kind)
    for dtype in (torch.bfloat16, torch.half):
        with torch.autocast("cpu", dtype):
            expected = remove(model)(x)
            output = apply(model, 0.6)(x)
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        assert torch.isfinite(output).all() or not torch.isfinite(expected).all()  # Swin V2 overflows unpatched, too


@every_kind
@torch.no_grad()
def test_other_precisions(kind):
    original = make(kind)
    for dtype in (torch.bfloat16, torch.half, torch.double):
        if kind == "Hiera, absolute windows" and dtype != torch.double:
            continue  # torch cannot interpolate its positions
        model, x = copy.deepcopy(original).to(dtype), images(kind).to(dtype)
        expected = model(x)
        output = apply(model, 0.6)(x)
        assert (output.shape, output.dtype) == (expected.shape, dtype)
        assert torch.isfinite(output).all() or not torch.isfinite(expected).all()  # Swin V2 overflows unpatched, too


@different_kinds
@torch.no_grad()
def test_exports_with_a_batch_of_any_size(kind):
    model, x = apply(make(kind), 0.6), images(kind, batch=3)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=sizes).module()
    for some in (x[:2], x):
        torch.testing.assert_close(exported(some), model(some), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "CaiT", "VOLO", *(next(iter(FAMILIES[f])) for f in GRIDS if f in FAMILIES)])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of what tracing makes a constant
def test_a_trace_takes_a_batch_of_any_size(kind):
    model, x = apply(make(kind), 0.6), images(kind, batch=3)
    traced = torch.jit.trace(model, x[:2], check_trace=False)
    for some in (x[:1], x):
        torch.testing.assert_close(traced(some), model(some), rtol=1e-4, atol=1e-5)


@every_kind
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_output(kind):
    model, x = make(kind), images(kind)[:0]
    try:
        expected = model(x).shape
    except (RuntimeError, ZeroDivisionError):
        pytest.skip(f"timm's {type(model).__name__} takes no empty batch")
    assert apply(model, 0.6)(x).shape == expected


@every_kind
def test_several_threads_in_one_model_at_once(kind):
    model = apply(make(kind), 0.6)
    inputs = [images(kind, batch=1 + i % 2, seed=i) for i in range(8)]
    work = torch.no_grad()(model)
    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(work, inputs)), expected, rtol=1e-4, atol=1e-5)


def replica(module):
    """What torch.nn.parallel.replicate makes of a module for one device."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = child if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, parameter if parameter is None else parameter.detach().clone())
    return copied


@every_kind
def test_replicas_of_data_parallel_are_patched_in_threads_of_their_own(kind):
    model = apply(make(kind), 0.6)
    inputs = [images(kind, seed=i) for i in range(4)]
    work = torch.no_grad()(lambda x: replica(model)(x))
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        torch.testing.assert_close(list(pool.map(work, inputs)), expected)


# SAM and Hiera do not export to ONNX, unpatched or not.
@pytest.mark.parametrize(
    "kind",
    [
        "ViT",
        "ViT, no class token, average",
        "ViT, differential attention",
        "RoPE ViT, mixed",
        "BEiT",
        "CaiT",
        "Swin",
        "Swin V2",
        "VOLO",
        "XCiT",
    ],
)
def test_onnx_runtime_gives_the_same_output(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    with torch.set_grad_enabled(kind != "BEiT"):  # which exports without gradients only, unpatched, too
        output = onnx_runtime(model, x)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-3, atol=1e-4)
