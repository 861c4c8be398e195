"""What others build on timm, with the real packages: `apply` on the whole object, their own calls, their own files.

Models are small and have random weights. All that these packages build goes through `timm.create_model`.
"""

import re
import runpy
import sys
from pathlib import Path

import lightning
import open_clip
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from checks import EXAMPLES, draw
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from token_merge_plugin import UnsupportedModelError, apply, remove
from token_merge_plugin.adapters.base import Patched
from token_merge_plugin.pipelines import patch_timm
from token_merge_plugin.trial.counting import count_macs

SCRIPTS = sorted((EXAMPLES / "integrations").glob("*.py"))
SIZE = 160  # test_vit's own: 100 image tokens
CLASSES = 3
LABELS = torch.tensor([0, 2])
SMALL_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_vit", num_classes=CLASSES)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def transformers_config(**model_args):
    return TimmWrapperConfig(architecture="test_vit", num_labels=CLASSES, model_args=model_args or None)


def flat(output):
    """Return the tensors of an output of transformers, in their order: loss, logits, hidden states."""
    return [y for value in output.values() for y in (value if isinstance(value, (list, tuple)) else [value])]


def clip(kind=open_clip.CLIP, **vision):
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    vision = vision or {"timm_model_name": "test_vit", "timm_pool": "token"}
    return kind(embed_dim=16, vision_cfg={"image_size": SIZE, **vision}, text_cfg=text)


def dpt(encoder="tu-test_vit", **options):
    return smp.DPT(
        encoder,
        encoder_weights=None,
        decoder_intermediate_channels=(16, 16, 16, 16),
        decoder_fusion_channels=16,
        classes=CLASSES,
        **options,
    )


def unet(encoder="tu-swin_tiny_patch4_window7_224", **options):
    return smp.Unet(encoder, encoder_weights=None, decoder_channels=(16, 16, 8, 8, 4), classes=CLASSES, **options)


def hub_repository(folder, source):
    Path(folder, "hubconf.py").write_text(source)
    return str(folder)


# What builds the object, what calls it (returning a list of tensors), and the height and width of its images.
BUILT_ON_TIMM = {
    "transformers TimmWrapperForImageClassification": (
        lambda: TimmWrapperForImageClassification(transformers_config()),
        lambda model, x: flat(model(x, labels=LABELS, output_hidden_states=True)),
        SIZE,
    ),
    "transformers TimmWrapperForImageClassification, as a tuple": (
        lambda: TimmWrapperForImageClassification(transformers_config()),
        lambda model, x: list(model(x, return_dict=False)),
        SIZE,
    ),
    "transformers TimmWrapperModel": (
        lambda: TimmWrapperModel(transformers_config()),
        lambda model, x: flat(model(x, output_hidden_states=[1, 4])),
        SIZE,
    ),
    "transformers TimmWrapperModel, features only": (
        lambda: TimmWrapperModel(transformers_config(features_only=True, out_indices=(3, 5))),
        lambda model, x: flat(model(x)),
        SIZE,
    ),
    "transformers TimmBackbone": (
        lambda: TimmBackbone(
            TimmBackboneConfig(backbone="test_vit", out_indices=(3, 5), use_pretrained_backbone=False)
        ),
        lambda model, x: flat(model(x)),
        SIZE,
    ),
    "open_clip CLIP": (clip, lambda model, x: [model.encode_image(x, normalize=True)], SIZE),
    "open_clip CustomTextCLIP": (
        lambda: clip(open_clip.CustomTextCLIP, timm_model_name="test_vit", timm_pool="avg", timm_proj="mlp"),
        lambda model, x: [model.encode_image(x), *model.forward_intermediates(x)["image_intermediates"]],
        SIZE,
    ),
    "open_clip PE-Core": (
        lambda: open_clip.create_model("PE-Core-T-16-384", pretrained=None, force_image_size=96),
        lambda model, x: [model.encode_image(x)],
        96,
    ),
    "segmentation_models_pytorch DPT": (dpt, lambda model, x: [model(x)], SIZE),
    "segmentation_models_pytorch Unet": (lambda: unet(**SMALL_SWIN), lambda model, x: [model(x)], 64),
    "LightningModule": (Classifier, lambda model, x: [model(x), model.training_step((x, LABELS), 0)], SIZE),
}
every_package = pytest.mark.parametrize("name", BUILT_ON_TIMM)


def build(name):
    """Return a model in eval mode, a function of it that returns a list of tensors, and images."""
    torch.manual_seed(0)
    make, call, size = BUILT_ON_TIMM[name]
    return make().eval(), torch.no_grad()(call), torch.randn(2, 3, size, size)


def reader_of_images(model):
    """Return the module whose forward takes nothing but images: CLIP's also takes a text, and needs it."""
    return model.visual if hasattr(model, "visual") else model


