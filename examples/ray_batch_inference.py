r"""Predictions or embeddings of many images, by patched models on several machines, with Ray Data.

    python examples/ray_batch_inference.py --data photos --output predictions --workers 2
    python examples/ray_batch_inference.py --data shards --output embeddings --embeddings --address auto --workers 8 \
        --model deit_small_patch16_224.fb_in1k --keep-rate 0.7 --batch-size 256

The data are a folder of images, or Parquet files (or a folder of them) with encoded images in a column, as Hugging
Face's data sets have them. Each worker is an actor with one patched model; where the cluster has GPUs, each has one.
All machines must see the data and the output under the same paths.

The output folder holds Parquet files, one for each batch, with a row for each image:
    path, row    its file, relative to the folder, and its row there (-1 for an image file)
    error        why it could not be read, or null
    label, score the class, and its probability; or, with --embeddings,
    embedding    what the head of the classifier is given
A batch's file is there whole or not at all. The same command goes on after an interruption: rows that are there are
not done again. `pyarrow.parquet.read_table(output)` or `ray.data.read_parquet(output)` reads all of it.

At the end it says how many images a second each worker did; and how many its model does, unpatched and patched,
measured in turns on the worker's first batch.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions
from torch import Tensor

from token_merge_plugin import MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, TokenMergeError, counted, first_line
from token_merge_plugin.trial.fusion import with_fusion
from token_merge_plugin.trial.measuring import plan, time_in_turns
from token_merge_plugin.trial.models import data_config, load_model

# File and row: -1 for a file that is the image.
Item = tuple[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--column", default="image", help="of Parquet files, with encoded images (default: image)")
    parser.add_argument("--embeddings", action="store_true", help="instead of predictions")
    parser.add_argument("--model", help="as timm names it; the built-in one if it is left out")
    parser.add_argument("--checkpoint", type=Path, help="file of weights, instead of the pretrained ones")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--config", type=Path, help="of token-merge calibrate, instead of --keep-rate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="of each worker, which reads images with as many threads")
    parser.add_argument("--address", help="of a Ray cluster; one is started on this machine if it is left out")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except TokenMergeError as error:
        raise SystemExit(f"ray_batch_inference: {error}") from error


def run(args: argparse.Namespace) -> None:
    config = MergeConfig.from_json(args.config.read_text()) if args.config else MergeConfig(args.keep_rate)
    # Workers have working directories of their own.
    data, output = args.data.resolve(), args.output.resolve()
    checkpoint = args.checkpoint and str(args.checkpoint.resolve())
    job = {
        "model": {
            "name": args.model,
            "checkpoint": checkpoint,
            "num_classes": args.num_classes,
            "img_size": args.img_size,
        },
        "config": config.to_json(),
        "embeddings": args.embeddings,
        "column": args.column,
    }
    items = find_images(data, args.column)
    done = finished(output, job)
    left = [item for item in items if item not in done]
    print(f"{counted(len(items), 'image')}, of which {len(items) - len(left)} are done.", flush=True)
    if not left:
        return
    batches = [left[start : start + args.batch_size] for start in range(0, len(left), args.batch_size)]

    ray.init(args.address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    there = ray.cluster_resources()
    needed = {"CPU": args.cpus, "GPU": int("GPU" in there)}
    for kind, number in needed.items():
        if there.get(kind, 0) < args.workers * number:
            raise ConfigError(
                f"{args.workers} workers of {number} {kind} each do not fit into a cluster with {there[kind]:.0f}. "
                "Give fewer, with --workers and --cpus."
            )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    results = ray.data.from_items(
        [{"paths": [path for path, _ in batch], "rows": [row for _, row in batch]} for batch in batches],
        override_num_blocks=len(batches),
    ).map(
        Worker,
        fn_constructor_args=(data, output, job, args.cpus),
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=needed["GPU"],
    )
    report(results.iter_rows(), len(left))


def report(results: Iterator[dict[str, Any]], images: int) -> None:
    """Print progress while batches are done, and what each worker did when all are."""
    workers: dict[str, list[dict[str, Any]]] = {}
    ready = unreadable = 0
    begin = time.perf_counter()
    for result in results:
        workers.setdefault(result["worker"], []).append(result)
        ready, unreadable = ready + result["images"], unreadable + len(result["errors"])
        for error in result["errors"]:
            print(f"unreadable: {error}", file=sys.stderr)
        speed = ready / (time.perf_counter() - begin)
        print(f"{ready} of {images} images, {unreadable} unreadable, {speed:.0f} images/s", flush=True)
    print("\n| worker | images | images/s | model alone, unpatched | patched |\n|---|---:|---:|---:|---:|")
    for name, of_worker in sorted(workers.items()):
        number = sum(result["images"] for result in of_worker)
        alone = of_worker[-1]
        print(
            f"| {name} | {number} | {number / sum(result['seconds'] for result in of_worker):.1f} "
            f"| {alone['unpatched']:.1f} | {alone['patched']:.1f} |"
        )


def find_images(data: Path, column: str) -> list[Item]:
    """Return all images of a folder, or of a Parquet file or a folder of them, in an order that is always the same.

    Raises:
        DataError: there are none, or a Parquet file is damaged or has no such column.
    """
    files = [data] if data.is_file() else sorted(path for path in data.rglob("*") if not path.is_dir())
    tables = [path for path in files if path.suffix == ".parquet"]
    items = []
    for path in tables or [path for path in files if path.suffix.lower() in (*get_img_extensions(), ".webp", ".bmp")]:
        name = str(path.relative_to(_root(data)))
        items += [(name, row) for row in range(_number_of_rows(path, column))] if tables else [(name, -1)]
    if not items:
        raise DataError(f"{data} has no images and no Parquet files. Give a folder that has, or a Parquet file.")
    return items


def _root(data: Path) -> Path:
    """Return the folder to which paths are relative."""
    return data if data.is_dir() else data.parent


def _number_of_rows(table: Path, column: str) -> int:
    try:
        metadata, names = pq.read_metadata(table), pq.read_schema(table).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} is no Parquet file: {first_line(error)}. Take it away or mend it.") from error
    if column not in names:
        raise DataError(f"{table} has no column {column!r}. Give one of {', '.join(names)} with --column.")
    return metadata.num_rows


def finished(output: Path, job: dict[str, Any]) -> set[Item]:
    """Return what the output folder has already, and note there what it is for.

    Raises:
        DataError: it has results of another model, or with other options.
    """
    output.mkdir(parents=True, exist_ok=True)
    note = output / "_job.json"  # readers of Parquet pass over names that begin like this
    if note.exists() and json.loads(note.read_text()) != job:
        raise DataError(f"{output} has results with other options: {note.read_text()}. Give another --output.")
    _write(note, json.dumps(job).encode())
    done: set[Item] = set()
    for part in output.glob("part-*.parquet"):
        table = pq.read_table(part, columns=["path", "row"])
        done.update(zip(table["path"].to_pylist(), table["row"].to_pylist(), strict=True))
    return done


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also if several processes do."""
    unfinished = path.with_name(f"_{path.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


class Worker:
    """One model, patched, that takes batches of images and writes a file for each: an actor of Ray.

    Args:
        data: the folder or file.
        output: the folder of the results.
        job: model, config, column and kind of result.
        threads: that read images.
    """

    def __init__(self, data: Path, output: Path, job: dict[str, Any], threads: int = 1):
        self.root, self.output, self.job = _root(data), output, job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_model(**job["model"]).to(self.device)
        if not (job["embeddings"] or self.model.num_classes):
            raise ConfigError(f"{job['model']['name']} has no classes to predict. Ask for --embeddings.")
        self.config = with_fusion(MergeConfig.from_json(job["config"]), self.model)
        plan(self.model, self.config)
        prepared = data_config(self.model)
        self.mode = "L" if prepared["input_size"][0] == 1 else "RGB"
        self.transform = create_transform(**prepared)
        kind = (
            [("embedding", pa.list_(pa.float32()))]
            if job["embeddings"]
            else [("label", pa.int64()), ("score", pa.float32())]
        )
        self.schema = pa.schema([("path", pa.string()), ("row", pa.int64()), ("error", pa.string()), *kind])
        self.pool = ThreadPoolExecutor(threads)
        self.group_sizes, self.row_group = lru_cache(maxsize=2)(_group_sizes), lru_cache(maxsize=2)(_row_group)
        self.speeds: tuple[float, float] | None = None  # images a second of the model, unpatched and patched

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do one batch, {"paths": [...], "rows": [...]}, and return what is to be said of it."""
        items = list(zip(map(str, batch["paths"]), map(int, batch["rows"]), strict=True))
        begin = time.perf_counter()
        read = list(self.pool.map(self.read, items))
        rows: list[dict[str, Any]] = [
            {"path": path, "row": row, "error": image if isinstance(image, str) else None}
            for (path, row), image in zip(items, read, strict=True)
        ]
        images = [image for image in read if isinstance(image, Tensor)]
        if images:
            stacked = torch.stack(images).to(self.device)
            readable = [row for row in rows if row["error"] is None]
            for row, result in zip(readable, self.results(stacked), strict=True):
                row.update(result)
        self.write(items, rows)
        seconds = time.perf_counter() - begin
        if images and self.speeds is None:
            self.speeds = self.measure(stacked)
        unpatched, patched = self.speeds or (math.nan, math.nan)
        return {
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "images": len(items),
            "errors": [f"{_name(item)}: {row['error']}" for item, row in zip(items, rows, strict=True) if row["error"]],
            "seconds": seconds,
            "unpatched": unpatched,
            "patched": patched,
        }

    def read(self, item: Item) -> Tensor | str:
        """Return an image as the model takes it, or why it cannot be read."""
        path, row = self.root / item[0], item[1]
        try:
            source: Any = path if row < 0 else io.BytesIO(self.encoded(path, row))
            with Image.open(source) as image:
                return self.transform(image.convert(self.mode))
        except Exception as error:  # damaged files raise what they like
            return f"{type(error).__name__}: {first_line(error)}"

    def encoded(self, path: Path, row: int) -> bytes:
        """Return the image in a row of a Parquet file: bytes, or Hugging Face's {"bytes": ..., "path": ...}."""
        group, sizes = 0, self.group_sizes(path)
        while row >= sizes[group]:
            row, group = row - sizes[group], group + 1
        value = self.row_group(path, group, self.job["column"])[row].as_py()
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise DataError("There is no image in this row.")
        return value

    @torch.inference_mode()
    def results(self, images: Tensor) -> list[dict[str, Any]]:
        """Return what the output has of each image of a batch [B, C, H, W]."""
        if self.job["embeddings"]:
            embeddings = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
            return [{"embedding": embedding} for embedding in embeddings.float().tolist()]
        score, label = self.model(images).float().softmax(dim=1).max(dim=1)
        return [{"label": i, "score": p} for i, p in zip(label.tolist(), score.tolist(), strict=True)]

    def measure(self, images: Tensor) -> tuple[float, float]:
        """Return how many images a second the model does, unpatched and patched."""
        times = time_in_turns(self.model, [None, self.config], images, rounds=5, seconds=10)
        plan(self.model, self.config)
        unpatched, patched = (len(images) / statistics.median(of_config) for of_config in times)
        return unpatched, patched

    def write(self, items: list[Item], rows: list[dict[str, Any]]) -> None:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, self.schema), file)
        # By what is in it: a batch that Ray has done twice, since a machine was lost, is there once.
        name = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]
        _write(self.output / f"part-{name}.parquet", file.getvalue())


def _name(item: Item) -> str:
    path, row = item
    return path if row < 0 else f"{path}, row {row}"


def _group_sizes(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _row_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)


if __name__ == "__main__":
    main()
