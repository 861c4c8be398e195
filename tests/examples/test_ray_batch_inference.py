"""examples/ray_batch_inference.py: on a cluster of two workers, killed in the middle, against one process."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from checks import EXAMPLES, draw
from PIL import Image
from ray_batch_inference import Worker, find_images, finished, main
from timm.data import create_transform

from token_merge_plugin import apply
from token_merge_plugin.errors import DataError
from token_merge_plugin.trial.models import data_config, load_model

NUMBER, BROKEN, STUCK = 30, 7, 20
JOB = {
    "model": {"name": "test_vit", "num_classes": 5, "img_size": 64},
    "config": '{"keep_rate": 0.6}',
    "embeddings": True,
    "column": "image",
}


@pytest.fixture
def cluster(monkeypatch):
    """Start Ray with two CPUs: two workers."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it leaves a token in the home folder
    # The workers import the script under the name that this module does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH")))))
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def photographs(tmp_path):
    """A folder of small images, in two folders, one of which is no image."""
    for number in range(NUMBER):
        path = tmp_path / "photographs" / f"{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number, (60, 70)).save(path)
    path_of(tmp_path / "photographs", BROKEN).write_bytes(b"no image")
    return tmp_path / "photographs"


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = load_model("test_vit", pretrained=False, num_classes=5, img_size=64)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def path_of(folder, number):
    return folder / f"{number % 2}" / f"{number:02}.png"


def of_one_process(checkpoint, folder, embeddings):
    """Return {path: what a loop over the images makes of each}."""
    model = apply(load_model("test_vit", checkpoint=checkpoint, num_classes=5, img_size=64), 0.6)
    transform, results = create_transform(**data_config(model)), {}
    for number in set(range(NUMBER)) - {BROKEN}:
        path = path_of(folder, number)
        with torch.no_grad(), Image.open(path) as image:
            features = model.forward_features(transform(image)[None])
            results[str(path.relative_to(folder))] = model.forward_head(features, pre_logits=embeddings)[0]
    return results


def rows(output):
    """Return {path: row} of all results; each image is there once."""
    table = [row for part in output.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    assert len({(row["path"], row["row"]) for row in table}) == len(table)
    return {row["path"]: row for row in table}


@pytest.mark.cluster
def test_a_killed_run_goes_on_to_what_one_process_gives(cluster, photographs, checkpoint, tmp_path, capsys):
    output = tmp_path / "embeddings"
    arguments = ["--data", str(photographs), "--output", str(output), "--embeddings", "--keep-rate", "0.6"]
    arguments += ["--batch-size", "4", "--address", cluster, "--checkpoint", checkpoint]
    arguments += ["--model", "test_vit", "--num-classes", "5", "--img-size", "64"]
    command = [sys.executable, EXAMPLES / "ray_batch_inference.py", *arguments]
    stuck = path_of(photographs, STUCK)
    image = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as killed:
        try:
            deadline = time.monotonic() + 800
            while not list(output.glob("part-*.parquet")):
                assert killed.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        finally:
            killed.send_signal(signal.SIGKILL)
    stuck.unlink()
    stuck.write_bytes(image)

    with pytest.raises(SystemExit, match="3 workers of 1 CPU each do not fit into a cluster with 2"):
        main([*arguments, "--workers", "3"])
    capsys.readouterr()
    before = {part: part.stat().st_mtime_ns for part in output.glob("part-*.parquet")}
    done, broken_before = len(rows(output)), f"1/{BROKEN:02}.png" in rows(output)
    assert 0 < done < NUMBER
    main([*arguments, "--workers", "2"])
    said = capsys.readouterr()
    assert {part: part.stat().st_mtime_ns for part in before} == before
    found = rows(output)
    assert set(found) == {str(path_of(photographs, number).relative_to(photographs)) for number in range(NUMBER)}
    broken = found.pop(f"1/{BROKEN:02}.png")
    assert broken["embedding"] is None
    assert "cannot identify image file" in broken["error"]
    for path, expected in of_one_process(checkpoint, photographs, embeddings=True).items():
        assert found[path]["error"] is None
        torch.testing.assert_close(torch.tensor(found[path]["embedding"]), expected, rtol=1e-4, atol=1e-5)
    assert (f"unreadable: 1/{BROKEN:02}.png: UnidentifiedImageError" in said.err) is not broken_before
    assert f"{NUMBER} images, of which {done} are done.\n" in said.out
    assert f"\n{NUMBER - done} of {NUMBER - done} images, {int(not broken_before)} unreadable" in said.out
    speeds = [line.split("|")[3:6] for line in said.out.splitlines() if line.startswith("|") and ":" in line][1:]
    assert 1 <= len(speeds) <= 2
    assert all(float(speed) > 0 for of_worker in speeds for speed in of_worker)

    main(arguments)
    assert capsys.readouterr().out == f"{NUMBER} images, of which {NUMBER} are done.\n"


def test_rows_of_parquet_files_are_predicted_and_the_unreadable_ones_reported(photographs, checkpoint, tmp_path):
    table, output = tmp_path / "images.parquet", tmp_path / "predictions"
    encoded = [{"bytes": path_of(photographs, number).read_bytes(), "path": None} for number in range(NUMBER)]
    encoded[3] = None
    pq.write_table(pa.table({"image": encoded}), table, row_group_size=7)
    job = JOB | {"embeddings": False, "model": JOB["model"] | {"checkpoint": checkpoint}}
    items = find_images(table, "image")
    assert items == [("images.parquet", row) for row in range(NUMBER)]
    with pytest.raises(DataError, match=r"no column 'picture'. Give one of image"):
        find_images(table, "picture")
    assert finished(output, job) == set()
    worker = Worker(table, output, job, threads=2)
    said = worker({"paths": [path for path, _ in items], "rows": [row for _, row in items]})
    assert said["images"] == NUMBER
    assert [error.partition(":")[0] for error in said["errors"]] == [
        "images.parquet, row 3",
        f"images.parquet, row {BROKEN}",
    ]
    assert finished(output, job) == set(items)
    (part,) = output.glob("part-*.parquet")
    found = pq.read_table(part).to_pylist()
    logits = of_one_process(checkpoint, photographs, embeddings=False)
    for number, row in enumerate(found):
        if number in (3, BROKEN):
            assert row["error"]
            assert (row["label"], row["score"]) == (None, None)
        else:
            score, label = logits[str(path_of(photographs, number).relative_to(photographs))].softmax(dim=0).max(dim=0)
            assert (row["error"], row["label"]) == (None, label)
            assert row["score"] == pytest.approx(score.item(), rel=1e-4)


def test_results_with_other_options_and_folders_without_images_are_refused(tmp_path):
    assert finished(tmp_path / "results", JOB) == set()
    with pytest.raises(DataError, match="results with other options"):
        finished(tmp_path / "results", JOB | {"embeddings": False})
    with pytest.raises(DataError, match="has no images"):
        find_images(tmp_path / "results", "image")
    (tmp_path / "some.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"some\.parquet is no Parquet file"):
        find_images(tmp_path, "image")
