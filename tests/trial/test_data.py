"""Models and images through timm's functions: what is read, what is refused, and that timm would get the same."""

import io
import sys
import tarfile
import warnings

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from checks import draw
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import save_for_hf

from token_merge_plugin import ConfigError, DataError, UnsupportedModelError
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.errors import MissingExtraError
from token_merge_plugin.trial.data import open_data
from token_merge_plugin.trial.models import data_config, load_model


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_model("test_vit", pretrained=False, num_classes=4)


@pytest.fixture(scope="module")
def config(model):
    return data_config(model)


@pytest.fixture
def folder(tmp_path):
    """Eleven images of several shapes and colour modes in four classes, `class_10` after `class_9`."""
    for i in range(11):
        path = tmp_path / f"class_{(i % 4) + 7}" / f"image_{i}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        image = draw(i, (150 + 20 * i, 300 - 10 * i))
        image.convert("L" if i == 3 else "P" if i == 5 else "RGB").save(path)
    return tmp_path


def opened(source, config, **options):
    return open_data(source, config, **({"batch_size": 4, "workers": 0} | options))


def collected(data, **options):
    """Return all images, labels and indices of one pass."""
    batches = list(data.batches(**options))
    return tuple(torch.cat([batch[field] for batch in batches]) for field in range(3))


def damage(folder):
    """Make four of the images unreadable; return their names as the data should give them."""
    (folder / "class_7" / "image_0.jpg").write_text("not an image")
    (folder / "class_8" / "image_1.png").write_bytes(b"")
    truncated = folder / "class_9" / "image_2.jpg"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    png = folder / "class_10" / "image_7.png"
    raw = bytearray(png.read_bytes())
    raw[60:5000] = b"\x07" * 4940  # a decoder's error, not the file system's
    png.write_bytes(bytes(raw))
    return {"class_7/image_0.jpg", "class_8/image_1.png", "class_9/image_2.jpg", "class_10/image_7.png"}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_a_model_is_created_by_name_in_eval_mode():
    model = load_model("test_vit", pretrained=False, num_classes=7, img_size=64, in_chans=1)
    assert not model.training
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_an_image_size_reaches_only_models_that_are_built_for_one():
    fixed = load_model("deit_tiny_patch16_224", pretrained=False, img_size=64)
    assert data_config(fixed)["input_size"] == (3, 64, 64)
    with pytest.raises(ConfigError, match=r"96.*requires \(64, 64\)"):
        data_config(fixed, img_size=96)
    for name in ("test_vit", "test_efficientnet"):
        model = load_model(name, pretrained=False, img_size=64)
        assert data_config(model, img_size=96)["input_size"] == (3, 96, 96)


def test_a_deprecated_name_keeps_the_settings_of_its_weights():
    with pytest.warns(UserWarning, match="deprecated"):
        model = load_model("vit_tiny_patch16_224_in21k", pretrained=False)
    assert data_config(model)["mean"] == (0.5, 0.5, 0.5)
    assert model.num_classes == 21843


def test_without_a_name_it_is_the_built_in_model():
    model = load_model()
    reference = create_reference_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    with pytest.raises(ConfigError, match="--model"):
        load_model(num_classes=3)


def test_the_built_in_model_takes_other_weights(tmp_path):
    torch.manual_seed(0)
    trained = create_reference_model(pretrained=False)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    model = load_model(checkpoint=tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert data_config(model) == data_config(load_model())
    with pytest.raises(DataError, match="There is no checkpoint"):
        load_model(checkpoint=tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("test_vit.nowhere_in1k", "r160_in1k"),
        ("timm/test_vit", "hf-hub:timm/test_vit"),
        ("xyzzy", "token-merge list --names"),
    ],
)
def test_an_unknown_name_is_refused_with_names_like_it(name, message):
    with pytest.raises(ConfigError, match=message):
        load_model(name)


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "local-dir:{}"])
def test_a_model_that_is_not_served_is_refused_before_its_weights_are_had(name, monkeypatch, tmp_path):
    def no_weights(*args, **kwargs):
        raise AssertionError("The weights are asked for.")

    save_for_hf(timm.create_model("test_resnet"), str(tmp_path))
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_weights)
    with pytest.raises(UnsupportedModelError, match="ResNet is no model that is served"):
        load_model(name.format(tmp_path))
    (tmp_path / "weights.pth").write_text("which are not read")
    with pytest.raises(UnsupportedModelError, match="ResNet is no model that is served"):
        load_model("test_resnet", checkpoint=tmp_path / "weights.pth")