def assert_equal(outputs, expected):
    for output, original in zip(outputs, expected, strict=True):
        assert torch.equal(output, original)


def is_patched(model):
    return any(isinstance(module, Patched) for module in model.modules())


@every_package
def test_apply_finds_the_vision_transformer_and_keeps_what_the_package_returns(name):
    model, call, x = build(name)
    expected, macs, keys = call(model, x), count_macs(reader_of_images(model), x), list(model.state_dict())
    assert apply(model, 0.7) is model
    outputs = call(model, x)
    assert [y.shape for y in outputs] == [y.shape for y in expected]
    assert all(y.isfinite().all() for y in outputs)
    assert not torch.equal(outputs[-1], expected[-1])
    assert count_macs(reader_of_images(model), x) < 0.9 * macs
    assert list(model.state_dict()) == keys


@every_package
def test_keep_rate_1_returns_what_the_unpatched_model_does(name):
    model, call, x = build(name)
    expected = call(model, x)
    assert_equal(call(apply(model, 1.0), x), expected)


@every_package
def test_remove_restores_the_model_bit_for_bit(name):
    model, call, x = build(name)
    expected, classes = call(model, x), [type(module) for module in model.modules()]
    apply(model, 0.7)
    call(model, x)
    remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("_token_merge" in vars(module) for module in model.modules())
    assert_equal(call(model, x), expected)


@every_package
def test_models_made_within_patch_timm_come_out_patched(name):
    plain, call, x = build(name)
    with patch_timm(0.7):
        model = build(name)[0]
    assert is_patched(model)
    model.load_state_dict(plain.state_dict())
    assert_equal(call(model, x), call(apply(plain, 0.7), x))


# transformers


def test_save_pretrained_of_a_patched_model_is_that_of_the_unpatched_one(tmp_path):
    model, call, x = build("transformers TimmWrapperForImageClassification")
    expected = call(model, x)
    model.save_pretrained(tmp_path / "unpatched")
    apply(model, 0.7).save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "unpatched").iterdir():
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "patched").eval()
    assert type(loaded) is type(model)
    assert_equal(call(loaded, x), expected)
    assert_equal(call(apply(loaded, 0.7), x), call(model, x))


def test_from_pretrained_within_patch_timm_loads_the_weights_into_a_patched_model(tmp_path):
    model, call, x = build("transformers TimmWrapperForImageClassification")
    model.save_pretrained(tmp_path)
    with patch_timm(0.7):
        loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    assert_equal(call(loaded, x), call(apply(model, 0.7), x))


def test_an_image_classification_pipeline_runs_the_patched_model():
    model = apply(build("transformers TimmWrapperForImageClassification")[0], 0.7)
    processor = TimmWrapperImageProcessor(model.timm_model.pretrained_cfg)
    images = [draw(0), draw(1)]
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    answers = classify(images, top_k=CLASSES, batch_size=2)
    with torch.no_grad():
        expected = model(**processor(images)).logits.softmax(1)
    for answer, probabilities in zip(answers, expected, strict=True):
        for entry in answer:
            index = model.config.label2id[entry["label"]]
            assert entry["score"] == pytest.approx(probabilities[index].item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is very new
def test_activation_checkpointing_of_transformers_gives_the_same_gradients():
    model, _, x = build("transformers TimmWrapperForImageClassification")
    apply(model, 0.7).train()
    model(x, labels=LABELS).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    blocks_run = []
    model.timm_model.blocks[2].mlp.register_forward_pre_hook(lambda *_: blocks_run.append(2))
    model.gradient_checkpointing_enable()
    model(x, labels=LABELS).loss.backward()
    assert len(blocks_run) == 2  # once more in the backward pass
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_vit_of_transformers_itself_is_refused():
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match="supported_models"):
        apply(ViTForImageClassification(config), 0.7)


# open_clip


def test_a_clip_model_scores_images_against_texts():
    model, _, x = build("open_clip CLIP")
    texts = torch.randint(1, 100, (3, 8))
    with torch.no_grad():
        expected = model(x, texts)
        image_features, text_features, scale = apply(model, 0.7)(x, texts)
    assert image_features.shape == expected[0].shape
    assert torch.equal(text_features, expected[1])
    assert torch.equal(scale, expected[2])


def test_the_vision_transformer_of_open_clip_itself_is_refused_and_left_as_it_was():
    model = clip(layers=1, width=32, head_width=16, patch_size=16).eval()
    assert type(model.visual) is open_clip.transformer.VisionTransformer
    with pytest.raises(UnsupportedModelError, match="supported_models"):
        apply(model, 0.7)
    assert not is_patched(model)


# segmentation_models_pytorch


