"""Existing pipelines, unmodified: every supported model that `timm.create_model` creates is patched.

From code, by `install`, `uninstall` and `patch_timm`; for a script as it stands, by `run_script` (the command
`token-merge run`); where not even the command can be changed, by environment variables:

    TOKEN_MERGE_KEEP_RATE=0.7                   a number, or several with commas between them, one a stage
    TOKEN_MERGE_OPTIONS='{"stages": [2, 5, 8]}' further fields of `MergeConfig`, as a JSON object

Either of them is enough, and an empty one counts as not set. They are read when a process first imports timm: the
installed package has a line in site-packages, token_merge_plugin.pth, that sees to it. Processes that such a process
starts inherit them. As it ends, one line on stderr tells which models were patched.
"""

import atexit
import multiprocessing
import os
import re
import runpy
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, TracebackType
from typing import Any

import timm.models._factory as factory
import wrapt
from timm.layers import is_scriptable
from torch import nn

# Not from the package itself, which may be in the middle of its own import: see `install_from_environment`.
from token_merge_plugin.config import KeepRate, MergeConfig
from token_merge_plugin.errors import ConfigError, PatchStateError, TokenMergeError
from token_merge_plugin.patching import apply

KEEP_RATE_VARIABLE = "TOKEN_MERGE_KEEP_RATE"
OPTIONS_VARIABLE = "TOKEN_MERGE_OPTIONS"


class Installation:
    """What `install` set up, for the whole process, and what came of it.

    Attributes:
        config: what models are patched with.
        warns: say at once what cannot be patched; otherwise the summary alone does.
        patched: {class name: number of models that were patched}.
        unpatched: {(class name, reason): number of models that passed through as timm made them}.
    """

    def __init__(self, config: MergeConfig, *, warns: bool = True) -> None:
        self.config = config
        self.warns = warns
        self.patched: Counter[str] = Counter()
        self.unpatched: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def serve(self, model: nn.Module, name: str) -> None:
        """Patch a model that timm just made, or note, and warn once for each class and reason, that it cannot be."""
        kind = type(model).__name__
        try:
            if is_scriptable():
                raise PatchStateError("It is made with scriptable=True, and TorchScript cannot script patched models.")
            apply(model, self.config)
        except TokenMergeError as error:
            with self._lock:
                self.unpatched[kind, str(error)] += 1
                first = self.unpatched[kind, str(error)] == 1
            if first and self.warns:
                # The caller of `create_model`, which called `_create`, which called this.
                warnings.warn(f"token_merge_plugin leaves {name} ({kind}) unpatched: {error}", stacklevel=4)
        else:
            with self._lock:
                self.patched[kind] += 1

    def summary(self) -> str:
        """Return, in one line, how many models were patched, of which classes, and why others were not."""
        reasons = {(kind, _first_sentence(why)): n for (kind, why), n in self.unpatched.items()}
        unpatched = "; ".join(f"{n} {kind} left unpatched: {why}" for (kind, why), n in reasons.items())
        if self.patched:
            number = self.patched.total()
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.patched.items())
            message = f"{number} model{'s' if number > 1 else ''} patched ({kinds})"
            return f"{message}; {unpatched}" if unpatched else f"{message}."
        return f"no model was patched: {unpatched or 'timm.create_model made none in this process.'}"


def _first_sentence(text: str) -> str:
    """Return the first sentence, in one line."""
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


_installed: Installation | None = None
_wrapper: wrapt.FunctionWrapper | None = None
_lock = threading.Lock()


def install(keep_rate: KeepRate | MergeConfig = 0.7, **options: Any) -> None:
    """Patch, from now on, every supported model that `timm.create_model` creates, in every thread.

    It does not matter under which name `create_model` is called, nor when that name was imported. What cannot be
    served, or does not fit the options, is left exactly as timm made it, with one warning for each class and reason:
    models of other kinds, and those made with scriptable=True. Models made in another way, by a class or by an entry
    point of timm that is called directly, are not touched. Installing again replaces the options.

    Args:
        keep_rate: as for `apply`.
        options: the other fields of `MergeConfig`, by name.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """
    _set(Installation(MergeConfig.of(keep_rate, **options)))


def uninstall() -> None:
    """Undo `install`: timm is as it was. Models that were patched stay so. Without effect if nothing is installed."""
    atexit.unregister(_say_at_exit)
    _set(None)


@contextmanager
def patch_timm(keep_rate: KeepRate | MergeConfig = 0.7, **options: Any) -> Iterator[None]:
    """Do the same as `install` inside a `with` block, and put back what was installed before at its end.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """
    with _active(Installation(MergeConfig.of(keep_rate, **options))):
        yield


@contextmanager
def _active(installation: Installation) -> Iterator[None]:
    before = _installed
    _set(installation)
    try:
        yield
    finally:
        _set(before)


def _set(installation: Installation | None) -> None:
    """Make an installation the current one, and wrap timm while there is one."""
    global _installed, _wrapper
    with _lock:
        _installed = installation
        if installation is not None and _wrapper is None:
            # `create_model` finds the maker of a model under this name, whatever name itself was called by.
            _wrapper = wrapt.wrap_function_wrapper(factory, "model_entrypoint", _model_entrypoint)
        # If another package has wrapped it since, ours stays below that, without effect while nothing is installed.
        if installation is None and factory.model_entrypoint is _wrapper is not None:
            factory.model_entrypoint = _wrapper.__wrapped__
            _wrapper = None


