"""A file of JSON lines to which a trial adds its results as they come, and from which it goes on."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from token_merge_plugin.errors import ConfigError, DataError


class Journal:
    """What a trial has measured so far, kept in a file.

    Args:
        path: the file, or None for none.
        trial: what the trial is, as its first line: results of another one are not mixed in.

    Raises:
        ConfigError: the file holds the results of another trial.
        DataError: the file cannot be read or written, or is not such a file.
    """

    def __init__(self, path: str | Path | None, trial: dict[str, Any]):
        self._file: TextIO | None = None
        self.entries: list[dict[str, Any]] = []
        if path is None:
            return
        path, trial = Path(path), json.loads(json.dumps(trial))
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]  # one was cut while it was written
            self.entries = [json.loads(line) for line in whole]
            if self.entries and self.entries[0].get("trial") != trial:
                known = self.entries[0].get("trial") or {}
                what = [key for key in trial | known if known.get(key) != trial.get(key)]
                raise ConfigError(
                    f"{path} holds the results of other work: it differs in {', '.join(what)}. Name another file, "
                    "or delete this one."
                )
            self._file = path.open("a" if lines == whole else "w", encoding="utf-8")
            if lines != whole:
                self._file.writelines(line.decode() for line in whole)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"{path} cannot be used as a log: {error}. Name another file with --log.") from error
        if not self.entries:
            self._write({"trial": trial})

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of a kind, in their order."""
        return [entry for entry in self.entries if entry.get("kind") == kind]

    def write(self, kind: str, **values: Any) -> None:
        """Add an entry, and see to it that it is in the file."""
        self._write({"kind": kind, **values})

    def _write(self, entry: dict[str, Any]) -> None:
        self.entries.append(json.loads(json.dumps(entry)))
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
