"""One patched ViT in a production pipeline: `test_families.py` has what holds for every kind of model."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks import gradients
from families import DEPTH, images, make
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from token_merge_plugin import PatchStateError, apply, remove


def patched(kind="ViT", **changes):
    return apply(make(kind, **changes), 0.6)


def test_compiles_with_the_default_backend():
    torch._dynamo.reset()
    model = patched()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiles_for_training():
    torch._dynamo.reset()
    model = patched()
    x = images()
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_intermediate_features_compile():
    torch._dynamo.reset()
    model = patched()
    x = images()
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
    x = images()
    with torch.no_grad():
        expected = model(x)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model(x), expected)


def test_a_copy_run_in_the_middle_of_a_pass_does_not_disturb_it():
    model = patched()
    twin = copy.deepcopy(model)
    x, other = images(), images(seed=7)
    with torch.no_grad():
        expected = model(x)
        model.blocks[2].mlp.register_forward_hook(lambda *_: (twin(other), None)[1])
        assert torch.equal(model(x), expected)


def test_hooks_on_attention_layers_and_mlps_run():
    model = apply(make(), 0.6, schedule="equal_rates")
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        block.attn.register_forward_pre_hook(lambda module, args: seen.append("attention"))
    model(images())
    assert seen == ["attention", 65, "attention", 40, "attention", 25, "attention", 16]


def test_several_threads_in_one_model_at_once():
    model = patched()
    inputs = [images(seed=i, batch=1 + i % 3) for i in range(12)]
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


def test_gradient_checkpointing_remembers_the_patch_grid():
    model = apply(make("ViT, any image size").train(), 0.6, multi_scale="importance")
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
        block.attn.register_forward_hook(lambda module, args, output: runs.append(output.shape[1]))
    model(images()).sum().backward()
    assert runs == [65, 65, 65, 33, 33, 65, 65, 65]


def test_every_parameter_gets_a_gradient():
    model = patched().train()
    _, found = gradients(model, images())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_ema_follows_the_patched_model():
    model = patched().train()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ema.update(model)
    x = images()
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
    x = images(batch=2 * world_size)
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
        x = images(batch=2 * world_size)
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
    x = images(batch=2 * world_size)
    reference(x).square().mean().backward()
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5)
    output = model(x).detach()
    for other in ({"keep_rate": 1.0}, {"keep_rate": {2: 0.5}, "multi_scale": "learned"}):
        with pytest.raises(PatchStateError, match="Keep rates may change"):
            apply(model, **other)
    assert torch.equal(model(x).detach(), output)


@pytest.mark.parametrize("check", [check_ddp, check_fsdp, check_new_keep_rate_after_fsdp])
def test_two_processes_give_the_gradients_of_one(check, tmp_path):
    distributed(check, tmp_path)


@torch.no_grad()
def test_dynamic_image_sizes_export():
    model = patched("ViT, any image size")
    side = torch.export.Dim("side", min=2, max=32)
    sizes = {"x": {2: 4 * side, 3: 4 * side}}
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=sizes).module()
    for size in (32, 48, 20):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_dynamic_image_sizes_compile():
    torch._dynamo.reset()
    model = patched("ViT, any image size")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for size in ((32, 32), (32, 48), (16, 16)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))


def test_evaluation_after_training_with_stochastic_depth():
    model = make(drop_path_rate=0.2, proj_drop_rate=0.1).train()
    apply(model, {1: 0.5, DEPTH - 1: 0.5})
    x = images()
    gradients(model, x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
