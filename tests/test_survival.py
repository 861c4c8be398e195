"""What a server does to a model for weeks, in seconds: threads, patching again and again, bad images, interrupts.

    pytest -m sweep tests/test_survival.py tests/test_fuzz.py

does so for minutes, and prints the table of examples/results/survival.md.
"""

import copy
import gc
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from checks import contents, interrupted, set_fused_attention, shapes
from families import DIFFERENT, FAMILIES, KINDS, images, make

import token_merge_plugin
from token_merge_plugin import apply, remove
from token_merge_plugin.config import METHODS

FIRST = [next(iter(table)) for table in FAMILIES.values()]
# One model of each family, and with `pytest -m sweep` all of the table.
first_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FIRST else pytest.mark.sweep) for kind in KINDS]
)


# Threads.


def stress(kinds, seconds):
    """Run models in 8 threads while another one patches copies of them; return (requests, patches, what was wrong)."""
    torch.manual_seed(0)
    models = [apply(make(kind), 0.6) for kind in kinds]
    with torch.no_grad():
        requests = [(m, images(kind, batch=1 + s % 4, seed=s)) for m, kind in enumerate(kinds) for s in range(8)]
        expected = [models[m](x) for m, x in requests]
        unpatched = [remove(copy.deepcopy(models[m]))(x) for m, x in requests]
    wrong, counts = [], Counter()
    end = threading.Event()

    def until_the_end(name, work):
        torch.set_num_threads(1)  # of this thread
        order = random.Random(name)
        with torch.no_grad():
            while not end.is_set() and not wrong:
                try:
                    work(order)
                except BaseException as error:
                    wrong.append(f"{name}: {error!r}")
                counts[name] += 1

    def serve(order):
        i = order.randrange(len(requests))
        m, x = requests[i]
        assert torch.equal(models[m](x), expected[i]), f"request {i}"

    def patch(order):
        i = order.randrange(len(requests))
        m, x = requests[i]
        twin = copy.deepcopy(models[m])
        assert torch.equal(apply(twin, order.choice((0.3, 0.6, 0.9)))(x), apply(twin, 1.0)(x)) is False
        assert torch.equal(apply(twin, 0.6)(x), expected[i]), f"copy {i}"
        assert torch.equal(remove(twin)(x), unpatched[i]), f"removed {i}"

    workers = [threading.Thread(target=until_the_end, args=(f"server {n}", serve)) for n in range(8)]
    workers.append(threading.Thread(target=until_the_end, args=("patcher", patch)))
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    end.set()
    for worker in workers:
        worker.join()
    patches = counts.pop("patcher")
    return counts.total(), patches, wrong


def test_eight_threads_get_what_one_does_while_copies_are_patched():
    requests, patches, wrong = stress(["ViT"], seconds=1.5)
    assert not wrong
    assert requests > 8
    assert patches


@pytest.mark.sweep
def test_eight_threads_for_a_minute(record_property):
    begin = time.perf_counter()
    requests, patches, wrong = stress(["ViT", "EVA-02", "Swin", "CaiT"], seconds=60)
    seconds = time.perf_counter() - begin
    record_property("figures", ("requests in 8 threads", requests, seconds, len(wrong)))
    record_property("figures", ("apply and remove on copies meanwhile", 3 * patches, seconds, len(wrong)))
    assert not wrong


# Leaks.


def objects():
    gc.collect()
    return Counter(type(thing).__qualname__ for thing in gc.get_objects())


def resident():
    """Return the memory of this process that is in use, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256


def grown(work, times):
    """Return by how many objects of each type, and how many MiB, a process grows that does something so many times."""
    objects()
    for _ in range(20):
        work()
    before, memory = objects(), resident()
    for _ in range(times):
        work()
    memory = resident() - memory
    return {name: number for name, number in (objects() - before).items() if number > times / 10}, memory


LEAKS = {
    "apply and remove": lambda model, x: lambda: remove(apply(model, 0.6)),
    "apply again": lambda model, x: lambda: apply(model, 0.6, multi_scale="learned"),
    "forward passes": lambda model, x: lambda: model(x),
    "training steps": lambda model, x: lambda: model(x).sum().backward(),
    "passes that fail": lambda model, x: failing(model, x),
}


def failing(model, x):
    """Return what begins a pass that ends behind its first stage."""

    def fail(*_):
        raise RuntimeError("on purpose")

    def work():
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)

    model.blocks[0].register_forward_hook(fail)
    return work


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("what", LEAKS)
def test_nothing_is_left_over(what, times, record_property):
    model = timm.create_model("test_vit", depth=2, num_classes=3, img_size=32, patch_size=4).eval()
    if what != "apply and remove":
        apply(model, {0: 0.6})
    begin = time.perf_counter()
    objects, memory = grown(LEAKS[what](model, torch.randn(1, 3, 32, 32)), times)
    name = f"{what}: {sum(objects.values())} objects and {max(memory, 0):.1f} MiB more"
    if times == 1000:
        record_property("figures", (name, times, time.perf_counter() - begin, int(bool(objects))))
    assert not objects
    assert memory < 4 + times / 100  # the mask of a pass has 16 KiB


# Numbers that are none, too large, or equal.

BAD = {
    "NaN": lambda x: x.index_fill(2, torch.tensor([0]), float("nan")),
    "infinite": lambda x: x.index_fill(3, torch.tensor([1, 2]), float("inf")),
    "huge": lambda x: x * (torch.finfo(x.dtype).max / 8),
    "equal": lambda x: torch.full_like(x, 0.5),
}


def spoiled(x):
    """Return a batch whose first and last images are left as they are, and the others are bad."""
    beside = [spoil(x[i : i + 1]) for i, spoil in enumerate(BAD.values(), start=1)]
    return torch.cat((x[:1], *beside, x[-1:]))


def among_themselves(model, x, autocast=None):
    """Return whether bad images leave the others of their batch as they are. None raises, or changes a shape."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        alone, beside = model(x), model(spoiled(x))
    assert shapes(beside) == shapes(alone)
    return torch.equal(beside[0], alone[0]) and torch.equal(beside[-1], alone[-1])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


