"""What the tests of several files look at and make: shapes, copies, gradients, other runtimes, programs, pictures."""

import copy
import io
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from token_merge_plugin.trial.runtimes import Contents, TorchExport

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
README = REPOSITORY / "README.md"

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def shapes(output):
    """Return the shapes of the tensors of an output, in lists and dicts as there."""
    if isinstance(output, torch.Tensor):
        return output.shape
    if isinstance(output, dict):
        return {name: shapes(part) for name, part in output.items()}
    return [shapes(part) for part in output]


def tensors(output):
    """Return the tensors of an output, whatever lists and dicts they are in."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


class Kept(TorchExport):
    """Keeps the model as it is, which takes no time: for what is done around the export."""

    def program(self, model, images, dynamic_batch):
        return model

    def save(self, program, path):
        torch.save(program, path)

    def load(self, path):
        model = torch.load(path, weights_only=False)
        return lambda x: tensors(model(x))

    def contents(self, program, path):
        return Contents("kept", {"matmul": 2}, ())


def calls(model, images):
    """Return {name: numbers of dimensions of the tensors given} of the modules that run, for the last call of each."""
    ran = {}

    def note(name):
        return lambda module, args: ran.update({name: [x.dim() for x in args if isinstance(x, torch.Tensor)]})

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    model(images)
    for hook in hooks:
        hook.remove()
    return ran


def set_fused_attention(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def gradients(model, images):
    """Return the output, and the gradient of each parameter that gets one, by name."""
    model.zero_grad()
    output = tensors(model(images))
    sum(tensor.square().sum() for tensor in output).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


def onnx_runtime(model, images):
    """Return what ONNX Runtime makes of the images, with the model exported to it."""
    import onnxruntime  # not at the top: environments of examples/versions.py do without

    file = io.BytesIO()
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)


def equal_patches(patch_size, kinds=5, grid=8, batch=2):
    """Return images of grid x grid patches that are of a few kinds, each at least once, in any order."""
    patches = torch.randn(batch, 3, kinds, patch_size, patch_size)
    which = torch.cat([torch.randperm(kinds), torch.randint(0, kinds, (grid * grid - kinds,))])
    which = which[torch.randperm(grid * grid)].view(grid, grid)
    return patches[:, :, which].permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, grid * patch_size, grid * patch_size)


def random_qkv(batch=2, heads=3, tokens=7, head_dim=4, seed=0):
    """Return queries, keys and values in double precision."""
    return torch.randn(3, batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)).double()


def draw(seed, size=(200, 180)):
    """Return a picture of noise, of this height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def draw_two_classes(folder, number, size):
    """Write pictures of two classes, in a folder for each."""
    for i in range(number):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i, size).save(path)


def run_program(*command, **variables):
    """Run a program to its end, with further environment variables."""
    return subprocess.run(
        [str(part) for part in command], env=os.environ | variables, capture_output=True, text=True, check=False
    )


def contents(model):
    """Everything that `apply` might change, in its order."""
    return [(type(module), list(vars(module).items()), list(module._modules.items())) for module in model.modules()]


def interrupted(call, at, inside, error=KeyboardInterrupt):
    """Call, and raise an error at the `at`-th line that is run of the code that `inside` tells.

    Returns:
        the number of such lines that were run: less than `at`, or `at` itself, where the error was raised.
    """
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not inside(frame.f_code) or lines == at:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise error
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except error:
        assert lines == at
    finally:
        sys.settrace(outer)
    return lines


@contextmanager
def default_dtype(dtype):
    """What a program does that calls torch.set_default_dtype for other tensors."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
