"""Models for a trial, through timm's own functions, as its validate.py creates them and asks them for their images."""

import difflib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import get_pretrained_cfg, load_checkpoint, load_state_dict, parse_model_name, split_model_name_tag
from torch import Tensor, nn

from token_merge_plugin.builtin import CLASSES, MEAN, STD, create_reference_model
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, first_few, first_line
from token_merge_plugin.patching import apply
from token_merge_plugin.trial.fusion import CONFIG_KEY, PART, Trained, remember


def load_model(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    use_ema: bool = False,
    pretrained: bool = True,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    dynamic_size: bool = False,
) -> nn.Module:
    """Create a model as timm's validate.py does, in eval mode.

    Args:
        name: timm's name of a model, or an id after `hf-hub:` or `local-dir:`; None for the built-in model.
        checkpoint: file of weights, as timm's `load_checkpoint` takes it. Pretrained weights are not loaded then. A
            learned fusion in it is remembered (`fusion.remembered`), and used whenever a trial patches the model.
        use_ema: take the checkpoint's moving average of the weights, where it has one.
        pretrained: load pretrained weights.
        num_classes: classes of the classifier; None for those of the weights.
        img_size: side of the input in pixels; None for that of the weights. Give it to `data_config` as well: many
            models take images of any size.
        in_chans: channels of the input; None for those of the weights.
        dynamic_size: have it take images of other sizes, if it would not.

    Raises:
        ConfigError: there is no such model, or it cannot be built with these options.
        UnsupportedModelError: no adapter serves the model, so its weights were neither downloaded nor read.
        DataError: the weights cannot be had, or the checkpoint is missing, damaged or does not fit.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    options["dynamic_img_size"] = dynamic_size or None
    pretrained = pretrained and checkpoint is None
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise DataError(f"There is no checkpoint {checkpoint}. Give a file of weights, as timm's train.py writes it.")
    if name is None:
        if any(value is not None for value in options.values()):
            raise ConfigError("The built-in model is complete as it is. Name another one with --model.")
        model = _reference_model(pretrained)
    else:
        model = _timm_model(name, pretrained, pretrained or checkpoint is not None, **options)
    if checkpoint is not None:
        try:
            _load_checkpoint(model, checkpoint, use_ema)
        except Exception as error:  # as many kinds as there are ways to damage a file
            raise DataError(_checkpoint_problem(model, checkpoint, use_ema, error)) from error
    return model.eval()


def _load_checkpoint(model: nn.Module, checkpoint: str | Path, use_ema: bool) -> None:
    """Load a checkpoint as timm does, and remember the fusion and the options that it was fine-tuned with."""
    fusion: dict[str, Tensor] = {}

    def without_fusion(state: Mapping[str, Tensor], _: nn.Module) -> dict[str, Tensor]:
        fusion.update({name: value for name, value in state.items() if PART in name})
        return {name: value for name, value in state.items() if PART not in name}

    load_checkpoint(model, str(checkpoint), use_ema=use_ema, filter_fn=without_fusion)
    config = None
    if Path(checkpoint).suffix not in (".safetensors", ".npz", ".npy"):
        # Mapped where that is possible: timm has read the weights already, and only the options are looked at.
        mapped = zipfile.is_zipfile(checkpoint)
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
        if isinstance(content, Mapping) and isinstance(content.get(CONFIG_KEY), str):
            config = MergeConfig.from_json(content[CONFIG_KEY])
    if fusion or config is not None:
        remember(model, Trained(fusion, config))


def _timm_model(name: str, pretrained: bool, read: bool, **options: Any) -> nn.Module:
    _check_name(name, pretrained)
    if options["dynamic_img_size"] is None or _built_for(name, 224) is None:
        del options["dynamic_img_size"]  # it takes any size, or is not to
    if read:
        _check_served(name, options)
    try:
        if options["img_size"] is not None:  # only models that are built for one size take the argument
            options["img_size"] = _built_for(name, options["img_size"])
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # the network, the hub and the model's own code raise classes of every kind
        raise _creation_error(name, pretrained, options, error) from error


def _built_for(name: str, img_size: int) -> int | None:
    """Return the argument `img_size` that a model is made with; None where it takes any size, and no such argument."""
    try:
        from timm.models import resolve_model_input_args
    except ImportError:  # timm before 1.0.31, of which the same is asked
        cfg = get_pretrained_cfg(name)
        return img_size if cfg is None or cfg.fixed_input_size else None
    return resolve_model_input_args(name, {"img_size": img_size}).get("img_size")


def _reference_model(pretrained: bool) -> nn.Module:
    model: Any = create_reference_model(pretrained)
    model.pretrained_cfg = {
        "architecture": "vit_fashion_mnist",
        "input_size": (1, 28, 28),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "mean": (MEAN,),
        "std": (STD,),
        "num_classes": len(CLASSES),
        "label_names": CLASSES,
    }
    return model


def _check_name(name: str, pretrained: bool) -> None:
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if source is not None:
        return
    architecture, tag = split_model_name_tag(identifier)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        similar = f"Similar names: {', '.join(close)}. " if close else ""
        raise ConfigError(
            f"timm has no model {architecture!r}. {similar}`token-merge list --names` lists all that are served."
        )
    try:
        config = get_pretrained_cfg(identifier)
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or "none"
        raise ConfigError(f"There are no weights {tag!r} for {architecture}. Those it has: {known}.") from error
    if pretrained and config is not None and not config.has_weights:
        raise DataError(f"timm has no pretrained weights for {name}. {_weights_advice()}")


def _check_served(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be patched before its weights are downloaded or read; see `load_model`."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it is built
            model = timm.create_model(name, pretrained=False, **options)
    except Exception:  # what is wrong is said when it is built, if it is not that it cannot be without numbers
        return
    apply(model, 1.0)


def _weights_advice() -> str:
    return "Give weights of your own with --checkpoint FILE, or --no-pretrained to measure speed only."


def _creation_error(
    name: str, pretrained: bool, options: Mapping[str, Any], error: Exception
) -> ConfigError | DataError:
    given = ", ".join(f"{option}={value}" for option, value in options.items() if value is not None)
    what = f"{name} cannot be created{f' with {given}' if given else ''}"
    if pretrained:
        return DataError(f"{what} and its pretrained weights: {first_line(error)}\n{_weights_advice()}")
    return ConfigError(f"{what}: {first_line(error)}")


def _checkpoint_problem(model: nn.Module, checkpoint: str | Path, use_ema: bool, error: Exception) -> str:
    try:
        found = load_state_dict(str(checkpoint), use_ema)
        shapes = {key: tuple(value.shape) for key, value in found.items() if PART not in key}
    except Exception:  # `error` says why already
        return f"{checkpoint} is damaged, or is not a file of weights: {first_line(error)}"
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    both = [key for key in expected if key in shapes]
    problems = [
        ("missing", [key for key in expected if key not in shapes]),
        ("unexpected", [key for key in shapes if key not in expected]),
        (
            "of another shape",
            [f"{key} {shapes[key]}, not {expected[key]}" for key in both if shapes[key] != expected[key]],
        ),
    ]
    listed = "; ".join(f"{kind}: {first_few(keys)}" for kind, keys in problems if keys) or first_line(error)
    return (
        f"{checkpoint} does not fit the model: {listed}. Name the model that it was saved from, with the same "
        "--num-classes, --img-size and --in-chans."
    )


def class_name(model: nn.Module, index: int) -> str:
    """Return the name of a class: of the model's own names, or of ImageNet's; else its number."""
    config: Any = getattr(model, "pretrained_cfg", {})
    names = config.get("label_names")
    if names:
        return names[index]
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).index_to_description(index) if subset else f"class {index}"


def data_config(
    model: nn.Module,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return how images are prepared for the model: its own settings at test size, and what overrides them.

    Args:
        model: a timm model.
        img_size: side of the input in pixels.
        crop_pct: share of the resized image's side that the crop keeps.
        crop_mode: "center", "squash" or "border".
        interpolation: "bicubic", "bilinear", "nearest", "lanczos", "box" or "hamming".
        mean, std: of the pixels in [0, 1], one for each channel, or one for all.

    Returns:
        input_size (channels, height, width), interpolation, mean, std, crop_pct and crop_mode, as timm names them.

    Raises:
        ConfigError: a value is not allowed, or does not fit the model.
    """
    _check_choice("crop_mode", crop_mode, ("center", "squash", "border"))
    _check_choice("interpolation", interpolation, ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"))
    for name, value in (("img_size", img_size), ("crop_pct", crop_pct)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} is not positive.")
    overrides = {
        "img_size": img_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }
    try:
        return _resolve(model, overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model was made for.

    Its patch embedding knows the size that it was created with, timm's settings that of the weights.
    """
    channels, height, width = data_config(model)["input_size"]
    for module in model.modules():
        made_for = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(made_for, tuple) and len(made_for) == 2:
            height, width = made_for
            break
    return channels, height, width


def _resolve(model: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    try:
        from timm.data import resolve_input_data_config
    except ImportError:  # timm before 1.0.31, whose validate.py does this
        cfg = model.pretrained_cfg
        given = {name: value for name, value in overrides.items() if value is not None}
        given["in_chans"] = cfg["input_size"][0]
        return resolve_data_config(given, model=model, use_test_size=not cfg.get("fixed_input_size", False))
    return resolve_input_data_config(model, overrides, use_test_size=True)


def _check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, allowed))}.")