def test_a_model_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match=r"local-dir:nowhere cannot be created with num_classes=3: Config file not"):
        load_model("local-dir:nowhere", pretrained=False, num_classes=3)


@pytest.mark.parametrize(
    "name", ["test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k", "lvvit_s", "local-dir:nowhere"]
)
def test_weights_that_cannot_be_had_are_an_error_that_names_the_ways_out(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)--checkpoint FILE, or --no-pretrained"):
        load_model(name)


def test_a_model_is_loaded_from_a_local_folder(tmp_path, model):
    save_for_hf(model, str(tmp_path))
    again = load_model(f"local-dir:{tmp_path}")
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(again(image), model(image))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_checkpoint_is_loaded(tmp_path, model, kind):
    path = tmp_path / f"model.{kind}"
    if kind == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    again = load_model("test_vit", checkpoint=path, num_classes=4)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_moving_average_is_taken_on_request_alone(tmp_path, model):
    average = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average}, tmp_path / "model.pth")
    options = {"checkpoint": tmp_path / "model.pth", "num_classes": 4}
    assert load_model("test_vit", **options).head.weight.any()
    assert not load_model("test_vit", use_ema=True, **options).head.weight.any()


def test_a_missing_or_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(DataError, match="There is no checkpoint"):
        load_model("test_vit", checkpoint=path)
    for content in (b"", b"garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            load_model("test_vit", checkpoint=path)
    path = path.with_suffix(".safetensors")
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match="is damaged"):
        load_model("test_vit", checkpoint=path)


def test_a_checkpoint_of_another_model_is_refused_with_the_first_keys(tmp_path, model):
    state = model.state_dict()
    state["extra"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(DataError) as caught:
        load_model("test_vit", checkpoint=tmp_path / "model.pth", num_classes=10)
    for part in ("missing: norm.weight;", "unexpected: extra;", r"head.weight (4, 64), not (10, 64)", "--num-classes"):
        assert part in str(caught.value)
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"missing: cls_token, pos_embed, patch_embed.proj.weight and \d+ more"):
        load_model("test_vit", checkpoint=tmp_path / "model.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "deit_small_patch16_224", "convnext_tiny", "beit_base_patch16_224"]
)
def test_the_settings_are_those_that_timm_resolves(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert data_config(model) == resolve_data_config({}, model=model, use_test_size=True)
    overrides = {"crop_pct": 0.5, "crop_mode": "squash", "interpolation": "nearest", "mean": (0.1,), "std": (0.2,)}
    assert data_config(model, **overrides) == resolve_data_config(overrides, model=model, use_test_size=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": 0},
        {"crop_pct": -1.0},
        {"crop_mode": "wrong"},
        {"interpolation": "wrong"},
        {"mean": (1.0, 2.0)},
    ],
)
def test_settings_that_do_not_fit_are_refused(model, wrong):
    with pytest.raises(ConfigError):
        data_config(model, **wrong)


def timm_loader(config, root, name="", **options):
    """What validate.py does."""
    dataset = create_dataset(name, root=str(root), split="validation", input_img_mode="RGB", **options)
    return create_loader(dataset, batch_size=4, num_workers=0, device=torch.device("cpu"), **config)


