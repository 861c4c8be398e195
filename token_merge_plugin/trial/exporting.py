"""A patched model as a file for another runtime, which is there only if it does what the model does.

The file is made beside its place, read by its runtime and compared with the model, and its speed is taken in turns
with the unpatched model's, exported likewise. Then it is put in its place.
"""

import copy
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from token_merge_plugin.config import KeepRate, MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, ExportError, counted, first_line
from token_merge_plugin.patching import config_of, is_patched, remove
from token_merge_plugin.trial.fusion import remember, remembered, with_fusion
from token_merge_plugin.trial.images import AnyImages, collect_images
from token_merge_plugin.trial.measuring import check_images, device_of, plan, take_turns
from token_merge_plugin.trial.models import data_config, input_size, load_model
from token_merge_plugin.trial.runtimes import Contents, Dynamic, Run, Runtime, find_runtime, taller, tensors_of
from token_merge_plugin.trial.speed import median_interval, speed_ups
from token_merge_plugin.trial.table import format_speed_up

# Batch sizes at which a file with a dynamic batch is compared with the model, and timed.
BATCH_SIZES = (1, 2, 8)
# Of the largest output: float32 in another order stays below a thousandth, and what is wrong is far above a hundredth.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Export:
    """What `export` made. As a string: a few lines for people.

    Attributes:
        model: name of the model's class.
        config: the options that it is patched by; None for those of a model without a stage.
        runtime: what reads the file, and its version.
        files: the file, and those that belong to it.
        size: bytes of all of them.
        contents: its format and operators.
        differences: {batch size: largest difference to the model's output, as a share of the largest output}.
        resized: {(height, width): the same for an image of another size}; empty where the size is fixed.
        agreement: share of the images with the same top-1; None for a model without classes.
        images: how many were compared, real or random.
        speed_ups: {batch size: (speed-up over the unpatched model in this runtime, its interval)}; empty if nothing was
            timed, or if the unpatched model does not export.
    """

    model: str
    config: MergeConfig | None
    runtime: str
    files: tuple[Path, ...]
    size: int
    contents: Contents
    differences: dict[int, float]
    resized: dict[tuple[int, int], float]
    agreement: float | None
    images: int
    speed_ups: dict[int, tuple[float, tuple[float, float]]]

    def __str__(self) -> str:
        contents, total = self.contents, sum(self.contents.operators.values())
        setting = "unpatched" if self.config is None else f"{self.config.method}, keep rate {self.config.keep_rate}"
        operators = ", ".join(f"{name} {number}" for name, number in contents.operators.items())
        places = _by_place(self.differences, self.resized)
        batches = ", ".join(f"{place} {value:.1e}" for place, value in places.items())
        agreement = "" if self.agreement is None else f"; top-1 agrees on {self.agreement:.2%}"
        lines = [
            f"{self.model}, {setting}, for {self.runtime}",
            f"{contents.form}, {self.size / 1e6:.1f} MB, {total:,} operators: {operators}",
            f"scatters with a reduction: {', '.join(contents.scatters) or 'none'}",
            f"largest difference to PyTorch on {counted(self.images, 'image')}, as a share of the largest output: "
            f"{batches}{agreement}",
        ]
        if self.speed_ups:
            speeds = ", ".join(f"batch {size} {format_speed_up(value)}" for size, value in self.speed_ups.items())
            lines.append(f"speed-up over the unpatched model, exported likewise: {speeds}")
        return "\n".join(lines)


