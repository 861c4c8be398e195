"""LV-ViT: the model itself, token merging in it, and in the package that it was published with."""

import importlib
import sys
import types
from functools import partial

import families
import pytest
import timm
import torch
import torch.nn.functional as F
from checks import equal_patches, shapes
from timm.layers import Mlp, resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch import nn

import token_merge_plugin.models.lvvit as lvvit
from token_merge_plugin import UnsupportedModelError, apply, remove
from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.adapters.lvvit import register_lvvit
from token_merge_plugin.trial.counting import count_macs

SMALL = families.KINDS["LV-ViT"][1]
GRID = (8, 8)
make = partial(families.make, "LV-ViT")
images = partial(families.images, "LV-ViT")


def published_shapes(dim, depth, stem):
    """Names and shapes of a published checkpoint, in its order."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim)}
    for i, kernel in ((1, (3, 7, 7)), (2, (stem, 3, 3)), (3, (stem, 3, 3))):
        shapes[f"patch_embed.conv{i}.weight"] = (stem, *kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{i}.{name}"] = (stem,)
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = ()
    shapes |= {"patch_embed.proj.weight": (dim, stem, 8, 8), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        block = {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (3 * dim, dim),
            "mlp.fc1.bias": (3 * dim,),
            "mlp.fc2.weight": (dim, 3 * dim),
            "mlp.fc2.bias": (dim,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    for head in ("head", "aux_head"):
        shapes |= {f"{head}.weight": (1000, dim), f"{head}.bias": (1000,)}
    return shapes


@pytest.mark.parametrize(
    ("name", "dim", "depth", "stem", "heads", "skip_lam", "parameters"),
    [
        ("lvvit_t", 240, 12, 64, 4, 1, 8_534_720),
        ("lvvit_s", 384, 16, 64, 6, 2, 26_151_824),
        ("lvvit_m", 512, 20, 64, 8, 2, 55_830_544),
        ("lvvit_l", 768, 24, 128, 12, 3, 150_021_968),
    ],
)
def test_parameters_have_the_names_and_shapes_of_the_published_ones(
    name, dim, depth, stem, heads, skip_lam, parameters
):
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(published_shapes(dim, depth, stem).items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all((b.attn.num_heads, b.skip_lam) == (heads, skip_lam) for b in model.blocks)


def formula(state, x, heads, skip_lam):
    """The forward pass at inference, from a state dict: images [B, 3, H, W] -> logits [B, classes]."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    for i, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
        x = F.conv2d(x, state[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
        names = [f"patch_embed.bn{i}.{name}" for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *(state[name] for name in names), eps=1e-5))
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    batch, _, dim = x.shape
    x = torch.cat((state["cls_token"].expand(batch, 1, dim), x), dim=1) + state["pos_embed"]
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        block = f"blocks.{i}"
        branches = []
        for projected in linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(dim, dim=2):
            branches.append(projected.unflatten(2, (heads, dim // heads)))
        logits = torch.einsum("bqhd,bkhd->bhqk", branches[0], branches[1]) * (dim // heads) ** -0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=3), branches[2]).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj") / skip_lam
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") / skip_lam
    x = norm(x, "norm")
    return linear(x[:, 0], "head") + 0.5 * linear(x[:, 1:], "aux_head").max(dim=1).values


@torch.no_grad()
@pytest.mark.parametrize("skip_lam", [1.0, 2.0])
def test_the_forward_pass_is_the_formula(skip_lam):
    model = make(skip_lam=skip_lam)
    x = images()
    expected = formula(model.state_dict(), x, heads=2, skip_lam=skip_lam)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_forward_pass_of_lvvit_t_is_the_formula():
    model = families.randomize(timm.create_model("lvvit_t")).eval()
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(x), formula(model.state_dict(), x, 4, 1.0), rtol=1e-4, atol=1e-4)


def test_timm_creates_it():
    model = timm.create_model("lvvit_t", num_classes=7, img_size=(32, 64), in_chans=1, drop_path_rate=0.1, depth=3)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.patch_embed.grid_size == (2, 4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == [0.0, 0.05, 0.1]
    assert model.eval()(torch.randn(2, 1, 32, 64)).shape == (2, 7)
    with pytest.raises(AssertionError, match="made for"):
        model(torch.randn(2, 1, 64, 32))
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert len({group["lr_scale"] for group in groups}) == 5  # embedding, 3 blocks, and what is behind them


@torch.no_grad()
def test_without_a_classifier_it_returns_features():
    model = timm.create_model("lvvit_t", **SMALL | {"num_classes": 0}).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 65, 32)
    assert torch.equal(model(images()), tokens[:, 0])
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    assert model(images()).shape == (2, 3)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), tokens)
    with pytest.raises(ValueError, match="avg"):
        model.reset_classifier(3, "avg")


def test_pretrained_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"No url .* lvvit_s.*checkpoint_path"):
        timm.create_model("lvvit_s", pretrained=True)


def test_a_checkpoint_loads_at_its_own_and_at_another_size(tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(make().state_dict() | {"head.weight": torch.ones(5, 32)}, file)
    loaded = timm.create_model("lvvit_t", checkpoint_path=file, **SMALL)
    state = torch.load(file)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    overlay = {"file": str(file), "num_classes": 5}
    other = timm.create_model(
        "lvvit_t", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL | {"img_size": (64, 160), "num_classes": 3}
    )
    assert torch.equal(other.pos_embed, resample_abs_pos_embed(state["pos_embed"], [4, 10]))
    assert torch.equal(other.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"])
    assert other.head.weight.shape == other.aux_head.weight.shape == (3, 32)
    oblong = timm.create_model("lvvit_t", **SMALL | {"img_size": (64, 160)})
    assert lvvit.checkpoint_filter_fn(oblong.state_dict(), oblong)["pos_embed"].equal(oblong.pos_embed)


@torch.no_grad()
def test_features_only():
    model = timm.create_model("lvvit_t", features_only=True, out_indices=(0, 2), **SMALL).eval()
    assert len(model.model.blocks) == 3
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [16, 16]
    shapes = [(2, 32, *GRID)] * 2
    assert [f.shape for f in model(images())] == shapes
    before = count_macs(model, images())
    apply(model, 0.6)
    assert [f.shape for f in model(images())] == shapes
    assert count_macs(model, images()) < before


def test_training_returns_class_logits_dense_logits_and_the_box():
    torch.manual_seed(0)
    model = make().train()
    logits, dense, box = model(images(3))
    assert logits.shape == (3, 5)
    assert dense.shape == (3, 64, 5)
    assert len(box) == 4
    (logits.sum() + dense.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert make(mix_token=False).train()(images())[2] == (0, 0, 0, 0)
    assert make(return_dense=False).train()(images()).shape == (2, 5)


@torch.no_grad()
def test_mixtoken_swaps_a_box_of_patches_with_the_mirror_image_of_the_batch(monkeypatch):
    box = (1, 2, 5, 8)
    monkeypatch.setattr(lvvit, "random_box", lambda height, width: box)
    model = make().train()
    x = images(3)
    embedded = model.patch_embed(x)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0] - model.pos_embed))
    assert model(x)[2] == box
    patches = seen[0][:, 1:].unflatten(1, GRID)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[1:5, 2:8] = True
    torch.testing.assert_close(patches[:, inside], embedded.flip(0)[:, inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches[:, ~inside], embedded[:, ~inside], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mixtoken_swaps_the_dense_logits_back(monkeypatch):
    monkeypatch.setattr(lvvit, "random_box", lambda height, width: (0, 3, 6, 7))
    mixed, plain = make().train(), make(mix_token=False).train()
    mixed.blocks = plain.blocks = nn.Sequential()
    torch.testing.assert_close(mixed(images(3))[1], plain(images(3))[1])


def test_boxes_lie_in_the_grid_and_follow_the_seed():
    torch.manual_seed(0)
    boxes = [lvvit.random_box(4, 9) for _ in range(300)]
    assert all(0 <= x1 <= x2 <= 4 and 0 <= y1 <= y2 <= 9 for x1, y1, x2, y2 in boxes)
    share = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes) / 36 / 300
    assert 0.15 < share < 0.5
    torch.manual_seed(0)
    assert [lvvit.random_box(4, 9) for _ in range(300)] == boxes


@torch.no_grad()
def test_intermediate_features_keep_their_shapes():
    model = make()
    x = images()
    options = [
        {},
        {"indices": 2, "return_prefix_tokens": True, "output_fmt": "NLC", "norm": True},
        {"indices": [0, 2], "intermediates_only": True, "stop_early": True},
        {"indices": [1], "output_dict": True, "return_prefix_tokens": True},
    ]

    expected = [shapes(model.forward_intermediates(x, **o)) for o in options]
    assert expected[0] == [(2, 65, 32), [(2, 32, *GRID)] * 4]
    assert expected[1] == [(2, 65, 32), [[(2, 64, 32), (2, 1, 32)]] * 2]
    assert expected[2] == [(2, 32, *GRID)] * 2
    assert set(expected[3]) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    apply(model, 0.6)
    assert [shapes(model.forward_intermediates(x, **o)) for o in options] == expected
    torch.testing.assert_close(model.forward_intermediates(x)[0], model.forward_features(x))


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing():
    model = make()
    model.pos_embed.zero_()
    proj = nn.Conv2d(3, 32, 16, stride=16)  # the stem would see the neighbours of a patch
    model.patch_embed.forward = lambda x: proj(x).permute(0, 2, 3, 1)
    x = equal_patches(patch_size=16)
    expected = model(x)
    torch.testing.assert_close(apply(model, {0: 0.5, 1: 0.5, 3: 0.35})(x), expected, rtol=1e-3, atol=1e-4)


def backward(model, x):
    """Return the outputs of training, and the gradients of their sum."""
    torch.manual_seed(0)
    model.zero_grad()
    logits, dense, box = model(x)
    (logits.sum() + dense.square().sum()).backward()
    return logits, dense, box, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_training_with_merged_tokens_has_dense_logits_of_the_full_grid():
    model = make().train()
    x = images(3)
    plain = backward(model, x)
    merged = backward(apply(model, 0.6), x)
    assert [t.shape for t in merged[:2]] == [t.shape for t in plain[:2]]
    assert merged[2] == plain[2]
    assert not torch.equal(merged[0], plain[0])
    assert all(torch.isfinite(gradient).all() for gradient in merged[3].values())
    plan = model._token_merge.plan
    assert plan.current() is None
    assert plan.edge() is None


def test_gradient_checkpointing_gives_the_same_gradients():
    model = make().train()
    x = images()
    for patch in (lambda model: model, lambda model: apply(model, 0.6)):
        patch(model).set_grad_checkpointing(False)
        expected = backward(model, x)[3]
        model.set_grad_checkpointing()
        actual = backward(model, x)[3]
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_that_fails_leaves_nothing_behind(training):
    def fail(*_):
        raise RuntimeError("on purpose")

    model = apply(make(), 0.6).train(training)
    model.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(images())
    plan = model._token_merge.plan
    assert plan.current() is None
    assert plan.edge() is None


def test_lvvit_s_has_the_published_count():
    with torch.device("meta"):
        model = timm.create_model("lvvit_s").eval()
        x = torch.zeros(1, 3, 224, 224)
    assert round(count_macs(model, x) / 1e9, 1) == 6.6
    for schedule, stages in (("equal_rates", [4, 8, 12]), (None, [1, 4, 6, 9])):
        apply(model, 0.7, schedule=schedule)
        assert sorted(model._token_merge.plan.schedule) == stages
        assert count_macs(model, x) / 1e9 <= 4.8


def define_original():
    """Define classes with the names, attributes and methods of the TokenLabeling package's."""

    class Attention(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()
            self.num_heads = num_heads
            self.scale = (dim // num_heads) ** -0.5
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.attn_drop = nn.Dropout(0.0)
            self.proj = nn.Linear(dim, dim)
            self.proj_drop = nn.Dropout(0.0)

        def forward(self, x, padding_mask=None):
            query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = query @ key.mT * self.scale
            if padding_mask is not None:
                logits = logits.masked_fill(padding_mask[:, None, None], float("-inf"))
            out = self.attn_drop(logits.softmax(dim=3)) @ value
            return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    class Block(nn.Module):
        def __init__(self, dim, num_heads, skip_lam):
            super().__init__()
            self.skip_lam = skip_lam
            self.norm1 = nn.LayerNorm(dim)
            self.attn = Attention(dim, num_heads)
            self.drop_path = nn.Identity()
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, 3 * dim)

        def forward(self, x, padding_mask=None):
            x = x + self.drop_path(self.attn(self.norm1(x), padding_mask)) / self.skip_lam
            return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam

    class LV_ViT(nn.Module):
        def __init__(self, img_size, num_classes, embed_dim, depth, num_heads, stem_chs, skip_lam=2.0):
            super().__init__()
            self.patch_embed = lvvit.LVViTPatchEmbed(img_size, 3, embed_dim, stem_chs)
            del self.patch_embed.grid_size  # the original's has none
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
            self.blocks = nn.ModuleList([Block(embed_dim, num_heads, skip_lam) for _ in range(depth)])
            self.norm = nn.LayerNorm(embed_dim)
            self.head = nn.Linear(embed_dim, num_classes)
            self.aux_head = nn.Linear(embed_dim, num_classes)

        def forward_tokens(self, x):
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

        def forward_features(self, x):
            return self.forward_tokens(self.patch_embed(x).flatten(1, 2))

        def forward(self, x):
            x = self.forward_tokens(self.patch_embed(x).flatten(1, 2))
            logits, dense = self.head(x[:, 0]), self.aux_head(x[:, 1:])
            return (logits, dense, (0, 0, 0, 0)) if self.training else logits + 0.5 * dense.max(1)[0]

    return {"Attention": Attention, "Block": Block, "LV_ViT": LV_ViT}


def make_original(module):
    model = module.LV_ViT(**SMALL)
    model.load_state_dict(make().state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def tlt(tmp_path_factory):
    """Import a package in which the module tlt.models.lvvit defines these classes."""
    package = tmp_path_factory.mktemp("site") / "tlt"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / "__init__.py").touch()
    source = f"from {__name__} import define_original\n\nglobals().update(define_original())\n"
    (package / "models" / "lvvit.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        yield importlib.import_module("tlt.models.lvvit")
        for name in ("tlt", "tlt.models", "tlt.models.lvvit"):
            patch.delitem(sys.modules, name)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"multi_scale": "importance"}, {"proportional_attention": False}])
def test_the_original_package_is_served_once_it_is_imported(tlt, options):
    model, x = make_original(tlt), images()
    expected, before = model(x), families.fingerprint(model)
    torch.testing.assert_close(make()(x), expected, rtol=1e-4, atol=1e-4)
    apply(model, 0.6, **options)
    torch.testing.assert_close(model(x), apply(make(), 0.6, **options)(x), rtol=1e-4, atol=1e-4)
    assert model._token_merge.plan.grid_size == GRID
    remove(model)
    assert families.fingerprint(model) == before
    assert torch.equal(model(x), expected)


def test_the_original_package_trains_with_merged_tokens(tlt):
    model = apply(make_original(tlt), 0.6).train()
    expected = backward(apply(make(mix_token=False), 0.6).train(), images())
    actual = backward(model, images())
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-4, atol=1e-4)
    for name, gradient in expected[3].items():
        torch.testing.assert_close(actual[3][name], gradient, rtol=1e-3, atol=1e-4)
    assert model._token_merge.plan.current() is None


@torch.no_grad()
def test_padding_in_the_original_package_does_not_reach_the_other_tokens(tlt):
    model = apply(make_original(tlt), 0.6)
    x = torch.randn(2, 65, 32)
    padding = torch.zeros(2, 65, dtype=torch.bool)
    padding[:, 33:] = True
    outputs = []
    for hidden in (0.0, 5.0):
        y = x.clone()
        y[padding] += hidden
        for block in model.blocks:
            y = block(y, padding)
        outputs.append(y[~padding])
    torch.testing.assert_close(*outputs)


def test_a_copy_of_the_original_under_another_name_is_served_when_told():
    copied = types.ModuleType("my_models.lvvit")
    vars(copied).update(define_original())
    model = make_original(copied)
    with pytest.raises(UnsupportedModelError):
        apply(model, 0.6)
    register_lvvit(copied)
    assert find_adapter(model).family == "LV-ViT"
    assert apply(model, 0.6)(images()).shape == (2, 5)