@pytest.mark.parametrize("overrides", [{}, {"crop_pct": 0.7, "crop_mode": "squash"}, {"interpolation": "bilinear"}])
def test_images_and_labels_are_those_of_timm(folder, model, overrides):
    loader = timm_loader(resolve_data_config(overrides, model=model, use_test_size=True), folder)
    data = opened(folder, data_config(model, **overrides), num_classes=4)
    assert len(data) == 11
    assert data.labelled
    for batch, (images, labels) in zip(data, loader, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64


@torch.inference_mode()
def test_the_accuracy_is_that_of_timms_validation(folder, model, config):
    correct = [(model(images).argmax(1) == labels).sum() for images, labels in timm_loader(config, folder)]
    ours = [(model(batch.images).argmax(1) == batch.labels).sum() for batch in opened(folder, config)]
    assert sum(correct) / 11 == sum(ours) / 11
    assert sum(correct) > 0


def test_a_picture_is_what_the_model_gets(folder, config):
    data = opened(folder, config)
    images, _, indices = collected(data)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    for image, index in zip(images, indices.tolist(), strict=True):
        picture = torch.from_numpy(np.array(data.picture(index))).permute(2, 0, 1)
        assert torch.equal(((image * std + mean) * 255).round().byte(), picture)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_the_folder_of_the_split_is_entered(folder, config):
    (folder / "val").mkdir()
    for path in folder.glob("class_*"):
        path.rename(folder / "val" / path.name)
    (folder / "train").mkdir()
    draw(0).save(folder / "train" / "other.png")
    assert len(opened(folder, config)) == 11
    assert len(opened(folder, config, split="train")) == 1


def test_a_split_that_is_not_there_is_refused_with_those_that_are(folder, config, tmp_path):
    assert len(opened(folder, config)) == 11
    with pytest.raises(DataError, match=r"has no split 'vaildation'. It has no splits: leave --split out"):
        opened(folder, config, split="vaildation")
    for split in ("test", "train"):
        (folder / split).mkdir()
        draw(0).save(folder / split / "other.png")
    for split in ("vaildation", None):
        with pytest.raises(DataError, match=r"has no split 'va[a-z]+'. Those there are: test, train\."):
            opened(folder, config, split=split)
    with pytest.raises(DataError, match="Those there are: test, train"):
        opened(folder, config, split="vaildation", dataset="torch/image_folder")
    assert len(opened(folder, config, split="test")) == 1


def test_a_class_may_be_called_train(folder, config):
    (folder / "class_7").rename(folder / "train")
    assert len(opened(folder, config)) == 11


@pytest.mark.parametrize("kind", ["webp", "bmp", "tif", "tiff", "gif"])
def test_images_of_other_kinds_are_taken_from_a_folder(kind, tmp_path, config):
    draw(0).save(tmp_path / f"image.{kind}")
    draw(0).save(tmp_path / "image.png")
    assert len(collected(opened(tmp_path, config))[0]) == 2


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_images_of_16_bits_are_scaled_not_white(kind, tmp_path, config):
    values = np.arange(160 * 160, dtype=np.uint16).reshape(160, 160) * 2
    Image.fromarray(values).save(tmp_path / f"deep.{kind}")
    Image.fromarray((values // 257).astype(np.uint8)).save(tmp_path / "flat.png")
    deep, flat = collected(opened(tmp_path, config))[0]
    assert torch.equal(deep, flat)
    assert deep.std() > 0.1


def test_a_flat_folder_has_no_labels(tmp_path, config):
    for i in range(3):
        draw(i).save(tmp_path / f"{i}.png")
    data = opened(tmp_path, config, num_classes=1000)
    assert not data.labelled
    assert "3 unlabelled images" in data.description
    assert collected(data)[1].tolist() == [-1] * 3
    assert [data.filename(i) for i in range(3)] == ["0.png", "1.png", "2.png"]


def test_a_single_image_of_any_format_is_data(tmp_path, config):
    draw(1).save(tmp_path / "cat.webp")
    data = opened(tmp_path / "cat.webp", config, num_classes=1000)
    images, labels, indices = collected(data)
    assert images.shape == (1, 3, 160, 160)
    assert (labels.tolist(), indices.tolist(), data.labelled) == ([-1], [0], False)
    assert data.filename(0) == "cat.webp"
    assert data.picture(0).size == (160, 160)


def test_labels_are_ignored_on_request(folder, config):
    data = opened(folder, config, unlabelled=True, num_classes=2)
    assert not data.labelled
    assert set(collected(data)[1].tolist()) == {-1}
    assert not opened(folder, config, num_classes=0).labelled


def test_a_class_map_gives_the_labels_and_leaves_out_other_folders(folder, config, tmp_path_factory):
    names = tmp_path_factory.mktemp("maps") / "classes.txt"
    names.write_text("class_10\nunseen\nclass_7\n")
    data = opened(folder, config, class_map=names, num_classes=1000)
    _, labels, indices = collected(data)
    assert {
        data.filename(i).split("/")[0]: label for i, label in zip(indices.tolist(), labels.tolist(), strict=True)
    } == {
        "class_10": 0,
        "class_7": 2,
    }
    names.write_text("unseen\n")
    with pytest.raises(DataError, match=r"has no image in a folder that .*classes.txt names"):
        opened(folder, config, class_map=names)
    with pytest.raises(DataError, match="Cannot locate"):
        opened(folder, config, class_map="nowhere.txt")


def test_more_classes_than_the_models_are_refused(folder, config):
    with pytest.raises(
        DataError, match=r"labels of 4 classes, the model has 3. .*--class-map.*--unlabelled.*--num-classes"
    ):
        opened(folder, config, num_classes=3)


def test_fewer_classes_than_the_models_are_warned_about(folder, config):
    with pytest.warns(UserWarning, match="has 4 classes, the model 1000"):
        data = opened(folder, config, num_classes=1000)
    assert len(data.warnings) == 1
    assert "has 4 classes, the model 1000" in data.warnings[0]
    assert opened(folder, config, num_classes=4).warnings == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(folder, config, num_classes=4)
        opened(folder, config, num_classes=1000, unlabelled=True)


def test_what_is_not_there_is_refused(tmp_path, config):
    with pytest.raises(DataError, match="There is no"):
        opened(tmp_path / "nowhere", config)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"has no images \(.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .gif\)"):
        opened(tmp_path, config)
    draw(0).save(tmp_path / "image.webp")
    draw(0).save(tmp_path / "image.png")
    assert len(opened(tmp_path, config, input_key=".webp;.bmp")) == 1
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "image.webp", "image.webp")
    with pytest.raises(DataError, match="is an archive"):
        opened(tmp_path / "images.tar", config)


@pytest.mark.parametrize(
    "wrong", [{"num_images": 0}, {"rank": 2, "world_size": 2}, {"dataset": "wrong/name"}, {"dataset": "hfds"}]
)
def test_options_that_are_not_allowed_are_refused(folder, config, wrong):
    with pytest.raises(ConfigError):
        opened(folder, config, **wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_leave_the_batch(folder, config, workers):
    whole, _, _ = collected(opened(folder, config))
    names = damage(folder)
    data = opened(folder, config, workers=workers)
    images, labels, indices = collected(data)
    assert len(data) == 11
    assert {line.split(": ")[0] for line in data.unreadable} == names
    assert len(data.unreadable) == 4
    assert all(len(line.split(": ", 1)[1]) > 10 for line in data.unreadable)
    assert "class_7/image_0.jpg: cannot identify image file" in data.unreadable
    assert len(images) == len(labels) == len(indices) == 7
    for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
        assert torch.equal(image, whole[index])
        assert data.filename(index).startswith(f"class_{label + 7}/")
    collected(data)
    assert len(data.unreadable) == 4  # a second pass does not count them again
    with pytest.raises(DataError, match=r"class_7/image_0.jpg cannot be read: cannot identify image"):
        data.picture(0)


def test_a_file_that_goes_away_is_unreadable(folder, config):
    data = opened(folder, config)
    (folder / "class_7" / "image_4.png").unlink(missing_ok=True)
    (folder / "class_7" / "image_4.jpg").unlink(missing_ok=True)
    assert len(collected(data)[0]) == 10
    assert len(data.unreadable) == 1


def test_a_batch_without_any_readable_image_is_passed_over(tmp_path, config):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"broken" if i < 4 else encoded(draw(i)))
    (batch,) = opened(tmp_path, config, batch_size=4)
    assert batch.indices.tolist() == [4, 5]
    assert batch.end == 6
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"No image could be read, of 6 .*0.png: cannot identify.* and 3 more"):
        list(opened(tmp_path, config))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the data


