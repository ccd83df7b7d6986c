"""The checks that fastcnn was built and torch is new enough, before anything of them is used."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

OLDEST = (2, 11)


def check_compiled_part() -> None:
    """Raise ImportError naming the way out where there is no fastcnn._C.

    One that is there and does not load says why itself.
    """
    if importlib.util.find_spec("fastcnn._C") is not None:
        return
    folder = Path(__file__).resolve().parent
    if (folder.parent / "pyproject.toml").exists():
        raise ImportError(
            f"{folder.parent} is the source checkout of fastcnn, which hides the installed package "
            f"and has no compiled part: run Python from another folder, or pip install "
            f"--no-build-isolation -e {shlex.quote(str(folder.parent))}"
        )
    raise ImportError(
        f"fastcnn expected its compiled part {folder / '_C'} for {sys.implementation.cache_tag}, "
        f"found none: install fastcnn with this Python, {sys.executable}"
    )


def check_torch(torch_version: str, fastcnn_version: str) -> None:
    """Raise ImportError naming both versions where torch is older than fastcnn needs."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ImportError(
            f"fastcnn {fastcnn_version} needs torch {OLDEST[0]}.{OLDEST[1]} or later, "
            f"found torch {torch_version}: run pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'"
        )