BATCH = len(BAD) + 2


@first_kinds
@torch.no_grad()
def test_bad_images_stay_among_themselves(kind):
    assert among_themselves(apply(make(kind), 0.6), images(kind, batch=BATCH))


@pytest.mark.sweep
@pytest.mark.usefixtures("deterministic")
@torch.no_grad()
def test_bad_images_stay_among_themselves_in_every_model_and_precision(record_property):
    """Torch's products of bfloat16 matrices carry NaN to other rows in DeepSeek's aligner, unpatched, too."""
    begin, done, wrong = time.perf_counter(), 0, []
    for kind in KINDS:
        model, x = make(kind), images(kind, batch=BATCH)
        ways = [(model, x, dtype) for dtype in (None, torch.half, torch.bfloat16)]
        if kind != "Hiera, absolute windows":  # of which torch cannot interpolate the positions
            ways.append((copy.deepcopy(model).half(), x.half(), None))
        for model, x, dtype in ways:
            done += len(BAD)
            if not among_themselves(apply(model, 0.6), x, dtype) and among_themselves(remove(model), x, dtype):
                wrong.append((kind, x.dtype, dtype))
    figures = ("images of NaN, infinite, huge and equal pixels", done, time.perf_counter() - begin, len(wrong))
    record_property("figures", figures)
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.half, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("deterministic")
@torch.no_grad()
def test_bad_images_stay_among_themselves_in_every_method_and_precision(method, dtype):
    model, x = apply(make("ViT"), 0.6, method=method), images(batch=BATCH)
    for fused in (True, False):
        set_fused_attention(model, fused)
        if dtype != torch.float32:
            assert among_themselves(model, x, autocast=dtype)
        assert among_themselves(copy.deepcopy(model).to(dtype), x.to(dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("deterministic")
def test_gradients_of_bad_images_stay_among_themselves(method):
    model, x = apply(make("ViT").train(), 0.6, method=method), images(batch=BATCH)

    def gradient(x):
        x = x.clone().requires_grad_()
        model(x).square().sum().backward()
        return x.grad

    alone, beside = gradient(x), gradient(spoiled(x))
    assert torch.equal(gradient(x), alone)
    assert torch.equal(beside[0], alone[0])
    assert torch.equal(beside[-1], alone[-1])


@torch.no_grad()
def test_an_image_whose_patches_are_all_equal_is_what_it_is_unpatched():
    """All costs are ties."""
    model, x = make("ViT"), torch.full((2, 3, 32, 32), 0.5)
    model.pos_embed[:, 1:] = model.pos_embed[:, 1:2].clone()
    expected = model.forward_features(x)
    for rate in (0.9, 0.5, 0.1):
        torch.testing.assert_close(apply(model, rate).forward_features(x), expected, rtol=1e-4, atol=1e-5)


# Interrupts.

PACKAGE = str(Path(token_merge_plugin.__file__).parent)
CALLS = {
    "apply": lambda model: apply(model, 0.6),
    "apply again": lambda model: apply(model, 0.4),
    "remove": remove,
}


def inside(code):
    return code.co_filename.startswith(PACKAGE)


def interrupt_everywhere(kind, most):
    """Interrupt `apply` and `remove` at up to so many steps each, and return at how many; the model stays as it is."""
    done = 0
    model = make(kind)
    for name, call in CALLS.items():
        before, twin = contents(model), copy.deepcopy(model)
        steps = interrupted(lambda call=call, twin=twin: call(twin), None, inside)
        for step in sorted({1 + part * steps // most for part in range(most)}):
            error = (KeyboardInterrupt, MemoryError)[step % 2]
            interrupted(lambda call=call: call(model), step, inside, error)
            assert contents(model) == before, f"{name}, step {step} of {steps}"
            done += 1
        call(model)
    assert done > 30
    return done


@pytest.mark.parametrize("kind", FIRST)
def test_an_interrupt_leaves_the_model_as_it_was(kind):
    interrupt_everywhere(kind, most=12)


@pytest.mark.sweep
def test_interrupts_at_many_steps(record_property):
    begin, done = time.perf_counter(), 0
    for kind in DIFFERENT:
        done += interrupt_everywhere(kind, most=60)
    record_property("figures", ("interrupts of apply and remove", done, time.perf_counter() - begin, 0))
