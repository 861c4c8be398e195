"""Speed and memory of forward passes: of a model unpatched and patched, measured in turns."""

import copy
import ctypes
import os
import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, first_line
from token_merge_plugin.patching import apply, remove
from token_merge_plugin.trial.fusion import put_back, remember, remembered

Use: TypeAlias = Callable[[Any, Tensor], Any]
"""What a model is run for, a function of it and of images: `forward` or `features`."""

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for a while; each module is given its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward(model: Any, images: Tensor) -> Any:
    """Return the model's output."""
    return model(images)


def features(model: Any, images: Tensor) -> Any:
    """Return the model's tokens. To have all of them takes more than the output of a head that reads one."""
    return model.forward_features(images)


def plan(model: nn.Module, config: MergeConfig | None) -> nn.Module:
    """Patch the model by `config`, with its trained fusion; or make it the unpatched one for None."""
    return remove(model) if config is None else put_back(apply(model, config), config)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@torch.inference_mode()
def check_images(model: nn.Module, image: Tensor) -> None:
    """Refuse images that the unpatched model does not take: of another size, number of channels or dtype.

    Args:
        model: unpatched, in eval mode.
        image: [1, C, H, W].

    Raises:
        DataError: it does not take this one.
    """
    try:
        model(image)
    except torch.OutOfMemoryError:
        return  # which is no fault of the images: what is run next deals with it, or says so
    except Exception as error:  # every model has its own
        name = type(model).__name__
        raise DataError(
            f"{name}, unpatched, does not take images {list(image.shape[1:])} of {image.dtype}: "
            f"{first_line(error).rstrip('.')}. Choose another --img-size; in Python, prepare them as "
            "timm.data.resolve_model_data_config says for the model."
        ) from error


def halved(batch_size: int) -> int:
    """Return half of a batch size, with which memory ran out, and say so.

    Raises:
        DataError: it is one image.
    """
    if batch_size == 1:
        raise DataError("Memory runs out with a single image. Choose smaller images or another device.")
    torch.cuda.empty_cache()
    warnings.warn(f"Out of memory: the batch is halved to {batch_size // 2}.", stacklevel=4)
    return batch_size // 2


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, for this whole process: the same for every contender.

    By default it gives large blocks back to the system and asks for them again, at each operation or not, as its
    thresholds happen to stand. On the CPU that takes up to 40 % of the time, in phases that have nothing to do with
    what is measured. Without effect where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(parameter, value)


@torch.inference_mode()
def time_in_turns(
    model: nn.Module,
    configs: Sequence[MergeConfig | None],
    images: Tensor,
    *,
    rounds: int = 20,
    seconds: float = 5.0,
    compiled: bool = False,
    use: Use = forward,
) -> list[list[float]]:
    """Time forward passes of one model under several configs, all of them in each round, in random order.

    So a change in the machine's load meets all of them alike: compare times of the same round.

    Args:
        model: a supported model in eval mode. It is left with the config that came last, or as it was if `compiled`.
        configs: None for the unpatched model.
        images: [B, C, H, W], one batch.
        rounds: how many rounds, if there is time.
        seconds: after this time no further round begins, but three rounds are always run.
        compiled: time a compiled copy of the model for each config.
        use: what is timed.

    Returns:
        For each config, the seconds that a pass took in each round.

    Raises:
        ConfigError: the model cannot be compiled here.
    """
    if compiled:
        ready = [_compiled(model, config, images, use) for config in configs]
        return take_turns(ready.__getitem__, len(configs), images, rounds=rounds, seconds=seconds)
    for config in configs:  # warm-up
        use(plan(model, config), images)

    def prepare(index: int) -> Callable[[Tensor], Any]:
        return partial(use, plan(model, configs[index]))

    return take_turns(prepare, len(configs), images, rounds=rounds, seconds=seconds)


def take_turns(
    prepare: Callable[[int], Callable[[Tensor], Any]], number: int, images: Tensor, *, rounds: int, seconds: float
) -> list[list[float]]:
    """Time passes of several contenders, all of them in each round, in random order; see `time_in_turns`.

    Args:
        prepare: returns what runs the contender of an index; its own time is not counted.
        number: of contenders.
        images, rounds, seconds: as for `time_in_turns`.

    Returns:
        For each contender, the seconds that a pass took in each round.
    """
    times: list[list[float]] = [[] for _ in range(number)]
    order = random.Random(0)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for index in order.sample(range(number), number):
            run = prepare(index)
            _synchronize(images)
            start = time.perf_counter()
            run(images)
            _synchronize(images)
            times[index].append(time.perf_counter() - start)
    return times


def _compiled(model: nn.Module, config: MergeConfig | None, images: Tensor, use: Use) -> Any:
    """Return a compiled copy of the model under a config, which has run once."""
    copied = copy.deepcopy(model)
    if remembered(model).fusion:
        remember(copied, remembered(model))
    try:
        runner = torch.compile(partial(use, plan(copied, config)), dynamic=False)
        for _ in range(2):  # the second pass is the first one without compiling
            runner(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Dynamo, of Inductor, of the compiler below it
        raise ConfigError(f"The model cannot be compiled here: {first_line(error)} Leave --compile out.") from error
    return runner


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def peak_memory(run: Callable[[Tensor], Any], images: Tensor, training: bool = False) -> int:
    """Return the most bytes that a forward pass takes at one time beside weights and images.

    Args:
        run: a model, something else that runs it, or a step of its training.
        images: [B, C, H, W], one batch.
        training: with gradients.
    """
    with torch.inference_mode(not training):
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            run(images)
            return torch.cuda.max_memory_allocated(images.device) - before
        with _StorageMode() as mode:
            run(images)
        return mode.peak


class _StorageMode(TorchDispatchMode):
    """Counts the bytes of what operators return, until it is freed. What they need meanwhile is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self.known and id(storage) not in given:
                    self.known.add(storage)
                    self._take(storage.nbytes())
                    weakref.finalize(storage, self._take, -storage.nbytes())
        return result

    def _take(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