def test_several_processes_share_all_images_and_no_image_twice(folder, config):
    parts = [collected(opened(folder, config, rank=rank, world_size=3))[2].tolist() for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert parts[1] == [1, 4, 7, 10]
    assert list(opened(folder, config, rank=11, world_size=12)) == []


def test_a_pass_resumes_after_any_batch(folder, config):
    damage(folder)
    images, labels, indices = collected(opened(folder, config))
    data = opened(folder, config)
    done = []
    for batch in data:
        done.append(batch)
        if len(done) == 2:
            break
    data.batch_size = 3
    rest = collected(data, start=done[-1].end)
    for field, expected in enumerate((images, labels, indices)):
        assert torch.equal(torch.cat([*(batch[field] for batch in done), rest[field]]), expected)
    assert list(data.batches(start=11)) == []


def test_a_random_subset_depends_on_the_seed_alone(folder, config):
    chosen = [collected(opened(folder, config, num_images=5, seed=seed))[2].tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5
    parts = [opened(folder, config, num_images=5, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(i for part in parts for i in part.indices) == chosen[0]
    assert "5 of 11 labelled images" in parts[0].description
    assert len(opened(folder, config, num_images=50)) == 11


def test_chosen_images_are_data_of_their_own(folder, config):
    data = opened(folder, config)
    images, _, _ = collected(data)
    part = data.subset([7, 2])
    assert len(part) == 2
    chosen, _, indices = collected(part)
    assert indices.tolist() == [2, 7]
    assert torch.equal(chosen, images[[2, 7]])


# ---------------------------------------------------------------------------------------------------------------------
# Fashion-MNIST


@torch.inference_mode()
def test_the_built_in_images_are_those_of_the_built_in_model():
    model = load_model()
    data = opened(None, data_config(model), batch_size=500, num_classes=model.num_classes)
    images, labels, indices = collected(data)
    expected, expected_labels = load_images()
    assert torch.allclose(images, expected, atol=1e-6)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(indices, torch.arange(1000))
    assert data.description == "1,000 labelled images, Fashion-MNIST, built in"
    assert data.picture(3).size == (28, 28)
    assert data.filename(3) == "image 3"


def test_idx_files_serve_any_model(config):
    from token_merge_plugin.builtin import FOLDER

    with pytest.warns(UserWarning, match="has 10 classes, the model 1000"):
        data = opened(FOLDER, config, num_classes=1000, num_images=3)
    images, _, _ = collected(data)
    assert images.shape == (3, 3, 160, 160)
    with pytest.raises(DataError, match="train"):
        opened(FOLDER, config, split="train")


# ---------------------------------------------------------------------------------------------------------------------
# Named datasets


def test_a_torchvision_dataset_is_read(folder, config):
    data = opened(folder, config, dataset="torch/image_folder", num_classes=4)
    images, labels, indices = collected(data)
    loader = timm_loader(config, folder, "torch/image_folder")
    expected, expected_labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)
    assert {data.filename(i) for i in indices.tolist()} >= {"class_7/image_0.jpg", "class_8/image_1.png"}
    with pytest.raises(DataError, match="labels of 4 classes, the model has 3"):
        opened(folder, config, dataset="torch/image_folder", num_classes=3)
    names = damage(folder)
    data = opened(folder, config, dataset="torch/image_folder")
    assert len(collected(data)[0]) == 7
    assert {line.split(": ")[0] for line in data.unreadable} == names
    with pytest.raises(DataError, match="Unknown torchvision dataset"):
        opened(folder, config, dataset="torch/wrong")
    with pytest.raises(ConfigError, match="no class map"):
        opened(folder, config, dataset="torch/image_folder", class_map="classes.txt")


@pytest.fixture
def table(tmp_path):
    """A Hugging Face dataset of six images in three classes as a local parquet file; the fifth image is broken."""
    import datasets

    pictures = [{"bytes": b"broken" if i == 4 else encoded(draw(i)), "path": f"{i}.png"} for i in range(6)]
    columns = {"image": pictures, "label": [i % 3 for i in range(6)], "word": list("abcdef")}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]), word=datasets.Value("string")
    )
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(tmp_path / "table" / "validation.parquet"))
    return {"dataset": f"hfds/{tmp_path / 'table'}", "source": tmp_path / "cache"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hugging_face_dataset_is_read(table, config, workers):
    data = opened(config=config, num_classes=3, workers=workers, **table)
    images, labels, indices = collected(data)
    assert labels.tolist() == [0, 1, 2, 0, 2]
    assert indices.tolist() == [0, 1, 2, 3, 5]
    assert data.unreadable == ["4.png: cannot identify image file"]
    with io.BytesIO(encoded(draw(5))) as file:
        transform = timm.data.create_transform(**config)
        assert torch.allclose(images[4], transform(Image.open(file).convert("RGB")), atol=1e-5)
    with pytest.raises(DataError, match="labels of 3 classes, the model has 2"):
        opened(config=config, num_classes=2, **table)


def test_a_hugging_face_dataset_may_lack_labels_or_have_other_ones(table, config, tmp_path):
    for options in ({"target_key": "nothing"}, {"unlabelled": True, "target_key": "word"}):
        data = opened(config=config, **table, **options)
        assert not data.labelled
        assert collected(data)[1].tolist() == [-1] * 5
    for workers in (0, 2):
        data = opened(config=config, target_key="word", workers=workers, **table)
        with pytest.raises(DataError, match=r"label of 0.png is not one class index.*--target-key.*--unlabelled"):
            list(data)
    names = tmp_path / "classes.txt"
    names.write_text("f\ne\nd\nc\nb\na\n")
    data = opened(config=config, target_key="word", class_map=names, **table)
    assert collected(data)[1].tolist() == [5, 4, 3, 2, 0]
    names.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"label of 2.png"):
        list(opened(config=config, target_key="word", class_map=names, **table))


