"""Existing pipelines, unmodified: `install`, `patch_timm`, `run_script` and the environment variables."""

import functools
import json
import os
import re
import sys
import textwrap
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import timm
import timm.models._factory as factory
import torch
import wrapt
from checks import REPOSITORY, draw_two_classes, run_program
from timm import create_model as imported_before
from timm.models._hub import save_for_hf

import token_merge_plugin
from token_merge_plugin import ConfigError, MergeConfig
from token_merge_plugin.adapters.base import Patched
from token_merge_plugin.pipelines import install, install_from_environment, patch_timm, run_script, uninstall

SITE_PACKAGES = REPOSITORY / "token_merge_plugin" / "site_packages"
ORIGINAL = factory.model_entrypoint


@pytest.fixture(autouse=True)
def nothing_stays_installed(monkeypatch):
    monkeypatch.delenv("TOKEN_MERGE_KEEP_RATE", raising=False)
    monkeypatch.delenv("TOKEN_MERGE_OPTIONS", raising=False)
    yield
    uninstall()
    assert factory.model_entrypoint is ORIGINAL


def plan_of(model):
    """Return the plan that a model was patched with; None if it is as timm made it."""
    return next((module._token_merge.plan for module in model.modules() if isinstance(module, Patched)), None)


def keep_rate_of(model):
    plan = plan_of(model)
    return plan and plan.config.keep_rate


def assert_is_the_plain_model_applied_to(model, plain, keep_rate):
    """The plain model has the same weights; it is patched by this, too."""
    model, plain, images = model.eval(), plain.eval(), torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert not torch.equal(model(images), plain(images))
        token_merge_plugin.apply(plain, keep_rate)
        assert torch.equal(model(images), plain(images))
    assert list(model.state_dict()) == list(plain.state_dict())


# From code


def test_every_alias_of_create_model_gives_patched_models():
    class Builder:
        create = staticmethod(timm.create_model)

        def __init__(self, create=timm.models.create_model):
            self.create_by_default = create

    other_package = types.ModuleType("other_package")
    other_package.make = imported_before
    partial = functools.partial(timm.create_model, "test_vit", num_classes=10)
    by_name = (
        imported_before,
        timm.create_model,
        timm.models.create_model,
        factory.create_model,
        other_package.make,
        Builder.create,
        Builder().create,
        Builder().create_by_default,
    )
    install(0.5)
    assert [keep_rate_of(create("test_vit")) for create in by_name] == [0.5] * len(by_name)
    assert keep_rate_of(partial()) == 0.5


def test_the_model_is_the_one_that_apply_gives():
    plain = timm.create_model("test_vit")
    install(0.7)
    model = timm.create_model("test_vit")
    model.load_state_dict(plain.state_dict())
    assert_is_the_plain_model_applied_to(model, plain, 0.7)


def test_installing_twice_replaces_the_options_and_uninstalling_twice_does_no_harm():
    create = timm.create_model
    install(0.7)
    install(0.5, stages=[2, 4])
    assert plan_of(timm.create_model("test_vit")).schedule == {2: 0.5, 4: 0.5}
    uninstall()
    assert factory.model_entrypoint is ORIGINAL
    assert timm.create_model is create
    uninstall()
    assert plan_of(timm.create_model("test_vit")) is None


def test_a_config_is_taken_as_apply_takes_it():
    config = MergeConfig(0.6, similarity="keys")
    install(config, stages=(3,))
    assert plan_of(timm.create_model("test_vit")).config == MergeConfig(0.6, similarity="keys", stages=(3,))


@pytest.mark.parametrize("start", [install, lambda *a, **k: patch_timm(*a, **k).__enter__()])
def test_a_wrong_option_fails_at_once_and_installs_nothing(start):
    with pytest.raises(ConfigError, match="no option 'stage'"):
        start(0.7, stage=[3])
    with pytest.raises(ConfigError, match=r"1\.5"):
        start(1.5)
    assert factory.model_entrypoint is ORIGINAL


