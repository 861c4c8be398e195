"""Errors of this package: one base class, so that `except TokenMergeError` catches every one of them.

Also how the errors of other libraries, numbers of things and long lists are put into a message of ours.
"""

from collections.abc import Sequence


class TokenMergeError(Exception):
    """Base class of the errors that this package raises."""


class UnsupportedModelError(TokenMergeError):
    """The model, or a part of it, is of a class that no registered adapter serves."""


class ConfigError(TokenMergeError, ValueError):
    """An option has a value that is not allowed, or that does not fit the model."""


class PatchStateError(TokenMergeError, RuntimeError):
    """The call is not possible in the state that the model is in now."""


class DataError(TokenMergeError, ValueError):
    """A data file is missing or damaged."""


class ExportError(TokenMergeError, RuntimeError):
    """The model cannot be exported, or the file that was made of it does not do what the model does."""


class MissingExtraError(TokenMergeError, ImportError):
    """A package is needed that is not installed by default; the message names the extra that brings it."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; its class where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_few(names: Sequence[str], few: int = 3) -> str:
    """Return the first names, with commas between them, and how many more there are."""
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return, for example, "1 image" or "1,000 images"."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def how_to_install(package: str, extra: str) -> str:
    """Return what to type for a package that an extra brings."""
    return f'Run: pip install {package}. Or, in a clone of the repository: pip install -e ".[{extra}]".'
