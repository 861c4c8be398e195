"""Random models, options and orders of calls, against the slow reference of `reference.py`."""

import copy
import pickle
import random
import time

import numpy as np
import pytest
import reference
import torch
from checks import gradients
from families import randomize
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from token_merge_plugin import ConfigError, apply, config_of, remove

# Importance and costs are in single precision: where two numbers are as close as this, either may be the larger one.
CLOSE = 9e-7


def random_vit(rng):
    """Return a tiny ViT in double precision, and its numbers of prefix and class tokens and its patch grid."""
    grid = (rng.randint(2, 7), rng.randint(2, 7))
    heads, class_token = rng.choice((1, 2, 3)), rng.random() < 0.7
    distilled = class_token and rng.random() < 0.2
    registers = 0 if distilled else rng.choice((0, 0, 1, 3))
    pools = ["avg", "max", "avgmax", ""] + ["token"] * 4 * class_token + ["map"] * (not class_token)
    options = {
        "img_size": (2 * grid[0], 2 * grid[1]),
        "patch_size": 2,
        "embed_dim": heads * rng.choice((4, 6)),
        "num_heads": heads,
        "depth": rng.randint(1, 5),
        "mlp_ratio": 2,
        "num_classes": 3,
        "qkv_bias": rng.random() < 0.8,
        "qk_norm": rng.random() < 0.3,
        "init_values": rng.choice((None, 0.5)),
        "pre_norm": rng.random() < 0.2,
    }
    if distilled:
        model = VisionTransformerDistilled(**options)
    else:
        options |= {"class_token": class_token, "reg_tokens": registers, "global_pool": rng.choice(pools)}
        model = VisionTransformer(**options | {"no_embed_class": rng.random() < 0.3})
    randomize(model)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(12)  # so that attention has favourites
    class_tokens = int(class_token) + int(distilled)
    return model.double().eval(), (class_tokens + registers, class_tokens, grid)


def random_options(rng, depth, class_tokens):
    """Return options of `apply` that are allowed."""

    def rate():
        return rng.choice((rng.uniform(0.05, 1), rng.choice((0.1, 0.25, 0.5, 0.6, 0.7, 0.9, 1.0, 1 - 1e-9))))

    methods = ["tome", "late_tome", "random"] + ["evit", "ppt", "prune"] * bool(class_tokens)
    method = "merge" if rng.random() < 0.5 else rng.choice(methods)
    options = {"keep_rate": rate(), "method": method}
    blocks = sorted(rng.sample(range(depth), rng.randint(1, depth)))
    shape = rng.choice(("one", "one", "stages", "tuple", "mapping"))
    if shape in ("stages", "tuple"):
        options["stages"] = tuple(blocks)
    if shape == "tuple":
        options["keep_rate"] = tuple(rate() for _ in blocks)
    elif shape == "mapping":
        options["keep_rate"] = {block: rate() for block in blocks}
    elif method == "tome" and rng.random() < 0.5:
        options |= {"r": rng.randint(0, 8)}
        del options["keep_rate"]
    if method == "merge":
        options["importance"] = rng.choice(["auto", "uniform"] + ["class_attention"] * bool(class_tokens))
        options["similarity"] = rng.choice(("tokens", "mean_keys", "keys", "values"))
        options["multi_scale"] = rng.choice(("off", "off", "importance", "descriptors", "learned"))
        if shape in ("one", "stages"):
            options["schedule"] = rng.choice((None, "equal_rates", "equal_numbers"))
    if method in ("merge", "tome", "late_tome", "ppt"):
        options["proportional_attention"] = rng.random() < 0.8
    return options