def test_a_segmentation_model_serves_images_of_another_size():
    model = dpt("tu-test_vit2").eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert model(x).shape == apply(model, 0.7)(x).shape == (1, CLASSES, 96, 128)


def test_a_segmentation_model_learns_with_merged_tokens():
    model = apply(dpt(), 0.7).train()
    model(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
    for name, parameter in model.encoder.named_parameters():
        if ".blocks." in name:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_an_encoder_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="Unet is no model that is served, and contains none"):
        apply(unet("resnet18"), 0.7)


def test_an_encoder_of_a_family_that_was_looked_at_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match="each MLP has a convolution over the whole grid"):
        apply(unet("tu-pvt_v2_b0"), 0.7)


# Lightning


class MergeTokensInTests(lightning.Callback):
    def on_test_start(self, trainer, module):
        apply(module, 0.7)

    def on_test_end(self, trainer, module):
        remove(module)


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """Return what makes a trainer, in an empty folder where it is to leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def make(*callbacks):
        return lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )

    yield make
    assert not list(tmp_path.glob("**/lightning_logs")) + list(tmp_path.glob("checkpoints"))


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])), batch_size=2)


def trained_by_hand(module, loader):
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(loader):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
    return module


def seeded_classifier():
    torch.manual_seed(0)
    return Classifier()


def test_fit_trains_with_merged_tokens(make_trainer, loader):
    module = apply(seeded_classifier(), 0.7)
    make_trainer().fit(module, loader)
    by_hand = trained_by_hand(apply(seeded_classifier(), 0.7), loader)
    without = trained_by_hand(seeded_classifier(), loader)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(module.model.head.weight, without.model.head.weight, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_a_patched_module_loads_in_the_unpatched_one(make_trainer, loader, tmp_path):
    module = apply(seeded_classifier(), 0.7)
    trainer = make_trainer()
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "patched.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "patched.ckpt", weights_only=True)
    assert not is_patched(loaded)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_predict_runs_the_patched_module(make_trainer, loader):
    module = apply(seeded_classifier(), 0.7)
    predictions = make_trainer().predict(module, loader)
    with torch.no_grad():
        for prediction, (x, _) in zip(predictions, loader, strict=True):
            assert torch.equal(prediction, module(x))


def test_a_callback_merges_tokens_in_tests_and_leaves_training_as_it_is(make_trainer, loader):
    module = seeded_classifier()
    (with_callback,) = make_trainer(MergeTokensInTests()).test(module, loader)
    assert not is_patched(module)
    (without,) = make_trainer().test(module, loader)
    (patched,) = make_trainer().test(apply(module, 0.7), loader)
    assert with_callback == patched != without
    remove(module)
    make_trainer(MergeTokensInTests()).fit(module, loader)
    without_merging = trained_by_hand(seeded_classifier(), loader)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, without_merging.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_a_running_mean_of_the_weights_is_kept_of_a_patched_module(make_trainer, loader):
    module = apply(seeded_classifier(), 0.7)
    make_trainer(EMAWeightAveraging()).fit(module, loader)
    assert is_patched(module)
    assert not torch.equal(module.model.head.weight, seeded_classifier().model.head.weight)


# torch.hub


def test_a_model_of_a_torch_hub_repository_is_served(tmp_path):
    # As in timm's own repository: every model's function is an entry point.
    source = "import timm\nglobals().update(timm.models._registry._model_entrypoints)\n"
    model = torch.hub.load(hub_repository(tmp_path, source), "test_vit", source="local", pretrained=False).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, macs = model(x), count_macs(model, x)
        assert count_macs(apply(model, 0.7), x) < 0.8 * macs
        assert model(x).shape == expected.shape
        assert torch.equal(remove(model)(x), expected)


def test_a_torch_hub_repository_that_calls_create_model_gives_patched_models_within_patch_timm(tmp_path):
    source = "from functools import partial\nimport timm\nclassifier = partial(timm.create_model, 'test_vit')\n"
    with patch_timm(0.7):
        model = torch.hub.load(hub_repository(tmp_path, source), "classifier", source="local", num_classes=CLASSES)
    assert is_patched(model)


# Examples


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs_and_prints_what_it_saved(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    torch.manual_seed(0)
    runpy.run_path(str(example), run_name="__main__")
    (before, after) = re.search(r"([\d.]+) -> ([\d.]+) GMACs", capsys.readouterr().out).groups()
    assert 0 < float(after) < 0.7 * float(before)
    assert not list(tmp_path.iterdir())


def test_every_package_has_an_example():
    names = [path.stem for path in SCRIPTS]
    assert names == [
        "lightning_module",
        "open_clip_tower",
        "segmentation_models",
        "torch_hub",
        "transformers_timm_wrapper",
    ]
