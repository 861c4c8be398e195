r"""Fine-tune a timm vision transformer with its tokens merged.

    python examples/finetune.py --data /usr/share/datasets/fashion-mnist --keep-rate 0.5 --epochs 2 --output tuned

fine-tunes the built-in model on the four IDX files of Fashion-MNIST (Debian package dataset-fashion-mnist). Any model
that token_merge_plugin serves, on a folder of images or another data set that timm reads:

    torchrun --nproc-per-node 8 examples/finetune.py --model deit_small_patch16_224.fb_in1k --data imagenet \
        --keep-rate 0.7 --multi-scale learned --warmup-epochs 5 --epochs 30 --batch-size 1024 --bfloat16 \
        --auto-augment rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --distill 0.5 --ema 0.9998 --output deit_small_0.7

A model of train_reference.py is named as there, and needs the weights that were trained: --model lvvit --checkpoint
lvvit.safetensors. A schedule that `token-merge calibrate` wrote is given by --config instead of --keep-rate.

The output folder, which all processes must see, holds
    last.checkpoint  everything: the same command goes on from there after an interruption, to the same result
    weights.pth      all that was learned, for --checkpoint of `token-merge trial`, `evaluate`, `show` and `bench`: the
                     weights, the fusion of --multi-scale learned and the options; where there is --ema, the average as
                     "state_dict_ema" beside "state_dict". timm's load_checkpoint reads it, too: with a fusion, into a
                     model that is patched by these options, since without it the weights are not the ones trained
    token-merge.json the options of `apply`, as MergeConfig.from_json and `token-merge --config` read them
    log.jsonl        a line for each epoch, also printed; epoch 0 is the model before training

Accuracies are those at the keep rate that was asked for, also while it is warmed up, and differences are to the
unpatched model before fine-tuning, on the same images.

The order of the images, their augmentation and the random numbers of a step are functions of --seed and of their
place in the run alone. So a run has the same result, but for rounding, on any number of processes, and the same bits
whether it was interrupted or not. Only dropout differs from process to process.
"""

import argparse
import copy
import difflib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup, create_dataset, create_transform
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device, random_seed, reduce_tensor
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm import tqdm
from train_reference import MODELS, create_model, label_loss, soft_labels

from token_merge_plugin import MergeConfig, apply
from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.config import KeepRate
from token_merge_plugin.errors import ConfigError, DataError, TokenMergeError
from token_merge_plugin.models.lvvit import mix_by_box
from token_merge_plugin.trial.accuracy import paired_interval
from token_merge_plugin.trial.data import DEFAULT_WORKERS, Data, FashionMnist, has_idx_files, open_data
from token_merge_plugin.trial.fusion import CONFIG_KEY, PART, remembered
from token_merge_plugin.trial.images import Batch
from token_merge_plugin.trial.measuring import keep_freed_memory, plan
from token_merge_plugin.trial.models import data_config, load_model

# At 1.0 a stage would not exist: its learned fusion would go, and a sharded model cannot be given other stages.
LARGEST_RATE = 0.999
# What may differ when a run is taken up again, since the result does not depend on it.
NOT_OF_THE_RUN = ("output", "data", "device", "workers", "save_every", "fsdp")


# ---------------------------------------------------------------------------------------------------------------------
# Keep rates


def warmed_up(config: MergeConfig, progress: float) -> MergeConfig:
    """Return the config at some point of the warm-up, with each keep rate so far on its way from 1.0 to its target.

    Rates are rounded, so that a model is not planned anew at every step.

    Args:
        config: the target.
        progress: share of the way, in [0, 1]; at 1 the config itself is returned.
    """
    if progress >= 1:
        return config

    def on_the_way(target: float) -> float:
        return max(target, min(LARGEST_RATE, round(1 - (1 - target) * progress, 2)))

    rate = config.keep_rate
    now: KeepRate
    if isinstance(rate, Mapping):
        now = {block: on_the_way(target) for block, target in rate.items()}
    elif isinstance(rate, tuple):
        now = tuple(on_the_way(target) for target in rate)
    else:
        now = on_the_way(rate)
    return replace(config, keep_rate=now)