@torch.no_grad()
def export(
    model: nn.Module | str,
    file: str | Path,
    to: str = "onnx",
    keep_rate: KeepRate | MergeConfig | None = None,
    *,
    images: AnyImages | None = None,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    replace: bool = False,
    tolerance: float = TOLERANCE,
    rounds: int = 20,
) -> Export:
    """Export a model with token merging to a file, compare the file with the model, and time it.

    Args:
        model: a supported model, or a module that contains some; or timm's name of one, for its pretrained weights.
            It is not altered: a copy is exported, in eval mode.
        file: what is written, with the suffix of its kind: .onnx; .xml, with a .bin beside it; .pt2 for the last two.
        to: "onnx" (ONNX Runtime), "openvino", "torch" (torch.export) or "aoti" (AOTInductor).
        keep_rate: as for `apply`; None for what the model is patched by now, or was fine-tuned with, or else 0.7.
        images: that are compared and timed, preprocessed, all of them: see `collect_images`. None for random ones of
            the size that the model was made for.
        dynamic_batch: take batches of any size; else of one image.
        dynamic_size: take images of any height and width that the model takes, such as a ViT that was created with
            `dynamic_img_size=True`; else of the size of `images`.
        replace: replace a file that is there already.
        tolerance: the largest difference allowed, as a share of the largest output.
        rounds: passes that are timed of each model; 0 for none.

    Returns:
        What was written and measured.

    Raises:
        ConfigError: an option is not allowed, or does not fit the model.
        MissingExtraError: a package is not installed that the runtime needs.
        DataError: the file is there already or has another suffix, or the images do not fit the model.
        UnsupportedModelError: no adapter serves the model.
        ExportError: the model cannot be exported, or the file does not do what the model does.

        After any of these there is no new file, and an old one is as it was.
    """
    runtime, path = find_runtime(to), Path(file)
    check_place(path, runtime, replace)
    if dynamic_size and not hasattr(Dim, "AUTO"):
        raise ConfigError(f"A dynamic image size needs torch 2.6 or newer, and this is {torch.__version__}.")
    patched = _patched(load_model(model) if isinstance(model, str) else model, keep_rate, runtime)
    unpatched = remove(copy.deepcopy(patched))
    x = _some_images(patched, images)
    check_images(unpatched, x[:1])
    others = [taller(x[:1]), taller(x[:1].mT).mT] if dynamic_size else []
    for image in others:
        _check_takes(unpatched, image)
    dynamic = Dynamic(dynamic_batch, dynamic_size)
    sizes = BATCH_SIZES if dynamic_batch else (1,)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder) / path.name
        other = Path(folder) / f"unpatched{path.suffix}"
        contents, run = _exported(patched, unpatched, x, (made, other), runtime, dynamic)
        differences, agreement = _compared(run, patched, x, sizes)
        resized = {
            (image.shape[2], image.shape[3]): _difference(run(image), tensors_of(patched(image))) for image in others
        }
        _check(_by_place(differences, resized), tolerance, patched, runtime)
        speeds = {}
        if rounds:
            with suppress(ExportError):  # some models export with the patch alone
                _, unpatched_run = _write(unpatched, x, other, runtime, dynamic)
                runs = (unpatched_run, run)
                speeds = {size: _speed_up(runs, x[:size], rounds) for size in sizes if size != 2}
        written = [part for part in runtime.files(made) if part.exists()]
        size = sum(part.stat().st_size for part in written)
        for part in written:
            part.replace(path.with_name(part.name))
    return Export(
        model=type(patched).__name__,
        config=config_of(patched),
        runtime=runtime.version(),
        files=tuple(path.with_name(part.name) for part in reversed(written)),
        size=size,
        contents=contents,
        differences=differences,
        resized=resized,
        agreement=agreement,
        images=len(x),
        speed_ups=speeds,
    )


def check_place(path: Path, runtime: Runtime, replace: bool) -> None:
    """Raise DataError if a runtime's file cannot be written there, or would replace one unasked."""
    if path.suffix != runtime.suffix:
        raise DataError(f"{path} does not end in {runtime.suffix}, as files for {runtime.name} do. Name it so.")
    if not path.parent.is_dir():
        raise DataError(f"{path} cannot be written: there is no folder {path.parent}. Give another file.")
    for part in runtime.files(path):
        if part.is_dir():
            raise DataError(f"{part} cannot be written: it is a folder. Give another file.")
        if part.exists() and not replace:
            raise DataError(f"{part} is there already. Name another file, or have it replaced: replace=True, --force.")


def _patched(model: nn.Module, keep_rate: KeepRate | MergeConfig | None, runtime: Runtime) -> nn.Module:
    """Return a copy of the model, in eval mode, patched as it is to be exported."""
    patched = copy.deepcopy(model).eval()
    if runtime.on_cpu:
        patched.cpu()
    if remembered(model).fusion:
        remember(patched, remembered(model))
    if keep_rate is None and is_patched(patched):
        return patched
    config = (remembered(model).config or MergeConfig(0.7)) if keep_rate is None else MergeConfig.of(keep_rate)
    return plan(patched, with_fusion(config, model))


def random_images(model: nn.Module, img_size: int | None = None) -> Tensor:
    """Return a batch of noise, of the size that the model was made for, or of another one."""
    size = input_size(model) if img_size is None else data_config(model, img_size=img_size)["input_size"]
    return torch.randn(BATCH_SIZES[-1], *size)


def _some_images(model: nn.Module, images: AnyImages | None) -> Tensor:
    """Return the images as the model takes them, repeated where they are fewer than the largest batch."""
    collected = collect_images(random_images(model) if images is None else images)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), collected.dtype)
    collected = collected.to(device_of(model), dtype)
    return collected[torch.arange(max(len(collected), BATCH_SIZES[-1])) % len(collected)]