def test_nested_contexts_give_back_what_was_installed_before():
    def rate():
        return keep_rate_of(imported_before("test_vit"))

    with patch_timm(0.7):
        assert rate() == 0.7
        with patch_timm(0.5):
            assert rate() == 0.5
        assert rate() == 0.7
        with pytest.raises(RuntimeError, match="from inside"), patch_timm(0.4):
            raise RuntimeError("from inside")
        assert rate() == 0.7
    assert rate() is None
    assert factory.model_entrypoint is ORIGINAL


def test_models_made_in_other_threads_are_patched():
    with patch_timm(0.6), ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: timm.create_model("test_vit"), range(8)))
    assert [keep_rate_of(model) for model in models] == [0.6] * 8


def test_what_another_package_wraps_around_timm_meanwhile_stays():
    asked = []

    def note(wrapped, instance, args, kwargs):
        asked.append(args[0])
        return wrapped(*args, **kwargs)

    install(0.7)
    try:
        theirs = wrapt.wrap_function_wrapper(factory, "model_entrypoint", note)
        uninstall()
        assert factory.model_entrypoint is theirs
        assert plan_of(timm.create_model("test_vit")) is None
        install(0.5)
        assert keep_rate_of(timm.create_model("test_vit")) == 0.5
        assert asked == ["test_vit"] * 2
    finally:
        factory.model_entrypoint = theirs.__wrapped__


# What cannot be served