def warmup_progress(epochs: float, warmup_epochs: float) -> float:
    """Return how far keep rates are on their way after so many epochs: half a cosine (Liang et al. 2022, EViT)."""
    if epochs >= warmup_epochs:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * epochs / warmup_epochs))


# ---------------------------------------------------------------------------------------------------------------------
# Images


def seed_of(*numbers: int) -> int:
    """Mix numbers, such as those of an epoch and an image, into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Augmented(Dataset):
    """Images [C, H, W] and labels by (epoch, number): the same in whichever process, and however often, they are read.

    Args:
        images: PIL images and labels by number.
        transform: PIL image -> tensor, with what it draws from random, NumPy and torch.
        mode: colour mode of PIL.
        num_classes: labels are below it.
        seed: of the run.
    """

    def __init__(self, images: Any, transform: Any, mode: str, num_classes: int, seed: int):
        self.images, self.transform, self.mode = images, transform, mode
        self.num_classes, self.seed = num_classes, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = self.images[key[1]]
        if not 0 <= label < self.num_classes:
            raise DataError(f"Image {key[1]} has label {label}, the model {self.num_classes} classes: --num-classes.")
        # Nothing is put back: where images are read in the main process, each step is seeded after that.
        random_seed(seed_of(self.seed, *key))
        return self.transform(image.convert(self.mode)), label


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's part of each batch of an epoch, as (epoch, number of the image).

    The batch is the same for any number of processes. Image i and its mirror, the i-th from the end, are always in one
    process, and mirrored there, too: mixup and MixToken mix these two.

    Args:
        num_images: images of an epoch; those that do not fill the last batch are left out.
        batch_size: images of all processes, a multiple of twice their number.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first = 0  # batch at which the epoch begins, after an interruption

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for number in range(self.first, len(self)):
            batch = order[number * self.batch_size :][: self.batch_size]
            positions = range(self.rank, self.batch_size // 2, self.world_size)
            mine = [batch[i] for i in positions] + [batch[-1 - i] for i in reversed(positions)]
            yield [(self.epoch, index) for index in mine]


def training_images(args: argparse.Namespace, config: dict[str, Any], num_classes: int) -> Augmented:
    """Return the images to train on, augmented: those of IDX files are flipped at random and nothing else."""
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images: Any
    if not args.dataset and has_idx_files(args.data):
        images = FashionMnist(args.data, "train")
        crop_scale, ratio, color_jitter = args.crop_scale or 1.0, (1.0, 1.0), args.color_jitter or None
    else:
        options = {"class_map": str(args.class_map)} if args.class_map else {}
        try:
            images = create_dataset(
                args.dataset, root=str(args.data), split=args.train_split or "train", input_img_mode=mode, **options
            )
        except Exception as error:  # timm and the libraries below it raise classes of every kind
            split = args.train_split or "train"
            raise DataError(f"--data {args.data}, --train-split {split}: {error}") from error
        crop_scale, ratio = args.crop_scale or 0.08, (3 / 4, 4 / 3)
        color_jitter = 0.4 if args.color_jitter is None else args.color_jitter or None
    if isinstance(images, IterableDataset):
        raise ConfigError(f"--dataset {args.dataset} is a stream: images are drawn by number here. Unpack it.")
    transform = create_transform(
        config["input_size"],
        is_training=True,
        scale=(crop_scale, 1.0),
        ratio=ratio,
        color_jitter=color_jitter,
        auto_augment=args.auto_augment,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
    return Augmented(images, transform, mode, num_classes, args.seed)


def evaluation_images(args: argparse.Namespace, config: dict[str, Any], num_classes: int, device: torch.device) -> Data:
    """Return this process's part of the test images, or of the training images behind the first --images."""
    split = args.eval_split
    if args.held_out:
        named = args.dataset or has_idx_files(args.data) or (args.data / "train").is_dir()
        split = args.train_split or ("train" if named else None)
    data = open_data(
        args.data,
        config,
        dataset=args.dataset,
        split=split,
        class_map=args.class_map,
        num_classes=num_classes,
        num_images=None if args.held_out else args.eval_images,
        rank=args.rank,
        world_size=args.world_size,
        batch_size=args.eval_batch_size,
        workers=args.workers,
        device=device,
    )
    if not data.labelled:
        raise DataError(f"--data {args.data}: there are no labels. Give images in one folder a class.")
    if args.held_out:
        behind = [index for index in data.indices if index >= args.images]
        data = data.subset(behind if args.eval_images is None else behind[: args.eval_images // args.world_size])
    return data


def in_step(batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """Yield each batch, and then None as long as another process has any: sharded models are run by all at once."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not any(gather(batch is not None)):
            return
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Models and what they are trained for


def build_model(args: argparse.Namespace) -> nn.Module:
    """Return the model to fine-tune, unpatched, with its weights, in eval mode."""
    if args.model not in MODELS:
        return load_model(
            args.model,
            checkpoint=args.checkpoint,
            num_classes=args.num_classes,
            img_size=args.img_size,
            in_chans=args.in_chans,
        )
    if args.checkpoint is None or not args.checkpoint.is_file():
        raise DataError(f"--model {args.model} needs weights of train_reference.py: --checkpoint {args.checkpoint}.")
    model: Any = create_model(args.model)
    try:
        load_checkpoint(model, str(args.checkpoint))
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise DataError(f"--checkpoint {args.checkpoint} does not fit --model {args.model}: {error}") from error
    model.pretrained_cfg = load_model(pretrained=False).pretrained_cfg  # the images are the built-in model's
    if getattr(model, "patch_drop", None) is not None:
        model.patch_drop.prob = 0.0  # it was for training from scratch
    return model.eval()


def has_dense_head(model: Any) -> bool:
    """Return whether the model is an LV-ViT, which classifies its image tokens in training."""
    return getattr(model, "aux_head", None) is not None and getattr(model, "return_dense", False)


class Teacher(nn.Module):
    """The model before patching: logits [B, num_classes], and probabilities of an LV-ViT's patches [B, N, num_classes].

    An LV-ViT's logits are those of its class token, as the student's are in training.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.dense = has_dense_head(model)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.dense:
            return self.model(x).float(), None
        tokens = self.model.forward_features(x)
        return self.model.head(tokens[:, 0]).float(), self.model.aux_head(tokens[:, 1:]).float().softmax(2)


def distillation_loss(output: Any, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence to the teacher's outputs at a temperature, times its square (Hinton et al. 2015).

    Where MixToken swapped a box, the student's class token saw two images, and the teacher's outputs for them are mixed
    by their shares, as labels are.
    """
    teacher = (teacher_logits / temperature).softmax(1)
    if not isinstance(output, Tensor):
        output, dense, box = output
        teacher = mix_by_box(teacher, box, dense.shape[1])
    student = (output.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean")


def parameter_groups(model: Any, weight_decay: float, layer_decay: float | None, fusion_lr_scale: float) -> list[dict]:
    """Return timm's parameter groups, with those of learned multi-scale fusion in one of their own.

    Their gates start at zero, and would hardly leave it at the learning rate of pretrained weights. Like other gains,
    they are not decayed.
    """
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip)
    else:
        groups = param_groups_layer_decay(model, weight_decay, skip, layer_decay=layer_decay)
    fusion = {parameter: None for name, parameter in model.named_parameters() if PART in name}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in fusion]
    groups.append({"params": list(fusion), "weight_decay": 0.0, "lr_scale": fusion_lr_scale})
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# The run


def gather(value: Any) -> list[Any]:
    """Return the value of each process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def write(path: Path, content: Any) -> None:
    """Write a file whole or not at all: text as it is, anything else by torch.save."""
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        torch.save(content, partial)
    partial.replace(path)


class Run:
    """A fine-tuning run: everything that it needs, and how far it is.

    Attributes:
        model: patched, trained.
        step: optimizer steps done.
        loss_sum: of the steps of this epoch, over all processes.
        history: the lines of the log.
    """

    def __init__(self, args: argparse.Namespace, config: MergeConfig, device: torch.device):
        self.args, self.config, self.device = args, config, device
        random_seed(args.seed)  # new classifiers and fusions are the same in each process
        self.model: Any = build_model(args).to(device)
        if has_dense_head(self.model):
            args.token_labels = args.token_labels or "image"
        elif args.token_labels:
            raise ConfigError(
                f"--token-labels {args.token_labels} needs a model that classifies its patches, such as LV-ViT, and "
                f"{type(self.model).__name__} does not. Leave it out."
            )
        if remembered(self.model).fusion and config.multi_scale != "learned":
            raise ConfigError(
                f"--checkpoint {args.checkpoint} has a learned fusion: --multi-scale learned goes on with it."
            )
        self._open_images()
        self.step, self.loss_sum, self.history = 0, torch.zeros((), device=device), []
        self.unpatched_right = self._right(self.model)
        self.teacher = Teacher(self.model) if args.distill or args.token_labels == "teacher" else None
        if args.grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        self.planned = self._config_at(0)
        random_seed(args.seed)
        plan(self.model, self.planned)
        self.ema = ModelEmaV3(self.model, decay=args.ema, foreach=not args.fsdp) if args.ema else None
        self._distribute()
        groups = parameter_groups(self.model, args.weight_decay, args.layer_decay, args.fusion_lr_scale)
        self.optimizer = create_optimizer_v2(groups, args.opt, lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.lr_warmup_epochs,
            warmup_lr=0.0,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=len(self.sampler),
        )

    def _open_images(self) -> None:
        args = self.args
        config = data_config(self.model, img_size=args.img_size)
        self.input_size = config["input_size"]
        images = training_images(args, config, self.model.num_classes)
        count = min(len(images), args.images or len(images))
        if count < args.batch_size:
            raise ConfigError(f"--batch-size {args.batch_size}: there are {count} images to train on. Give fewer.")
        self.sampler = GlobalBatches(count, args.batch_size, args.seed, args.rank, args.world_size)
        self.loader = DataLoader(
            images,
            batch_sampler=self.sampler,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        self.data = evaluation_images(args, config, self.model.num_classes, self.device)
        if not sum(gather(len(self.data))):
            raise DataError(f"There are no images to evaluate on behind the first --images {args.images}.")
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(
                args.mixup, args.cutmix, label_smoothing=args.label_smoothing, num_classes=self.model.num_classes
            )

    def _distribute(self) -> None:
        self.forward = self.model
        if self.args.fsdp:
            mesh = init_device_mesh(self.device.type, (self.args.world_size,))
            sharded = [self.model] + ([self.ema.module] if self.ema else [])
            for model in sharded:
                for block in find_adapter(model).blocks(model):
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            if self.teacher is not None:
                for block in find_adapter(self.teacher.model).blocks(self.teacher.model):
                    fully_shard(block, mesh=mesh)
                fully_shard(self.teacher, mesh=mesh)
        elif self.args.distributed:
            ids = [self.device] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)

    def _config_at(self, step: int) -> MergeConfig:
        return warmed_up(self.config, warmup_progress(step / len(self.sampler), self.args.warmup_epochs))

    def _plan(self, config: MergeConfig) -> None:
        if config != self.planned:
            apply(self.model, config)
            self.planned = config

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bfloat16)

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """Go on to the end, from wherever the run is."""
        if not self.history:
            self._end_epoch(0)
        steps = self.args.epochs * len(self.sampler)
        bar = tqdm(total=steps, initial=self.step, desc="fine-tuning", unit="step", disable=self.args.rank > 0)
        while self.step < steps:
            epoch, self.sampler.first = divmod(self.step, len(self.sampler))
            self.sampler.epoch = epoch
            self._train_mode()
            for images, labels in self.loader:
                self.take_step(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
                bar.update()
                if self.step % self.args.save_every == 0 and self.step % len(self.sampler):
                    self.save()
            self._end_epoch(epoch + 1)
            self.save()
        bar.close()

    def _train_mode(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                # With the statistics that the weights were trained with: those of a small batch are worse, and would
                # make the result depend on how many processes share the batch.
                module.eval()

    def take_step(self, images: Tensor, labels: Tensor) -> None:
        """Do one optimizer step on this process's part of a batch: [B, C, H, W] and class indices [B]."""
        seed = seed_of(self.args.seed, self.step)
        # All processes mix the same way; on CUDA, dropout is each one's own.
        random_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed + self.args.rank)
        self._plan(self._config_at(self.step))
        self.scheduler.step_update(self.step)
        if self.mixup is None:
            target = soft_labels(labels, self.model.num_classes, self.args.label_smoothing)
        else:
            images, target = self.mixup(images, labels)
        with self._autocast():
            loss = self._loss(images, target)
        loss.backward()
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        loss = loss.detach()
        self.loss_sum += reduce_tensor(loss, self.args.world_size) if self.args.distributed else loss

    def _loss(self, images: Tensor, target: Tensor) -> Tensor:
        taught, token_target = (None, None) if self.teacher is None else self.teacher(images)
        output = self.forward(images)
        loss = label_loss(output, target, token_target if self.args.token_labels == "teacher" else None)
        if self.args.distill:
            distilled = distillation_loss(output, taught, self.args.temperature)
            loss = (1 - self.args.distill) * loss + self.args.distill * distilled
        return loss

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    @torch.no_grad()
    def _right(self, model: nn.Module) -> Tensor:
        """Return which of this process's images are classified right: [images that can be read], bool."""
        model.eval()
        right = [torch.zeros(0, dtype=torch.bool)]
        for batch in in_step(self.data.batches()):
            with self._autocast():
                nothing = torch.zeros(1, *self.input_size, device=self.device)
                output = model(nothing if batch is None else batch.images)
            if batch is not None:
                right.append((output.argmax(1) == batch.labels).cpu())
        return torch.cat(right)

    def _compared(self, model: nn.Module, prefix: str = "") -> dict[str, Any]:
        """Return top-1 of a model at the target's keep rate, and its difference to the unpatched one."""
        right, before = self._right(model), self.unpatched_right
        counts = gather([len(right), *(int(x.sum()) for x in (right, right & ~before, before & ~right))])
        images, top1, gained, lost = (sum(column) for column in zip(*counts, strict=True))
        return {
            f"{prefix}top1": top1 / images,
            f"{prefix}top1_difference": (gained - lost) / images,
            f"{prefix}top1_interval": paired_interval(gained, lost, images),
        }

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, and write the epoch's line and the weights."""
        rate, loss = self.planned.keep_rate, float(self.loss_sum) / len(self.sampler)
        line: dict[str, Any] = {"epoch": epoch, "step": self.step}
        if epoch:
            line |= {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], "keep_rate": rate}
        self._check_loss()
        self._plan(self.config)
        line |= self._compared(self.model)
        if self.ema is not None:
            apply(self.ema.module, self.config)
            line |= self._compared(self.ema.module, "ema_")
        self.loss_sum.zero_()
        self.history.append(line)
        text = json.dumps(line)
        if self.args.rank == 0:
            tqdm.write(text, file=sys.stdout)
            write(self.args.output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
            write(self.args.output / "token-merge.json", self.config.to_json())
        if epoch:
            self._save_weights(epoch)

    def _check_loss(self) -> None:
        if not self.loss_sum.isfinite():
            raise ConfigError(
                f"The loss is no number any more, within {self.args.save_every} steps of step {self.step}. Give a "
                f"smaller --lr than {self.args.lr}, and --clip-grad 1."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    @property
    def _options(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, cpu_offload=True)

    def _save_weights(self, epoch: int) -> None:
        models = {"": self.model} | ({"_ema": self.ema.module} if self.ema else {})
        states = {suffix: get_model_state_dict(model, options=self._options) for suffix, model in models.items()}
        if self.args.rank > 0:
            return
        weights: dict[str, Any] = {"epoch": epoch, CONFIG_KEY: self.config.to_json()}
        weights |= {f"state_dict{suffix}": state for suffix, state in states.items()}
        write(self.args.output / "weights.pth", weights)

    def save(self) -> None:
        """Write everything that the run needs to go on. Random numbers follow from the step."""
        self._check_loss()
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self._options)
        ema = None if self.ema is None else get_model_state_dict(self.ema.module, options=self._options)
        if self.args.rank == 0:
            state = {"model": model, "optimizer": optimizer, "ema": ema}
            position = {"step": self.step, "loss_sum": self.loss_sum.item(), "history": self.history}
            write(self.args.output / "last.checkpoint", {"run": self.args.run} | position | state)

    def resume(self, saved: dict[str, Any]) -> None:
        """Go back to a position that `save` wrote."""
        # Not broadcast_from_rank0: with gloo and FSDP2 it was seen to wait for ever.
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, saved["ema"], options=options)
        self.step, self.history = saved["step"], saved["history"]
        self.loss_sum.fill_(saved["loss_sum"])


def read_checkpoint(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what `Run.save` wrote, None if there is nothing yet.

    Raises:
        ConfigError: it is that of a run with other options, or not all processes find it.
    """
    path = args.output / "last.checkpoint"
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if len(set(gather(saved and saved["step"]))) > 1:
        raise ConfigError(f"--output {args.output} is not the same folder for all processes. Give one that all share.")
    if saved is not None and saved["run"] != args.run:
        run = saved["run"]
        other = [f"--{name.replace('_', '-')} {run.get(name)}" for name in args.run if run.get(name) != args.run[name]]
        raise ConfigError(
            f"{args.output} holds a run with {', '.join(other)}. Give the same options to go on with it, or another "
            "--output."
        )
    return saved


def finetune(args: argparse.Namespace, config: MergeConfig, device: torch.device) -> None:
    """Run from the beginning, or go on where an earlier run of the same options was interrupted."""
    args.output.mkdir(parents=True, exist_ok=True)
    saved = read_checkpoint(args)
    if saved is not None and saved["history"][-1]["epoch"] == args.epochs:
        if args.rank == 0:
            print(f"{args.output} holds the whole run: nothing is left to do.", file=sys.stderr)
        return
    run = Run(args, config, device)
    if saved is not None:
        run.resume(saved)
    del saved
    run.train()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_objective_arguments(parser)
    add_optimizer_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, required=True, help="folder of the results")
    group.add_argument("--epochs", type=int, default=30)
    group.add_argument("--batch-size", type=int, default=128, help="images of a step, over all processes")
    group.add_argument("--eval-batch-size", type=int, default=100, help="images of a forward pass in evaluation")
    group.add_argument("--bfloat16", action="store_true", help="autocast to it")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--fsdp", action="store_true", help="under torchrun, share the weights out (FSDP2)")
    group.add_argument("--save-every", type=int, default=200, help="steps between two checkpoints")
    group.add_argument("--workers", type=int, default=DEFAULT_WORKERS, help="processes that read images")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    names = f"timm's name, or one of train_reference.py: {', '.join(MODELS)} (default: the built-in model)"
    group.add_argument("--model", help=names)
    group.add_argument("--checkpoint", type=Path, help="weights to start from (default: timm's pretrained ones)")
    group.add_argument("--num-classes", type=int)
    group.add_argument("--img-size", type=int)
    group.add_argument("--in-chans", type=int)
    group = parser.add_argument_group("token merging")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--keep-rate", type=float, default=0.7, help="of each stage; 1 for the unpatched model")
    either.add_argument("--config", type=Path, help="JSON of `token-merge calibrate`")
    group.add_argument("--multi-scale", choices=("learned", "off"), help="fusion of several scales into the tokens")
    group.add_argument("--warmup-epochs", type=float, default=0.0, help="keep rates fall from 1 meanwhile")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument("--data", type=Path, required=True, help="folder of images or of Fashion-MNIST's IDX files")
    group.add_argument("--dataset", default="", help="name of a data set as timm's create_dataset takes it")
    group.add_argument("--train-split", help="default: train")
    group.add_argument("--eval-split", help="default: validation, if there are splits")
    group.add_argument("--class-map", type=Path, help="one folder name a line, in the order of the model's classes")
    group.add_argument("--images", type=int, help="train on the first so many")
    group.add_argument("--held-out", action="store_true", help="evaluate on the training images behind these")
    group.add_argument("--eval-images", type=int, help="evaluate on so many")
    group.add_argument("--crop-scale", type=float, help="smallest share of a random crop (default: 0.08; of IDX, 1)")
    group.add_argument("--color-jitter", type=float, help="its strength (default: 0.4; of IDX, 0)")
    group.add_argument("--auto-augment", help="timm's name of a policy, such as rand-m9-mstd0.5-inc1")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA")


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss")
    group.add_argument("--label-smoothing", type=float, default=0.1)
    group.add_argument("--distill", type=float, default=0.0, metavar="ALPHA", help="share of the unpatched model's")
    group.add_argument("--temperature", type=float, default=1.0, help="of distillation")
    labels = "of an LV-ViT's patches: their image's, or the unpatched model's own outputs (default: image)"
    group.add_argument("--token-labels", choices=("image", "teacher"), help=labels)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="timm's name of it")
    group.add_argument("--lr", type=float, default=1e-4, help="peak, used as it is with any batch size")
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--layer-decay", type=float, help="factor of the learning rate from layer to layer")
    group.add_argument("--fusion-lr-scale", type=float, default=10.0, help="of learned fusion, by that of the rest")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradients; 0 for any")
    group.add_argument("--sched", default="cosine", choices=("cosine", "tanh", "poly", "constant"))
    group.add_argument("--lr-warmup-epochs", type=float, default=0.0)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, too, such as 0.9998")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if a number is outside of its range, or options do not go together."""
    positive = {"--epochs", "--batch-size", "--eval-batch-size", "--save-every", "--images", "--eval-images"}
    for names, fits, allowed in (
        (positive | {"--temperature", "--lr", "--fusion-lr-scale"}, lambda x: x > 0, "above 0"),
        (("--warmup-epochs", "--lr-warmup-epochs", "--workers", "--seed", "--min-lr"), lambda x: x >= 0, "0 or more"),
        (("--weight-decay", "--clip-grad", "--mixup", "--cutmix", "--color-jitter"), lambda x: x >= 0, "0 or more"),
        (("--distill",), lambda x: 0 <= x <= 1, "in [0, 1]"),
        (("--label-smoothing",), lambda x: 0 <= x < 1, "in [0, 1)"),
        (("--ema",), lambda x: 0 < x < 1, "in (0, 1)"),
        (("--layer-decay", "--crop-scale"), lambda x: 0 < x <= 1, "in (0, 1]"),
    ):
        for name in names:
            value = getattr(args, name[2:].replace("-", "_"))
            if value is not None and not fits(value):
                parser.error(f"{name} {value}: give a number {allowed}.")
    if args.opt not in list_optimizers():
        close = ", ".join(difflib.get_close_matches(args.opt, list_optimizers())) or "adamw, sgd, muon"
        parser.error(f"--opt {args.opt} is no optimizer of timm. Names it knows: {close}.")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}.")
    if args.held_out and not args.images:
        parser.error("--held-out needs --images: the images behind the first so many are held out.")


def check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    pairs = 2 * args.world_size
    if args.batch_size % pairs:
        parser.error(
            f"--batch-size {args.batch_size} is shared by {args.world_size} process(es), in pairs of images. Give a "
            f"multiple of {pairs}."
        )
    if args.fsdp and not args.distributed:
        parser.error("--fsdp shares the weights among processes: start them with torchrun.")


def target_config(args: argparse.Namespace) -> MergeConfig:
    """Return what the model is patched by in the end.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """
    options = {} if args.multi_scale is None else {"multi_scale": args.multi_scale}
    if args.config is None:
        return MergeConfig(args.keep_rate, **options)
    try:
        text = args.config.read_text()
    except OSError as error:
        raise ConfigError(f"--config {args.config} cannot be read: {error.strerror}.") from error
    config = MergeConfig.of(MergeConfig.from_json(text), **options)
    if config.r is not None and args.warmup_epochs:
        raise ConfigError(f"--warmup-epochs warms keep rates up, and --config {args.config} has r={config.r} instead.")
    return config


def main(arguments: list[str] | None = None) -> int:
    parser = create_parser()
    args = parser.parse_args(arguments)
    args.run = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    check_arguments(parser, args)
    keep_freed_memory()
    try:
        config = target_config(args)
        args.run = {name: str(value) for name, value in args.run.items()} | {"config": config.to_json()}
        device = init_distributed_device(args)
        check_processes(parser, args)
        finetune(args, config, device)
    except TokenMergeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if dist.is_initialized():
        dist.barrier()  # or the first process to end takes the connection from the others
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
