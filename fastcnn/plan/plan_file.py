"""The plan file: what tuning found, one JSON for each device and set of versions.

Its name is made of the environment's hash (environment.py): where the driver, torch, triton,
fastcnn or its kernels change, another file is read, and the outdated one never.

Several processes may write at once. Each takes a lock, reads what the others wrote, adds its own
and renames a finished file into place; readers need no lock. Without one (no fcntl, a network disk)
the rename alone keeps the file whole, and at worst a plan is lost and tuned again.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Entry", "PlanFile", "folder", "parse"]

SCHEMA = 1


class Entry(NamedTuple):
    """What tuning found for a problem."""

    plan: str  # the fastest of milliseconds
    milliseconds: dict[str, float]  # by candidate that is right
    refused: dict[str, str]  # by candidate that is not: why

    def names(self) -> set[str]:
        """Return the candidates that took part."""
        return {*self.milliseconds, *self.refused}


def folder() -> Path | None:
    """Return the folder of plan files; None where there is no place for it.

    Source: XDG Base Directory Specification, which has a relative XDG_CACHE_HOME ignored.
    """
    if chosen := os.environ.get("FASTCNN_CACHE"):
        return Path(chosen) / "plans"
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "fastcnn" / "plans"
    except RuntimeError:  # a user without a home
        return None


def parse(data: bytes, environment: Mapping[str, str]) -> dict[str, Entry]:
    """Read entries by problem from a plan file's bytes.

    Raises:
        ValueError: not such a file, or of another environment; it says what is wrong.
    """
    try:
        content = json.loads(data.decode())
    except RecursionError:
        content = None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"not of schema {SCHEMA}")
    if content.get("environment") != environment:
        raise ValueError("of another environment than its name says")
    if not isinstance(plans := content.get("plans"), dict):
        raise ValueError("plans: not an object")
    return {key: _entry(key, value) for key, value in plans.items()}


def _entry(key: str, value: Any) -> Entry:
    try:
        entry = Entry(**value)
        times = entry.milliseconds.values()
        right = entry.plan in entry.milliseconds
        right = right and all(type(ms) is float and 0 <= ms < math.inf for ms in times)
        right = right and all(isinstance(reason, str) for reason in entry.refused.values())
    except (TypeError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"no entry: {key}: {value}")
    return entry


class PlanFile:
    """Entries by problem, of one environment, on disk and in this process."""

    def __init__(self, where: Path | None, environment: Mapping[str, str]) -> None:
        text = json.dumps(environment, sort_keys=True)
        device = re.sub(r"\W+", "-", environment["device"])
        name = f"{device}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.environment = dict(environment)
        self.path = None if where is None else where / name
        self.entries: dict[str, Entry] = {}
        self._warned = False

    def reload(self) -> None:
        """Read what is on disk; entries that could not be written stay."""
        if self.path is None:
            return
        try:
            self.entries |= self._read(self.path)
        except OSError as error:
            self._warn(f"cannot be read ({error}): planned without it")
        except ValueError:
            try:
                with self._locked(self.path):
                    self.entries |= self._rescued(self.path)
            except OSError as error:
                self._warn(f"is damaged, cannot be moved ({error}): planned without it")

    def keep(self, key: str, entry: Entry) -> Entry:
        """Add an entry, and return the one that counts.

        Another process may have tuned the same candidates meanwhile: its entry then stays, so that
        all run the same plan.
        """
        try:
            if self.path is None:
                raise OSError("there is neither FASTCNN_CACHE nor a home folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(self.path):
                others = self._rescued(self.path)
                if key not in others or others[key].names() != entry.names():
                    others[key] = entry
                    self._write(self.path, others)
            self.entries |= others
        except OSError as error:
            self._warn(f"cannot be written ({error}): plans are kept in this process only")
            self.entries[key] = entry
        return self.entries[key]

    def _read(self, path: Path) -> dict[str, Entry]:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        return parse(data, self.environment)

    def _rescued(self, path: Path) -> dict[str, Entry]:
        """Read under the lock: nobody's new file is taken for the damaged one."""
        try:
            return self._read(path)
        except ValueError as error:
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            warnings.warn(f"{path}: damaged ({error}): moved to {aside.name}", stacklevel=2)
            return {}

    def _write(self, path: Path, entries: Mapping[str, Entry]) -> None:
        plans = {key: entry._asdict() for key, entry in sorted(entries.items())}
        content = {"schema": SCHEMA, "environment": self.environment, "plans": plans}
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            new.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with open(path.with_name(path.name + ".lock"), "a") as lock:
            with contextlib.suppress(OSError):  # not every disk has locks: see above
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # until `lock` is closed
            yield

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"plan file {self.path or ''}: {what}", stacklevel=2)