@pytest.mark.parametrize(
    ("name", "arguments", "options", "reason"),
    [
        ("test_resnet", {}, {}, "ResNet is no model that is served"),
        ("test_vit", {}, {"stages": [40]}, "Block 40 does not exist"),
        ("test_vit", {"scriptable": True}, {}, "TorchScript"),
    ],
)
def test_what_cannot_be_served_passes_with_one_warning_exactly_as_timm_makes_it(name, arguments, options, reason):
    torch.manual_seed(0)
    plain = timm.create_model(name, **arguments)
    with patch_timm(0.7, **options):
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=f"{name}.*{reason}") as caught:
            model = timm.create_model(name, **arguments)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            timm.create_model(name, num_classes=3, **arguments)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_class_and_each_reason_is_warned_of():
    install(0.7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("test_resnet", "test_convnext", "test_resnet"):
            timm.create_model(name)
    assert [re.search(r"leaves (\w+)", str(warning.message))[1] for warning in caught] == [
        "test_resnet",
        "test_convnext",
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_what_is_made_for_torchscript_can_still_be_scripted():
    install(0.7)
    with pytest.warns(UserWarning, match="scriptable=True"):
        model = timm.create_model("test_vit", scriptable=True)
    torch.jit.script(model)


# What timm does on the way


def test_features_only_models_are_patched():
    plain = timm.create_model("test_vit", features_only=True, out_indices=(1, 4)).eval()
    install(0.5)
    model = timm.create_model("test_vit", features_only=True, out_indices=(1, 4)).eval()
    model.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        before = plain(images)
        token_merge_plugin.apply(plain, 0.5)
        for ours, applied, unpatched in zip(model(images), plain(images), before, strict=True):
            assert torch.equal(ours, applied)
            assert ours.shape == unpatched.shape
        assert not torch.equal(model(images)[1], before[1])


def test_weights_that_timm_loads_are_those_of_the_patched_model(tmp_path):
    file, folder = tmp_path / "weights.pth", tmp_path / "hub"
    weights = timm.create_model("test_vit", num_classes=10)
    torch.save(weights.state_dict(), file)
    save_for_hf(weights, folder)
    ways = {
        "after the model was made": {"model_name": "test_vit", "checkpoint_path": file, "num_classes": 10},
        "while it is made": {
            "model_name": "test_vit",
            "pretrained": True,
            "pretrained_cfg_overlay": {"file": str(file), "num_classes": 10},
        },
        "from a folder in the hub's format": {"model_name": f"local-dir:{folder}", "pretrained": True},
    }
    for way in ways.values():
        plain = timm.create_model(**way)
        assert torch.equal(plain.head.weight, weights.head.weight)
        with patch_timm(0.7):
            model = timm.create_model(**way)
        assert torch.equal(model.head.weight, weights.head.weight)
        assert_is_the_plain_model_applied_to(model, plain, 0.7)


def test_naflex_models_are_patched():
    install(0.7)
    model = timm.create_model("test_vit", use_naflex=True)
    assert "NaFlexVit" in type(model).__name__
    assert keep_rate_of(model) == 0.7


# Scripts: stand-ins for timm's own, from their documented use, with a results file in JSON added

VALIDATE = """
import argparse, json
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint
from timm.utils import AverageMeter, accuracy

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model", "-m")
parser.add_argument("--checkpoint")
parser.add_argument("--batch-size", "-b", type=int, default=4)
parser.add_argument("--results-file")


def validate(args):
    model = create_model(args.model, pretrained=False, in_chans=3, global_pool=None, scriptable=None)
    load_checkpoint(model, args.checkpoint)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=True)
    model = model.to("cpu")
    dataset = create_dataset(root=args.data_dir, name="", split="validation")
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        use_prefetcher=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=0,
        persistent_workers=False,
        crop_pct=data_config["crop_pct"],
    )
    losses, top1, logits = AverageMeter(), AverageMeter(), []
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            output = model(input)
            losses.update(torch.nn.functional.cross_entropy(output, target).item(), input.size(0))
            top1.update(accuracy(output.detach(), target, topk=(1, 5))[0].item(), input.size(0))
            logits += output.tolist()
    return {"loss": losses.avg, "top1": top1.avg, "logits": logits}


if __name__ == "__main__":
    args = parser.parse_args()
    with open(args.results_file, "w") as file:
        json.dump(validate(args), file)
"""

BENCHMARK = """
import argparse, copy, json, time
import torch
from timm.models import create_model, load_checkpoint
from timm.data import resolve_data_config

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--checkpoint")
parser.add_argument("--device", default="cpu")
parser.add_argument("--results-file")


class InferenceBenchmarkRunner:
    def __init__(self, args):
        self.model = create_model(args.model, exportable=True, num_classes=None)
        load_checkpoint(self.model, args.checkpoint)
        self.model = self.model.to(device=args.device, dtype=torch.float32, memory_format=torch.channels_last)
        self.model.eval()
        self.param_count = sum([m.numel() for m in self.model.parameters()])
        self.input_size = resolve_data_config(vars(args), model=self.model)["input_size"]
        torch.manual_seed(0)
        self.example_inputs = torch.randn((2,) + self.input_size, device=args.device)

    def run(self):
        with torch.no_grad():
            self.model(self.example_inputs)
            start = time.perf_counter()
            output = self.model(self.example_inputs)
            step_time = time.perf_counter() - start
            copied = copy.deepcopy(self.model)(self.example_inputs)
        assert step_time > 0
        return {"param_count": self.param_count, "output": output.tolist(), "copied": copied.tolist()}


def main():
    args = parser.parse_args()
    with open(args.results_file, "w") as file:
        json.dump(InferenceBenchmarkRunner(args).run(), file)


if __name__ == "__main__":
    main()
"""

INFERENCE = """
import argparse, json
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--checkpoint")
parser.add_argument("--results-file")


def main():
    args = parser.parse_args()
    model = create_model(args.model, in_chans=3, pretrained=False, checkpoint_path=args.checkpoint)
    data_config = resolve_data_config(vars(args), model=model)
    model = model.to("cpu")
    model.eval()
    dataset = create_dataset(root=args.data_dir, name="")
    loader = create_loader(
        dataset, batch_size=3, use_prefetcher=False, num_workers=0, persistent_workers=False, **data_config
    )
    results = {}
    with torch.no_grad():
        for batch_idx, (input, _) in enumerate(loader):
            probabilities, indices = model(input).softmax(-1).topk(5)
            results[batch_idx] = [probabilities.tolist(), indices.tolist()]
    with open(args.results_file, "w") as file:
        json.dump({"results": results, "files": dataset.filenames(basename=True)}, file)


if __name__ == "__main__":
    main()
"""

TRAIN = """
import argparse, json
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model, safe_model_name, load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, random_seed

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--checkpoint")
parser.add_argument("--results-file")


def main():
    args = parser.parse_args()
    random_seed(42, 0)
    model = create_model(args.model, pretrained=False, drop_path_rate=0.1, checkpoint_path=args.checkpoint)
    model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device="cpu")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    model_ema = ModelEmaV3(model, decay=0.9)
    dataset = create_dataset("", root=args.data_dir)
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=3,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
    )
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    losses = []
    model.train()
    for update, (input, target) in enumerate(loader):
        loss = loss_fn(model(input), target)
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        optimizer.step()
        model_ema.update(model, step=update)
        optimizer.zero_grad()
        losses.append(loss.item())
    model_ema.module.eval()
    with torch.no_grad():
        output = model_ema.module(torch.ones((1,) + data_config["input_size"]))
    with open(args.results_file, "w") as file:
        json.dump({"losses": losses, "parameters without a gradient": without, "ema": output.tolist()}, file)


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the arguments that the scripts share: images in folders of classes, and weights."""
    folder = tmp_path_factory.mktemp("data")
    draw_two_classes(folder / "images", 6, (180, 200))
    torch.save(timm.create_model("test_vit").state_dict(), folder / "weights.pth")
    return ["--model", "test_vit", "--data-dir", str(folder / "images"), "--checkpoint", str(folder / "weights.pth")]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(VALIDATE, id="validate.py"),
        pytest.param(BENCHMARK, id="benchmark.py"),
        pytest.param(INFERENCE, id="inference.py"),
        pytest.param(TRAIN, id="train.py"),
    ],
)
def test_a_script_of_timm_gets_the_model_that_an_explicit_apply_gives(source, data, tmp_path, capsys):
    def results(source, keep_rate):
        (tmp_path / "script.py").write_text(source)
        run_script(tmp_path / "script.py", [*data, "--results-file", str(tmp_path / "results.json")], keep_rate)
        return json.loads((tmp_path / "results.json").read_text())

    with_apply, changes = re.subn(r"model = (create_model\(.*\))", r"model = token_merge_plugin.apply(\1, 0.5)", source)
    assert changes == 1
    explicit = results("import token_merge_plugin\n" + with_apply, keep_rate=1.0)
    unpatched = results(source, keep_rate=1.0)
    capsys.readouterr()
    unmodified = results(source, keep_rate=0.5)
    assert capsys.readouterr().err == "token-merge: 1 model patched (1 VisionTransformer).\n"
    assert unmodified == explicit
    assert unmodified != unpatched
    if source is BENCHMARK:
        assert unmodified["copied"] == unmodified["output"]
    if source is TRAIN:
        assert unmodified["parameters without a gradient"] == []


