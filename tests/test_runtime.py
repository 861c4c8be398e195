"""The patched model under everything that a production pipeline does to models."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import onnxruntime
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import DEPTH, KINDS, images, make
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from token_merge_plugin import PatchStateError, apply, remove

every_small_kind = pytest.mark.parametrize("kind", KINDS)


def patched(kind="Block", **changes):
    return apply(make(kind, **changes), 0.6)


@every_small_kind
def test_compiles_without_a_graph_break_and_without_recompiling_on_equal_shapes(kind):
    torch._dynamo.reset()
    model = patched(kind)
    x, y = images(model), images(model, seed=5)
    with torch.no_grad():
        expected = model(x), model(y)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        counter = torch._dynamo.testing.CompileCounter()
        counting = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected[0])
            torch.testing.assert_close(compiled(y), expected[1])
            counting(x)
            counting(y)
    assert counter.frame_count == 1


def test_compiles_with_the_default_backend():
    torch._dynamo.reset()
    model = patched()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiles_for_training():
    torch._dynamo.reset()
    model = patched()
    x = images(model)
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_intermediate_features_compile():
    torch._dynamo.reset()
    model = patched()
    x = images(model)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        compiled = torch.compile(
            lambda x: model.forward_intermediates(x, intermediates_only=True), fullgraph=True, backend="aot_eager"
        )
        for a, b in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_blocks_compiled_one_by_one():
    torch._dynamo.reset()
    model = patched()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model(x), expected)


@every_small_kind
def test_exports(kind):
    model = patched(kind)
    x = images(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Block", "no class token, avg", "DiffAttention"])
def test_onnx_runtime_gives_the_same_output(kind):
    model = patched(kind)
    x = images(model)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-4)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_small_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
def test_copies_are_patched_models_of_their_own(kind, copied):
    if kind in ("gated", "DiffAttention, two lambdas", "hybrid") and copied is not copy.deepcopy:
        kind = "Block"  # these classes are made in the test, and cannot be pickled unpatched either
    model = make(kind)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        merged = apply(model, 0.6)(x)
        twin = copied(model)
        assert torch.equal(twin(x), merged)
        assert torch.equal(remove(twin)(x), expected)
        assert torch.equal(model(x), merged)
    assert [type(a) for a in twin.modules()] == [type(a) for a in remove(model).modules()]


def test_a_copy_run_in_the_middle_of_a_pass_does_not_disturb_it():
    model = patched()
    twin = copy.deepcopy(model)
    x, other = images(model), images(model, seed=7)
    with torch.no_grad():
        expected = model(x)
        model.blocks[2].register_forward_hook(lambda *_: (twin(other), None)[1])
        assert torch.equal(model(x), expected)


def test_hooks_on_blocks_and_attention_layers_run():
    model = patched()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        block.attn.register_forward_pre_hook(lambda module, args: seen.append("attention"))
    model(images(model))
    assert seen == ["attention", 65, "attention", 40, "attention", 25, "attention", 65]


def test_several_threads_in_one_model_at_once():
    model = patched()
    inputs = [images(model, seed=i, batch=1 + i % 3) for i in range(12)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    outputs = [None] * len(inputs)
    barrier = threading.Barrier(4)

    def work(first):
        barrier.wait()
        with torch.no_grad():
            for _ in range(5):
                for i in range(first, len(inputs), 4):
                    outputs[i] = model(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)


def replica(module):
    """What torch.nn.parallel.replicate makes of a module for one device."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = child if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, parameter if parameter is None else parameter.detach().clone())
    return copied


