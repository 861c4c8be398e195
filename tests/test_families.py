"""The invariants of token merging, over one model of each kind of each family; `pytest -m sweep` for all of timm."""

import contextlib
import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import onnxruntime
import pytest
import torch
from families import KINDS, fingerprint, images, make

from token_merge_plugin import apply, remove
from token_merge_plugin.trial.counting import count_macs

every_kind = pytest.mark.parametrize("kind", KINDS)


def shapes(output):
    if isinstance(output, torch.Tensor):
        return output.shape
    return [shapes(part) for part in output]


@every_kind
@torch.no_grad()
def test_patched_and_removed(kind):
    """Keep rate 1 is the unpatched model, 0.6 saves, keeps every shape and stays finite, `remove` is bit-exact."""
    model, x = make(kind), images(kind)
    before, tensors = fingerprint(model), copy.deepcopy(model.state_dict())
    features, output, macs = model.forward_features(x), model(x), count_macs(model, x)
    assert torch.equal(apply(model, 1.0)(x), output)
    assert fingerprint(model) == before

    apply(model, 0.6)
    assert list(model.state_dict()) == before["keys"]
    merged = model.forward_features(x)
    assert shapes(merged) == shapes(features)
    assert torch.isfinite(model(x)).all()
    assert model(x).shape == output.shape
    assert not torch.equal(model(x), output)
    if model.num_classes:  # timm's encoders of language models have no head
        assert torch.equal(model.forward_head(merged), model(x))
    assert count_macs(model, x) <= 0.9 * macs

    remove(model)
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
def test_intermediate_features_keep_their_shapes(kind):
    model, x = make(kind), images(kind)
    if not hasattr(model, "forward_intermediates"):
        pytest.skip(f"timm's {type(model).__name__} has no forward_intermediates")
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
    model.prune_intermediate_layers(1)
    assert shapes(model.forward_intermediates(x, intermediates_only=True)[-1]) == shapes(results[1][-1])


@every_kind
@torch.no_grad()
def test_feature_extractors_keep_their_shapes(kind):
    model, x = make(kind, features_only=True), images(kind)
    expected = model(x)
    apply(model, 0.6)
    features = model(x)
    assert shapes(features) == shapes(expected)
    assert any(not torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(remove(model)(x), expected, strict=True))


@every_kind
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind):
    model, x = apply(make(kind), 0.6), images(kind, batch=3)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    model, x = apply(make(kind), 0.6), images(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


@every_kind
def test_copies_pickles_and_checkpoints_alike(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    outputs, gradients = [], []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with contextlib.suppress(AssertionError):  # timm's ConViT has no checkpointing
            other.set_grad_checkpointing(other is model and kind != "CrossViT")  # timm's cannot
        outputs.append(other(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in other.parameters()])
    for output, gradient in zip(outputs, gradients, strict=True):
        torch.testing.assert_close(output, outputs[0])
        for one, first in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(one, first)


@every_kind
@torch.no_grad()
def test_attention_with_and_without_fused_kernels_agrees(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    outputs = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_autocast_and_double_precision(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.shape == expected.shape
    assert torch.isfinite(output).all()
    output = model.double()(x.double())
    assert output.dtype == torch.double
    assert torch.isfinite(output).all()


@every_kind
@torch.no_grad()
def test_exports(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-4)


@every_kind
def test_several_threads_in_one_model_at_once(kind):
    model = apply(make(kind), 0.6)
    inputs = [images(kind, batch=1 + i % 2, seed=i) for i in range(8)]

    def work(x):
        with torch.no_grad():
            return model(x)

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for output, wanted in zip(pool.map(work, inputs), expected, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


# SAM and Hiera do not export to ONNX, unpatched or not.
@pytest.mark.parametrize("kind", ["RoPE ViT, mixed", "BEiT", "CaiT", "Swin", "Swin V2", "VOLO", "XCiT"])
def test_onnx_runtime_gives_the_same_output(kind):
    model, x = apply(make(kind), 0.6), images(kind)
    file = io.BytesIO()
    with torch.set_grad_enabled(kind != "BEiT"):  # which exports without gradients only, unpatched, too
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-3)