# Scripts as Python runs them

LOOK_AROUND = """
import json, os, pickle, sys


class Local:
    pass


main = sys.modules["__main__"]
print(json.dumps({
    "name": __name__,
    "file": __file__,
    "argv": sys.argv,
    "path": sys.path[0],
    "package": __package__ or None,
    "spec": __spec__ and __spec__.name,
    "is main": main.__dict__ is globals(),
    "pickles": type(pickle.loads(pickle.dumps(Local()))) is Local,
    "neighbour": __import__("neighbour").VALUE,
}))
"""


@pytest.mark.parametrize("module", [False, True])
def test_the_program_sees_what_it_sees_under_python(module, tmp_path, monkeypatch, capsys):
    """A module is found from the current folder; a script finds its neighbours, also through a symbolic link."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "package" / "inner"
    folder.mkdir(parents=True)
    (folder / "program.py").write_text(LOOK_AROUND)
    (tmp_path if module else folder).joinpath("neighbour.py").write_text("VALUE = 7")
    (tmp_path / "link.py").symlink_to(folder / "program.py")
    target = "package.inner.program" if module else str(tmp_path / "link.py")
    arguments = ["--option", "two words", "-m"]
    command = [sys.executable, *(["-m"] if module else []), target, *arguments]
    expected = json.loads(run_program(*command).stdout)
    sys.modules.pop("neighbour", None)
    run_script(target, arguments, module=module)
    assert json.loads(capsys.readouterr().out) == expected
    assert expected["neighbour"] == 7


def test_a_folder_with_a_main_is_run(tmp_path, capsys):
    (tmp_path / "__main__.py").write_text("print(__name__)")
    run_script(tmp_path)
    assert capsys.readouterr().out == "__main__\n"


def write(folder, source):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize(
    "end", ["pass", "sys.exit(0)", "sys.exit(3)", "sys.exit('a message')", "1 / 0", "raise KeyboardInterrupt"]
)
def test_everything_is_put_back_however_the_script_ends(end, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN_MERGE_KEEP_RATE", "0.9")
    script = write(tmp_path, f"import sys; sys.argv.append(1); sys.path.append('x'); sys.path = []; {end}")
    argv, path, entries, main = sys.argv, sys.path, sys.path[:], sys.modules["__main__"]
    try:
        run_script(script, ["one"])
    except (SystemExit, KeyboardInterrupt):
        assert end != "pass"
    assert sys.argv is argv
    assert sys.path is path
    assert sys.path == entries
    assert sys.modules["__main__"] is main
    assert os.environ["TOKEN_MERGE_KEEP_RATE"] == "0.9"
    assert "TOKEN_MERGE_OPTIONS" not in os.environ
    assert factory.model_entrypoint is ORIGINAL
    assert capsys.readouterr().err.splitlines()[-1].startswith("token-merge: no model was patched")


@pytest.mark.parametrize("code", [0, 3, "a message", None])
def test_the_exit_code_is_the_scripts(code, tmp_path):
    with pytest.raises(SystemExit) as exit:
        run_script(write(tmp_path, f"raise SystemExit({code!r})"))
    assert exit.value.code == code


@pytest.mark.parametrize("source", ["def f():\n    1 / 0\nf()\n", "raise KeyboardInterrupt\n", "if True\n    pass\n"])
def test_an_error_shows_the_traceback_that_python_shows(source, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(source)
    expected = run_program(sys.executable, script)
    interrupted = "Interrupt" in source
    with pytest.raises(KeyboardInterrupt if interrupted else SystemExit) as end:
        run_script(script)
    assert interrupted or end.value.code == expected.returncode == 1
    *traceback, summary = capsys.readouterr().err.splitlines()
    assert traceback == expected.stderr.splitlines()
    assert summary.startswith("token-merge: ")


def test_a_script_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"no script 'nowhere\.py'"):
        run_script("nowhere.py")


@pytest.mark.parametrize("name", ["package_that_is_nowhere", "package_that_is_nowhere.module", "json.nothing", "xml"])
def test_a_module_that_cannot_be_run_is_named(name):
    with pytest.raises(ConfigError, match=f"no module '{name}' to run: .*{name.split('.')[0]}"):
        run_script(name, module=True)


def test_a_module_that_fails_to_import_another_shows_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "import package_that_is_nowhere")
    with pytest.raises(SystemExit, match="1"):
        run_script("script", module=True)
    assert 'script.py", line 1, in <module>' in capsys.readouterr().err


def test_a_wrong_option_fails_before_the_script_starts(tmp_path):
    with pytest.raises(ConfigError, match="no option 'stage'"):
        run_script(write(tmp_path, "raise AssertionError"), stage=3)


@pytest.mark.parametrize(("end", "code"), [("", 1), ("raise SystemExit(0)", 1), ("raise SystemExit(3)", 3)])
def test_strict_fails_if_nothing_was_patched(end, code, tmp_path):
    with pytest.raises(SystemExit) as exit:
        run_script(write(tmp_path, f"import timm\ntimm.create_model('test_resnet')\n{end}"), strict=True)
    assert exit.value.code == code
    run_script(write(tmp_path, "import timm\ntimm.create_model('test_vit')"), strict=True)


def test_what_is_not_served_is_named_once_in_one_line(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_script(write(tmp_path, "import timm\nfor _ in range(2):\n    timm.create_model('test_resnet')"))
    assert capsys.readouterr().err == (
        "token-merge: no model was patched: 2 ResNet left unpatched: ResNet is no model that is served, and contains "
        "none.\n"
    )


@pytest.mark.parametrize(
    ("source", "summary"),
    [
        ("", "no model was patched: timm.create_model made none in this process."),
        ("test_resnet", "no model was patched: 1 ResNet left unpatched: ResNet is no model that is served"),
        (
            "test_vit test_resnet test_vit2",
            "2 models patched (2 VisionTransformer); 1 ResNet left unpatched: ResNet is",
        ),
        (
            "test_vit test_convnext test_vit_relpos",
            "2 models patched (1 VisionTransformer, 1 VisionTransformerRelPos); 1",
        ),
    ],
)
def test_the_last_line_tells_what_was_patched_and_what_was_not(source, summary, tmp_path, capsys):
    run_script(write(tmp_path, f"import timm\nfor name in {source.split()}:\n    timm.create_model(name)"))
    assert capsys.readouterr().err.startswith(f"token-merge: {summary}")


# The environment


@pytest.mark.parametrize(
    ("variables", "config"),
    [
        ({"KEEP_RATE": "0.6"}, MergeConfig(0.6)),
        ({"KEEP_RATE": "0.9, 0.8,0.5"}, MergeConfig((0.9, 0.8, 0.5))),
        (
            {"KEEP_RATE": "0.5", "OPTIONS": '{"stages": [2, 4], "similarity": "keys"}'},
            MergeConfig(0.5, stages=(2, 4), similarity="keys"),
        ),
        ({"OPTIONS": '{"keep_rate": [0.9, 0.8], "stages": [2, 4]}'}, MergeConfig((0.9, 0.8), stages=(2, 4))),
        ({"OPTIONS": '{"multi_scale": "importance"}', "KEEP_RATE": ""}, MergeConfig(0.7, multi_scale="importance")),
    ],
)
def test_the_environment_says_what_install_is_told(variables, config, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"TOKEN_MERGE_{name}", value)
    install_from_environment()
    assert plan_of(timm.create_model("test_vit")).config == config


@pytest.mark.parametrize("variables", [{}, {"KEEP_RATE": ""}, {"KEEP_RATE": "", "OPTIONS": ""}])
def test_variables_that_are_empty_or_not_set_install_nothing(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"TOKEN_MERGE_{name}", value)
    install_from_environment()
    assert factory.model_entrypoint is ORIGINAL


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("TOKEN_MERGE_KEEP_RATE", "half", "no number"),
        ("TOKEN_MERGE_KEEP_RATE", "0.9,,0.5", "no number"),
        ("TOKEN_MERGE_KEEP_RATE", "70", "outside"),
        ("TOKEN_MERGE_KEEP_RATE", "nan", "outside"),
        ("TOKEN_MERGE_OPTIONS", "stages=2", "not JSON"),
        ("TOKEN_MERGE_OPTIONS", "[2, 5]", "not a JSON object"),
        ("TOKEN_MERGE_OPTIONS", '{"stage": [2]}', "no option 'stage'"),
    ],
)
def test_a_bad_value_in_the_environment_is_an_error_that_names_the_variable(name, value, reason, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"(?s){name}=.*{reason}"):
        install_from_environment()
    assert factory.model_entrypoint is ORIGINAL


@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(),
        MergeConfig(0.4),
        MergeConfig((0.9, 0.8, 0.5)),
        MergeConfig({1: 0.9, 4: 0.6}),
        MergeConfig({}),
        MergeConfig(0.5, stages=(2, 4), importance="uniform", proportional_attention=False),
    ],
)
def test_a_script_has_its_options_in_its_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_MERGE_KEEP_RATE", "0.9")
    model = timm.create_model("test_vit")
    expected = plan_of(token_merge_plugin.apply(model, config))
    with patch_timm(0.3):
        # What a child process would do first; it is undone at the end of the script.
        script = write(
            tmp_path,
            """
            import timm, torch, token_merge_plugin.pipelines
            token_merge_plugin.pipelines.install_from_environment()
            torch.save(timm.create_model("test_vit"), "model.pt")
            """,
        )
        monkeypatch.chdir(tmp_path)
        run_script(script, (), config)
        assert keep_rate_of(timm.create_model("test_vit")) == 0.3
    plan = plan_of(torch.load("model.pt", weights_only=False))
    assert (plan and plan.schedule) == (expected and expected.schedule)
    for option in ("importance", "proportional_attention", "similarity"):
        assert plan is None or getattr(plan.config, option) == getattr(config, option)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return a function that runs Python with `SITE_PACKAGES` as one of its folders of installed packages."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(SITE_PACKAGES)!r})")

    def run(source, site=True, **variables):
        path = os.pathsep.join([str(folder)] * site + [str(REPOSITORY)])
        return run_program(sys.executable, "-c", textwrap.dedent(source), PYTHONPATH=path, **variables)

    return run


MAKE_A_MODEL = """
import sys
assert not {"timm", "torch", "wrapt"} & sys.modules.keys()
import IMPORTED
import timm
print(timm.create_model("test_vit")._get_name())
"""


@pytest.mark.parametrize("imported", ["timm.models", "token_merge_plugin"])
def test_in_a_new_process_the_environment_alone_is_enough(imported, python):
    """Also if this package is imported first, which imports timm, which imports a part of this package."""
    process = python(MAKE_A_MODEL.replace("IMPORTED", imported), TOKEN_MERGE_KEEP_RATE="0.5")
    assert process.stdout == "TokenMergeVisionTransformer\n", process.stderr
    assert process.stderr == "token-merge: 1 model patched (1 VisionTransformer).\n"


def test_a_bad_value_in_the_environment_stops_a_new_process(python):
    process = python("import timm", TOKEN_MERGE_KEEP_RATE="O.5")
    assert process.returncode == 1
    assert "ConfigError: In the environment, TOKEN_MERGE_KEEP_RATE='O.5'" in process.stderr.splitlines()[-1]


def test_without_the_variables_nothing_is_loaded(python):
    look = "import sys; print(sorted(name for name in sys.modules if 'token_merge' in name or 'wrapt' in name))"
    assert python(look).stdout == "[]\n"
    assert python(look, TOKEN_MERGE_OPTIONS="{}").stdout == "['token_merge_plugin_startup']\n"


def test_the_processes_of_a_script_are_patched(python, tmp_path, capfd):
    child = write(tmp_path, "import timm; print(timm.create_model('test_vit')._get_name())")
    process = python(
        f"""
        import subprocess, sys
        from token_merge_plugin.pipelines import run_script
        with open({str(tmp_path / "parent.py")!r}, "w") as file:
            file.write("import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}], check=True)")
        run_script({str(tmp_path / "parent.py")!r}, keep_rate={{2: 0.5}})
        """
    )
    assert process.stdout == "TokenMergeVisionTransformer\n", process.stderr
    of_child, of_parent = process.stderr.splitlines()
    assert of_child == "token-merge: 1 model patched (1 VisionTransformer)."
    assert of_parent == "token-merge: no model was patched: timm.create_model made none in this process."


def test_an_installed_package_has_the_line_that_python_reads_as_it_starts(python):
    """Installed by pip, editable or not. A checkout on a path has nothing that Python could read."""
    try:
        files = metadata.distribution("token-merge-plugin").files
    except metadata.PackageNotFoundError:
        return
    installed = {file.name: file for file in files if len(file.parts) == 1}
    for file in SITE_PACKAGES.glob("*.p*"):
        assert installed[file.name].read_text() == file.read_text()
    process = python(MAKE_A_MODEL.replace("IMPORTED", "timm"), site=False, TOKEN_MERGE_KEEP_RATE="0.5")
    assert process.stdout == "TokenMergeVisionTransformer\n", process.stderr