def _model_entrypoint(wrapped: Callable, instance: None, args: tuple, kwargs: dict) -> Callable:
    """Stand in for timm's `model_entrypoint`, which returns the function that makes a model."""
    return wrapt.FunctionWrapper(wrapped(*args, **kwargs), _create)


def _create(wrapped: Callable, instance: None, args: tuple, kwargs: dict) -> nn.Module:
    model = wrapped(*args, **kwargs)
    installation = _installed
    if installation is not None:
        installation.serve(model, wrapped.__name__)
    return model


def install_from_environment(timm_module: ModuleType | None = None) -> None:
    """Install what the environment variables ask for, if they are set: see this module's docstring.

    token_merge_plugin.pth has it called once timm is imported. That may be by this package's own `__init__`, of which
    nothing but the submodules can be used then.

    Args:
        timm_module: timm, as wrapt's import hooks give it; not used.

    Raises:
        ConfigError: a variable cannot be read, or has a value that is not allowed.
    """
    given = {name: os.environ[name] for name in (KEEP_RATE_VARIABLE, OPTIONS_VARIABLE) if os.environ.get(name)}
    if not given:
        return
    try:
        config = MergeConfig.from_json(given.get(OPTIONS_VARIABLE, "{}"))
        if KEEP_RATE_VARIABLE in given:
            config = replace(config, keep_rate=_parsed_keep_rate(given[KEEP_RATE_VARIABLE]))
        installation = Installation(config, warns=False)
        _set(installation)
        atexit.register(_say_at_exit, installation)
    except ConfigError as error:
        asked = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"In the environment, {asked}: {error} Or unset the variable.") from error


def _say_at_exit(installation: Installation) -> None:
    """Tell what was patched; but not for a worker process of the program that made no model."""
    if multiprocessing.parent_process() is None or installation.patched or installation.unpatched:
        print(f"token-merge: {installation.summary()}", file=sys.stderr)


def _parsed_keep_rate(text: str) -> float | list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        raise ConfigError("The keep rate is no number such as 0.7, nor numbers such as 0.9,0.8,0.7.") from None
    return rates if "," in text else rates[0]


def run_script(
    target: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    keep_rate: KeepRate | MergeConfig = 0.7,
    *,
    module: bool = False,
    strict: bool = False,
    **options: Any,
) -> None:
    """Run a Python script or module as `python` would, with every supported model of `timm.create_model` patched.

    The environment variables are set meanwhile, so that the processes that it starts patch their models as well (if
    this package is installed in their Python, and not just on a path). At the end, one line on stderr tells which
    models of this process were patched. Then sys.argv, sys.path, the environment and timm are put back.

    Args:
        target: path of the script, or of a folder or zip file with a `__main__.py`; or a module's dotted name.
        arguments: the command line that follows it.
        keep_rate: as for `apply`.
        module: take `target` for a module, as `python -m` does.
        strict: fail at the end if no model of this process was patched.
        options: the other fields of `MergeConfig`, by name.

    Raises:
        ConfigError: an option has a value that is not allowed, or there is no such script or module.
        SystemExit: that of the script; with code 1 after any other exception, whose traceback has been printed, and
            where it would be 0, but `strict` is not met.
        KeyboardInterrupt: Ctrl-C; its traceback has been printed.
    """
    installation = Installation(MergeConfig.of(keep_rate, **options), warns=False)
    if not module and not os.path.exists(target):
        raise ConfigError(f"There is no script {os.fspath(target)!r}. Give a path, or -m and the name of a module.")
    with _environment(installation.config), _active(installation), _main_program(target, arguments, module):
        try:
            if module:
                runpy.run_module(os.fspath(target), run_name="__main__", alter_sys=True)
            else:
                # Absolute, as Python itself has `__file__` of a script.
                runpy.run_path(os.path.abspath(target), run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0) or not strict:
                raise
        except BaseException as error:
            error.__traceback__ = _traceback_of_script(error)
            if module and isinstance(error, ImportError) and error.__traceback__ is None:
                raise ConfigError(f"There is no module {os.fspath(target)!r} to run: {error}.") from None
            sys.excepthook(type(error), error, error.__traceback__)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise SystemExit(1) from error
        finally:
            print(f"token-merge: {installation.summary()}", file=sys.stderr)
    if strict and not installation.patched:
        raise SystemExit(1)


def _traceback_of_script(error: BaseException) -> TracebackType | None:
    """Return the traceback without the frames that led to the script; None if it was not reached."""
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] not in ("runpy", "importlib"):
            break
        traceback = traceback.tb_next
    return traceback


@contextmanager
def _main_program(target: str | os.PathLike[str], arguments: Sequence[str], module: bool) -> Iterator[None]:
    """Set sys.argv and sys.path[0] as Python does for a script or a module; runpy completes sys.argv[0]."""
    path, entries, argv = sys.path, sys.path[:], sys.argv
    sys.argv = ["-m" if module else os.fspath(target), *arguments]
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[:1] = [os.getcwd() if module else os.path.dirname(os.path.realpath(target))]
    try:
        yield
    finally:
        path[:] = entries
        sys.path, sys.argv = path, argv


@contextmanager
def _environment(config: MergeConfig) -> Iterator[None]:
    """Set the environment variables so that `install_from_environment` installs this config in another process."""
    before = {name: os.environ.pop(name, None) for name in (KEEP_RATE_VARIABLE, OPTIONS_VARIABLE)}
    os.environ[OPTIONS_VARIABLE] = config.to_json()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