def test_a_hugging_face_dataset_that_is_not_there_is_refused(table, config, tmp_path):
    with pytest.raises(DataError, match="--input-key"):
        opened(config=config, input_key="picture", **table)
    with pytest.raises(DataError, match="--split"):
        opened(config=config, split="test", **table)
    with pytest.raises(DataError, match="cannot be opened"):
        opened(tmp_path, config, dataset=f"hfds/{tmp_path / 'nowhere'}")


def write_shards(folder, samples):
    """Write samples {extension: bytes} into shards of four."""
    for number in range(0, len(samples), 4):
        with tarfile.open(folder / f"val-{number // 4}.tar", "w") as shard:
            for i, sample in enumerate(samples[number : number + 4], number):
                for extension, content in sample.items():
                    member = tarfile.TarInfo(f"{i:04}.{extension}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Ten samples in three shards, in three classes."""
    samples = [{"png": encoded(draw(i)), "cls": str(i % 3).encode(), "json": b'{"name": "x"}'} for i in range(10)]
    write_shards(tmp_path, samples)
    return {"source": tmp_path, "dataset": "wds/", "split": "val-{0..2}.tar"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", ["", "|10"])
def test_shards_are_read_in_their_order_by_any_number_of_workers(shards, config, workers, count):
    shards["split"] += count
    data = opened(config=config, workers=workers, num_classes=3, **shards)
    images, labels, indices = collected(data)
    assert len(data) == 10
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert indices.tolist() == list(range(10))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    picture = torch.from_numpy(np.array(data.picture(7))).permute(2, 0, 1)
    assert torch.equal(((images[7] * std + mean) * 255).round().byte(), picture)
    assert data.unreadable == []


def test_shards_are_shared_resumed_and_chosen_from(shards, config):
    parts = [collected(opened(config=config, rank=rank, world_size=2, **shards))[2].tolist() for rank in (0, 1)]
    assert parts == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    data = opened(config=config, num_images=6, **shards)
    first, second = (batch.indices.tolist() for batch in data)
    assert first + second == list(data.indices)
    assert collected(data, start=4)[2].tolist() == second


def test_broken_samples_of_shards_are_counted(tmp_path, config):
    write_shards(tmp_path, [{"png": b"broken" if i == 2 else encoded(draw(i)), "cls": b"1"} for i in range(5)])
    shards = {"source": tmp_path, "dataset": "wds/", "split": "val-{0..1}.tar"}
    data = opened(config=config, unlabelled=True, **shards)
    for _ in range(2):
        assert collected(data)[1].tolist() == [-1] * 4
        assert len(data.unreadable) == 1
    with pytest.raises(DataError, match="labels of 2 classes, the model has 1"):
        list(opened(config=config, num_classes=1, **shards))


def test_shards_that_are_not_there_are_refused(shards, config):
    with pytest.raises(DataError, match=r"Shards are missing: .*val-3.tar"):
        opened(config=config, **(shards | {"split": "val-{0..3}.tar"}))
    with pytest.raises(DataError, match="--split"):
        opened(config=config, **(shards | {"split": "validation"}))
    with pytest.raises(DataError, match="Give it with --data"):
        opened(config=config, **(shards | {"source": None}))
    for workers in (0, 2):
        with pytest.raises(DataError, match="--target-key"):
            list(opened(config=config, target_key="wrong", workers=workers, **shards))


@pytest.mark.parametrize(("dataset", "package"), [("hfds/name", "datasets"), ("wds/", "webdataset")])
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, config, monkeypatch, dataset, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"package {package}, .*pip install {package}\..*clone.*\[data\]"):
        opened(tmp_path, config, dataset=dataset)