def _exported(
    patched: nn.Module,
    unpatched: nn.Module,
    images: Tensor,
    paths: tuple[Path, Path],
    runtime: Runtime,
    dynamic: Dynamic,
) -> tuple[Contents, Run]:
    """Write the patched model to the first path; where that fails, say whether the unpatched one fails as well."""
    try:
        return _write(patched, images, paths[0], runtime, dynamic)
    except ExportError as error:
        try:
            _write(unpatched, images, paths[1], runtime, dynamic)
        except ExportError as own:
            raise own from error
        raise ExportError(f"{error} Unpatched it does. Please report this.") from error


def _write(model: nn.Module, images: Tensor, path: Path, runtime: Runtime, dynamic: Dynamic) -> tuple[Contents, Run]:
    """Write a model to a file, and return what is in it, and what runs it.

    Raises:
        ExportError: it cannot be exported, or its file does not run.
    """
    try:
        program = runtime.program(model, images, dynamic)
        runtime.save(program, path)
        contents, run = runtime.contents(program, path), runtime.load(path)
        for size in BATCH_SIZES if dynamic.batch else (1,):
            run(images[:size])
        if dynamic.size:
            run(taller(images[:1]))
        return contents, run
    except Exception as error:  # of the exporters, of the compilers below them, of the runtimes
        name = f"{type(model).__name__}, {'patched' if is_patched(model) else 'unpatched'}"
        raise ExportError(f"{name}, does not export to {runtime.name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the first line of the error that an exporter's errors come from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error).rstrip(".:") + "."  # type: ignore[arg-type]


def _compared(
    run: Run, model: nn.Module, images: Tensor, sizes: Sequence[int]
) -> tuple[dict[int, float], float | None]:
    """Return the largest differences by batch size, and the share of images with the same top-1.

    Every image is in a batch of the largest size; the first ones are in one of each other size as well.
    """
    differences = {}
    agreeing: list[Tensor] = []
    for size in sizes:
        last, found = size == sizes[-1], []
        for batch in images.split(size) if last else [images[:size]]:
            outputs, expected = run(batch), tensors_of(model(batch))
            found.append(_difference(outputs, expected))
            if last and len(expected) == 1 and expected[0].ndim == 2 and getattr(model, "num_classes", 0) > 1:
                agreeing.append(outputs[0].argmax(1) == expected[0].argmax(1))
        differences[size] = max(found, key=_badness)
    return differences, torch.cat(agreeing).float().mean().item() if agreeing else None


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of an output, as a share of its largest number."""
    return max((_of_output(*pair) for pair in zip(outputs, expected, strict=True)), key=_badness)


def _of_output(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return ((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def _badness(difference: float) -> tuple[bool, float]:
    """Order differences: one that is no number, which `max` alone would lose, is the worst."""
    return difference != difference, difference


def _by_place(differences: dict[int, float], resized: dict[tuple[int, int], float]) -> dict[str, float]:
    """Return the differences by what people call the place."""
    places = {f"batch {size}": value for size, value in differences.items()}
    return places | {f"{height} x {width} pixels": value for (height, width), value in resized.items()}


def _check(differences: dict[str, float], tolerance: float, model: nn.Module, runtime: Runtime) -> None:
    where, largest = max(differences.items(), key=lambda item: _badness(item[1]))
    if not largest <= tolerance:
        raise ExportError(
            f"{runtime.name} does not give what this {type(model).__name__} gives: at {where} outputs differ by "
            f"{largest:.2g} of the largest output, and {tolerance:g} is allowed. No file was written."
        )


def _check_takes(model: nn.Module, image: Tensor) -> None:
    """Refuse a dynamic size where the unpatched model takes images of one size."""
    height, width = image.shape[2:]
    try:
        check_images(model, image)
    except DataError as error:
        cause = first_line(error.__cause__).rstrip(".")  # type: ignore[arg-type]
        raise ConfigError(
            f"{type(model).__name__}, unpatched, does not take images of other sizes, such as {height} x {width}: "
            f"{cause}. Create it with dynamic_img_size=True if it is a ViT, or leave the size fixed."
        ) from error


def _speed_up(runs: Sequence[Run], images: Tensor, rounds: int) -> tuple[float, tuple[float, float]]:
    """Return how many times as fast the second is as the first, on one batch, and the interval."""
    for run in runs:  # warm-up
        run(images)
    ratios = speed_ups(*take_turns(runs.__getitem__, len(runs), images, rounds=rounds, seconds=float("inf")))
    return statistics.median(ratios), median_interval(ratios)