class Case:
    """A model that is patched, changed and called in a random order, and what it should be by now.

    Attributes:
        options: by which the model is patched now, or None.
        known: what the reference makes of the images, once it was asked since the options changed.
        calls: what was done, for the message of a failure.
        close: comparisons that failed where a decision was too close to call.
    """

    def __init__(self, seed):
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.model, self.tokens = random_vit(self.rng)
        self.twin = copy.deepcopy(self.model)
        self.images = torch.randn(self.rng.randint(1, 2), 3, *(2 * side for side in self.tokens[2])).double()
        self.options = self.known = None
        self.calls = [f"seed {seed}", f"prefix tokens, class tokens, grid: {self.tokens}"]
        self.close = 0

    def run(self):
        steps = [self.apply, self.apply, self.apply, self.remove, self.refuse, self.mode, self.copy, self.checkpointing]
        looks = [self.forward, self.forward_features, self.forward_intermediates, self.last_layer, self.backward]
        try:
            self.apply()
            for _ in range(self.rng.randint(0, 3)):
                self.rng.choice(steps)()
                self.rng.choice(looks)()
            for look in self.rng.sample(looks, 2):
                look()
        except Exception as error:
            raise AssertionError("\n".join(self.calls)) from error

    # What changes the model.

    def apply(self):
        self.known, self.options = None, random_options(self.rng, len(self.model.blocks), self.tokens[1])
        self.calls.append(f"apply {self.options}")
        assert apply(self.model, **self.options) is self.model

    def remove(self):
        self.calls.append("remove")
        self.options = self.known = None
        remove(self.model)
        assert list(self.model.state_dict()) == list(self.twin.state_dict())
        assert [type(module) for module in self.model.modules()] == [type(module) for module in self.twin.modules()]

    def refuse(self):
        self.calls.append("refuse")
        before = config_of(self.model)
        with pytest.raises(ConfigError):
            apply(self.model, {len(self.model.blocks): 0.5})
        assert config_of(self.model) is before

    def mode(self):
        training = self.rng.random() < 0.5
        self.calls.append(f"train {training}")
        self.model.train(training)

    def copy(self):
        self.calls.append("copy")
        self.model = self.rng.choice((copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))(self.model)

    def checkpointing(self):
        enable = self.rng.random() < 0.7
        self.calls.append(f"checkpointing {enable}")
        self.model.set_grad_checkpointing(enable)

    # What looks at it.

    def expected(self):
        """Return the normalised tokens [B, P + N, C], and those behind each block."""
        if self.known is None:
            passes = [reference.run(self.twin, image, self.options, *self.tokens) for image in self.images]
            self.least = min(least for _, least in passes)
            behind = [torch.from_numpy(np.stack(of_block)) for of_block in zip(*(b for b, _ in passes), strict=True)]
            with torch.no_grad():
                self.known = self.twin.norm(behind[-1]), behind
        return self.known

    def compare(self, found, expected):
        self.calls[-1] += f" (closest decision {self.least:.1e})"
        try:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        except AssertionError:
            if self.least > CLOSE:
                raise
            self.close += 1

    def forward(self):
        self.calls.append("forward")
        with torch.no_grad():
            output = self.model(self.images)
            self.compare(output, self.twin.forward_head(self.expected()[0]))
            if self.options is None:
                assert torch.equal(output, self.twin(self.images))

    def forward_features(self):
        self.calls.append("forward_features")
        with torch.no_grad():
            self.compare(self.model.forward_features(self.images), self.expected()[0])

    def forward_intermediates(self):
        self.calls.append("forward_intermediates")
        with torch.no_grad():
            last, behind = self.model.forward_intermediates(self.images, output_fmt="NLC", return_prefix_tokens=True)
        expected, each = self.expected()
        prefix = self.tokens[0]
        self.compare(last, expected)
        if prefix:
            behind = [torch.cat((of_prefix, of_patches), dim=1) for of_patches, of_prefix in behind]
        self.compare(behind, each)

    def last_layer(self):
        self.calls.append("get_intermediate_layers")
        with torch.no_grad():
            found = self.model.get_intermediate_layers(self.images, n=1, norm=True)[0]
        self.compare(found, self.expected()[0][:, self.tokens[0] :])

    def backward(self):
        self.calls.append("backward")
        output, found = gradients(self.model, self.images)
        plain = copy.deepcopy(self.model)
        plain.set_grad_checkpointing(False)
        torch.testing.assert_close(found, gradients(plain, self.images)[1])
        with torch.no_grad():
            self.compare(output[0].detach(), self.twin.forward_head(self.expected()[0]))


@pytest.mark.parametrize("seed", range(40))
def test_a_random_model_is_what_the_reference_says(seed):
    Case(seed).run()


@pytest.mark.sweep
def test_many_random_models_are_what_the_reference_says(record_property):
    begin, failed, close = time.perf_counter(), [], 0
    seeds = range(1000, 2000)
    for seed in seeds:
        case = Case(seed)
        try:
            case.run()
        except AssertionError as error:
            failed.append(str(error))
        close += case.close
    name = f"random models against the reference, {close} too close to call"
    record_property("figures", (name, len(seeds), time.perf_counter() - begin, len(failed)))
    assert not failed, "\n\n".join(failed[:5])
    assert close < len(seeds) / 100