@every_small_kind
def test_replicas_of_data_parallel_are_patched_in_threads_of_their_own(kind):
    model = patched(kind)
    inputs = [images(model, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        with ThreadPoolExecutor(len(inputs)) as pool:
            outputs = list(pool.map(torch.no_grad()(lambda x: replica(model)(x)), inputs))
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
@every_small_kind
def test_autocast(kind, dtype):
    model = patched(kind)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            output = model(x)
    assert output.shape == expected.shape
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
@every_small_kind
def test_other_precisions(kind, dtype):
    model = make(kind).to(dtype)
    x = images(model).to(dtype)
    with torch.no_grad():
        expected = model(x)
        output = apply(model, 0.6)(x)
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype
    assert torch.isfinite(output).all()


def gradients(model, x):
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_small_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = make(kind, proj_drop_rate=0.1).train()
    model.set_grad_checkpointing(False)
    apply(model, 0.6)
    x = images(model)
    torch.manual_seed(0)
    output, expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    torch.manual_seed(0)
    checkpointed_output, checkpointed = gradients(model, x)
    torch.testing.assert_close(checkpointed_output, output)
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    assert remove(model).grad_checkpointing


def test_gradient_checkpointing_remembers_the_patch_grid():
    model = apply(make("dynamic").train(), 0.6, multi_scale="importance")
    x = torch.randn(2, 3, 32, 48)
    _, expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    _, checkpointed = gradients(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_gradient_checkpointing_recomputes_every_block():
    model = make().train()
    model.set_grad_checkpointing(True)
    apply(model, {2: 0.5})
    runs = []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, output: runs.append(output.shape[1]))
    model(images(model)).sum().backward()
    assert runs == [65, 65, 33, 33, 33, 33, 65, 65]


def test_every_parameter_gets_a_gradient():
    model = patched().train()
    _, found = gradients(model, images(model))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_ema_follows_the_patched_model():
    model = patched().train()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ema.update(model)
    x = images(model)
    with torch.no_grad():
        assert not torch.equal(ema.module.eval()(x), model.eval()(x))
    remove(ema.module)
    assert list(ema.module.state_dict()) == list(model.state_dict())


def in_a_process_group(rank, world_size, file, check):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    try:
        check(rank, world_size)
        dist.barrier()  # or the first process to end takes the connection from the other
    finally:
        dist.destroy_process_group()


def distributed(check, tmp_path, world_size=2):
    mp.spawn(in_a_process_group, (world_size, tmp_path / "rendezvous", check), nprocs=world_size)


def check_ddp(rank, world_size):
    model = patched().train()
    x = images(model, batch=2 * world_size)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parallel = DistributedDataParallel(model)
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def check_fsdp(rank, world_size):
    for shard_first in (False, True):
        model = make().train()
        if not shard_first:
            apply(model, 0.6)
        x = images(model, batch=2 * world_size)
        reference = patched().train()
        reference(x).square().mean().backward()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        if shard_first:
            apply(model, 0.6)
        model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5)
        if shard_first:
            remove(model)
        else:
            with pytest.raises(PatchStateError, match="Undo that first"):
                remove(model)


def check_new_keep_rate_after_fsdp(rank, world_size):
    model = apply(make().train(), 0.9, multi_scale="learned")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    classes = [type(module) for module in model.modules()]
    reference = apply(make().train(), 0.5, multi_scale="learned")
    reference.load_state_dict({name: p.full_tensor() for name, p in model.state_dict().items()})
    apply(model, 0.5, multi_scale="learned")
    assert [type(module) for module in model.modules()] == classes
    x = images(model, batch=2 * world_size)
    reference(x).square().mean().backward()
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5)
    output = model(x).detach()
    for other in ({"keep_rate": 1.0}, {"keep_rate": {0: 0.5}, "multi_scale": "learned"}):
        with pytest.raises(PatchStateError, match="Keep rates may change"):
            apply(model, **other)
    assert torch.equal(model(x).detach(), output)


@pytest.mark.parametrize("check", [check_ddp, check_fsdp, check_new_keep_rate_after_fsdp])
def test_two_processes_give_the_gradients_of_one(check, tmp_path):
    distributed(check, tmp_path)


def test_dynamic_image_sizes_compile():
    torch._dynamo.reset()
    model = patched("dynamic")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for size in ((32, 32), (32, 48), (16, 16)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))


def test_evaluation_after_training_with_stochastic_depth():
    model = make(drop_path_rate=0.2, proj_drop_rate=0.1).train()
    apply(model, {1: 0.5, DEPTH - 1: 0.5})
    x = images(model)
    gradients(model, x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
