"""Every model of timm: those that are served keep the invariants, the others are refused. `pytest -m sweep`."""

import gc

import pytest
import timm
import torch
from checks import shapes
from families import fingerprint

from token_merge_plugin import UnsupportedModelError, apply, remove, supported_models
from token_merge_plugin.cli.list import on_meta
from token_merge_plugin.trial.counting import count_macs

pytestmark = pytest.mark.sweep

# With more parameters than this, models run with fewer blocks of each kind; they are counted as they are.
LARGE = 120_000_000
SHALLOW = ({"depth": 4}, {"depth": 4, "num_kv_heads": (None, 4, 4, None)}, {"depths": (1, 1, 2, 1)}, {})
# Smaller than the model's own input, where it can be chosen at all; the first that a model takes.
SIZES = ({"img_size": 112}, {"img_size": 128}, {"img_size": 96}, {"img_size": 192}, {})


def small(name, parameters):
    """Build a model, and an image, with the smallest input of `SIZES` that it takes."""
    for depth in SHALLOW if parameters > LARGE else ({},):
        for size in SIZES:
            try:
                model = timm.create_model(name, **size, **depth).eval()
                side = (size["img_size"],) * 2 if size else model.pretrained_cfg["input_size"][1:]
                image = torch.randn(1, 3, *side)
                model(image)
            except (TypeError, AssertionError, RuntimeError, ValueError, IndexError):
                continue
            return model, image
    raise AssertionError(f"{name} does not run at any size")


@pytest.fixture(autouse=True)
def _free_memory():
    """A model that does not take an image size leaves cycles behind, which are large."""
    yield
    gc.collect()


@pytest.fixture
def quick_weights(monkeypatch):
    """Draw weights by copying a few that are random: most of the time would go into drawing them one by one."""
    noise = torch.randn(1_000_003)

    def fill(tensor, scale):
        with torch.no_grad():
            repeats = -(-tensor.numel() // len(noise))
            return tensor.copy_(noise.repeat(repeats)[: tensor.numel()].view(tensor.shape) * scale)

    draw = torch.Tensor.uniform_

    def uniform(tensor, low=0.0, high=1.0, **options):
        if tensor.is_meta or tensor.numel() < len(noise):
            return draw(tensor, low, high, **options)
        return fill(tensor, (high - low) / 12**0.5)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch.Tensor, "erfinv_", lambda tensor: tensor)


@pytest.mark.parametrize("name", supported_models())
@pytest.mark.usefixtures("quick_weights")
@torch.no_grad()
def test_every_supported_model(name):
    model, image = on_meta(name)
    parameters = sum(p.numel() for p in model.parameters())
    full = count_macs(model, image)
    assert count_macs(apply(model, 0.6), image) <= 0.9 * full

    torch.manual_seed(0)
    model, image = small(name, parameters)
    before, tensors = fingerprint(model), [tensor.clone() for tensor in model.buffers()]
    storage = [(p.data_ptr(), p._version) for p in model.parameters()]
    output = model(image)
    assert torch.equal(apply(model, 1.0)(image), output)
    has_intermediates = hasattr(model, "forward_intermediates")
    expected = model.forward_intermediates(image, intermediates_only=True) if has_intermediates else []
    apply(model, 0.6)
    merged = model(image)
    assert shapes(merged) == shapes(output)
    assert torch.isfinite(merged).all()
    if has_intermediates:
        assert shapes(model.forward_intermediates(image, intermediates_only=True)) == shapes(expected)
    remove(model)
    assert fingerprint(model) == before
    assert [(p.data_ptr(), p._version) for p in model.parameters()] == storage
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), tensors, strict=True))
    assert torch.equal(model(image), output)


@pytest.mark.parametrize("name", sorted(set(timm.list_models()) - set(supported_models())))
def test_every_other_model_is_refused_untouched(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=rf"^{type(model).__name__} is no model that is served.*Families"):
        apply(model)
    assert fingerprint(model) == before
