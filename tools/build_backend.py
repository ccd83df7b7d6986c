"""The build backend: scikit-build-core's, after one sentence about whatever is missing.

build-system.requires in pyproject.toml is empty, so that this speaks before anything is downloaded:
what building takes is returned by the hooks. A source distribution needs no torch.
"""

from __future__ import annotations

import sys
from typing import Any

from find_torch import REQUIRES, command, find_torch

Settings = Any  # of the hooks: a dictionary or None


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """What packing the sources takes."""
    return [package for package in REQUIRES if package.startswith("scikit-build-core")]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What building takes besides torch, where there is a torch."""
    check()
    return REQUIRES


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    check(editable=True)
    return REQUIRES


def prepare_metadata_for_build_wheel(folder: str, config_settings: Settings = None) -> str:
    """Write the metadata; without isolation the first hook that is called."""
    check()
    return call(scikit_build().prepare_metadata_for_build_wheel, folder, config_settings)


def prepare_metadata_for_build_editable(folder: str, config_settings: Settings = None) -> str:
    """As for a wheel."""
    check(editable=True)
    hook = scikit_build(editable=True).prepare_metadata_for_build_editable
    return call(hook, folder, config_settings)


def build_sdist(folder: str, config_settings: Settings = None) -> str:
    """Pack the sources."""
    return scikit_build().build_sdist(folder, config_settings)


def build_wheel(folder: str, config_settings: Settings = None, metadata: str | None = None) -> str:
    """Build a wheel."""
    check()
    return call(scikit_build().build_wheel, folder, config_settings, metadata)


def build_editable(
    folder: str, config_settings: Settings = None, metadata: str | None = None
) -> str:
    """Build an editable installation."""
    check(editable=True)
    hook = scikit_build(editable=True).build_editable
    return call(hook, folder, config_settings, metadata)


def check(editable: bool = False) -> None:
    """End with one sentence where Python or torch is too old, or torch is missing."""
    if sys.version_info < (3, 10):
        sys.exit(f"fastcnn expected Python 3.10 or later, got {sys.version.split()[0]}")
    find_torch(editable)


def scikit_build(editable: bool = False) -> Any:
    """scikit-build-core's hooks."""
    try:
        import scikit_build_core.build as hooks
    except ModuleNotFoundError as error:
        if error.name != "scikit_build_core":
            raise
        missing = "fastcnn builds with scikit-build-core, and there is none here"
        sys.exit(f"{missing}: run {command(editable)}")
    return hooks


def call(hook: Any, *arguments: Any) -> str:
    """Call a hook that looks for CMake."""
    from scikit_build_core.errors import CMakeNotFoundError, NinjaNotFoundError

    try:
        return hook(*arguments)
    except CMakeNotFoundError:
        why = "fastcnn expected CMake 3.24 or later, and there is none"
        sys.exit(f"{why}: run pip install 'cmake>=3.25.2'")
    except NinjaNotFoundError:
        sys.exit("fastcnn builds with ninja or make, and there is none: run pip install ninja")
