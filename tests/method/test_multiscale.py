"""Multi-scale fusion: of means, and learned, by parameters that start at nothing and are trained with the model."""

import copy

import pytest
import timm
import torch
from checks import COPIES
from families import images, make

from token_merge_plugin import ConfigError, apply, remove
from token_merge_plugin.method.multiscale import LEARNED_SCALES, SCALES, MultiScaleFusion, fuse

OPTIONS = {"multi_scale": "learned", "keep_rate": 0.6}


def test_multi_scale_fusion_is_the_mean_of_a_patch_and_of_its_neighbourhoods():
    height, width = 4, 6
    features = torch.randn(2, height * width, 3)
    fused = fuse(features, (height, width)).reshape(2, height, width, 3)
    grid = features.reshape(2, height, width, 3)
    for y in range(height):
        for x in range(width):
            means = [grid[:, y, x]]
            for scale in SCALES:
                r = scale // 2
                square = grid[:, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
                means.append(square.flatten(1, 2).mean(1))
            torch.testing.assert_close(fused[:, y, x], torch.stack(means).mean(0))


def test_multi_scale_fusion_leaves_a_constant_map_as_it_is():
    features = torch.ones(1, 20, 2) * torch.tensor([1.0, -3.0])
    torch.testing.assert_close(fuse(features, (4, 5)), features)


def fusion_of(model):
    return next(module for module in model.modules() if isinstance(module, MultiScaleFusion))


def trained(model):
    torch.manual_seed(0)
    torch.nn.init.normal_(fusion_of(model).gates)
    return model


@pytest.mark.parametrize("kind", ["BEiT", "RoPE ViT, axial", "CaiT", "ConViT", "relative position, class token"])
def test_it_starts_exactly_at_the_training_free_model(kind):
    model, x = make(kind), images(kind)
    with torch.no_grad():
        expected = apply(model, 0.6, schedule="equal_rates")(x)
        assert torch.equal(apply(model, **OPTIONS)(x), expected)
        assert not torch.allclose(trained(model)(x), expected)


def test_tokens_are_fused_as_by_hand():
    torch.manual_seed(0)
    fusion = MultiScaleFusion(4)
    torch.nn.init.normal_(fusion.gates)
    tokens = torch.randn(2, 15, 4)
    fused = fusion(tokens, (3, 5))
    for row in range(3):
        for column in range(5):
            expected = tokens[:, row * 5 + column].clone()
            for gate, conv, size in zip(fusion.gates, fusion.convs, LEARNED_SCALES, strict=True):
                total = conv.bias.expand(2, -1).clone()
                for i in range(3):
                    for j in range(5):
                        a, b = i - row + size // 2, j - column + size // 2
                        if 0 <= a < size and 0 <= b < size:
                            total += conv.weight[:, 0, a, b] * tokens[:, i * 5 + j]
                expected += gate * total
            assert torch.allclose(fused[:, row * 5 + column], expected, atol=1e-5)


def test_parameters_have_one_prefix_and_are_gone_after_remove():
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply(model, **OPTIONS)
    new = [name for name in model.state_dict() if name not in before]
    assert len(new) == 1 + 2 * len(LEARNED_SCALES)
    assert len({name.split("token_merge_fusion")[0] for name in new}) == 1
    remove(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_parameters_can_be_saved_alone_and_load_with_the_rest():
    model, x = trained(apply(make(), **OPTIONS)), images()
    alone = {name: value for name, value in model.state_dict().items() if "token_merge_fusion" in name}
    other = apply(make(), **OPTIONS)
    other.load_state_dict(alone, strict=False)
    whole = apply(make(seed=1), **OPTIONS)
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(whole(x), model(x))


def test_applying_again_keeps_what_was_learned_and_a_failed_call_does_too():
    model, x = trained(apply(make(), **OPTIONS)), images()
    fusion = fusion_of(model)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(ConfigError):
            apply(model, {99: 0.5}, multi_scale="learned")
        assert torch.equal(model(x), expected)
        apply(model, {1: 0.5}, multi_scale="learned")
        assert fusion_of(model) is fusion
        assert model.blocks[1].token_merge_fusion is fusion
        assert torch.equal(apply(model, **OPTIONS)(x), expected)
    apply(model, 0.6)
    assert not any(isinstance(module, MultiScaleFusion) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter(checkpointing):
    model = apply(make(), **OPTIONS).train()
    model.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the gates first: as long as they are zero, the convolutions have no effect
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fusion_of(model).parameters())


@pytest.mark.parametrize("options", [{}, {"multi_scale": "learned"}, {"method": "tome"}, {"method": "prune"}])
def test_gradients_are_those_of_finite_differences(options):
    torch.manual_seed(0)
    model = apply(make().double(), 0.6, **options).train()
    x = images().double()
    if options.get("multi_scale") == "learned":
        trained(model)
    model(x).square().sum().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(parameters) == len(list(model.parameters()))
    step = 1e-6
    for parameter in parameters:
        direction = torch.randn_like(parameter)
        sums = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # there, to the other side, and back
                parameter += sign * step * direction
                sums.append(model(x).square().sum().item())
        numeric = (sums[0] - sums[1]) / (2 * step)
        analytic = (parameter.grad * direction).sum().item()
        assert numeric == pytest.approx(analytic, rel=1e-4, abs=1e-4)


def test_copies_pickles_and_compiles():
    model, x = trained(apply(make(), **OPTIONS)), images()
    with torch.no_grad():
        expected = model(x)
        for copied in COPIES.values():
            assert torch.equal(copied(model)(x), expected)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        exported = torch.export.export(copy.deepcopy(model), (x,))
        assert torch.allclose(exported.module()(x), expected, atol=1e-5)


def test_dense_outputs_keep_their_shapes():
    model, x = make(), images()
    shapes = [y.shape for y in model.forward_intermediates(x)[1]]
    trained(apply(model, **OPTIONS))
    assert [y.shape for y in model.forward_intermediates(x)[1]] == shapes


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pit_ti_224", "hiera_tiny_224"])
def test_a_model_without_one_grid_of_one_width_is_refused(name):
    model = timm.create_model(name)
    with pytest.raises(ConfigError, match="multi_scale='learned'"):
        apply(model, 0.7, multi_scale="learned")
