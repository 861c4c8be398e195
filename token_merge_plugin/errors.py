"""Errors of this package: one base class, so that `except TokenMergeError` catches every one of them."""


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


class MissingExtraError(TokenMergeError, ImportError):
    """A package is needed that is not installed by default; the message names the extra that brings it."""
