"""Find the installed torch for CMakeLists.txt, or say in one sentence what to do.

Prints its folder, and the version of CUDA that it was built with, "none" without.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shlex
import sys

# What building takes, besides a C++ compiler.
REQUIRES = ["scikit-build-core>=0.11", "pybind11>=2.13", "ninja", "cmake>=3.25.2"]
ROOT = pathlib.Path(__file__).resolve().parents[1]
# A tarball's folder is gone when its build has failed: the name that was given then is the user's.
CHECKOUT = "." if (ROOT / "PKG-INFO").exists() else shlex.quote(str(ROOT))


def command(editable: bool = False) -> str:
    """One line that installs everything, in any folder."""
    packages = " ".join(shlex.quote(package) for package in ["torch>=2.11", *REQUIRES])
    install = f"pip install --no-build-isolation {'-e ' if editable else ''}{CHECKOUT}"
    return f"pip install {packages} && {install}"


def find_torch(editable: bool = False) -> tuple[pathlib.Path, str]:
    """The folder of torch, and its CUDA; ends with one sentence where it is missing or too old."""
    spec = importlib.util.find_spec("torch")  # finds it without the seconds that importing it takes
    if spec is None or spec.origin is None:
        why = "which an isolated build does not see" if isolated() else "and there is none here"
        sys.exit(f"fastcnn builds against your own torch, {why}: run {command(editable)}")
    folder = pathlib.Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
    if found is None or (int(found[2]), int(found[3])) < (2, 11):
        version = found[1] if found else "an unknown version"
        sys.exit(f"fastcnn expected torch 2.11 or later, got {version}: run {command(editable)}")
    cuda = re.search(r"^cuda\b.* = '(.+)'$", text, re.MULTILINE)
    return folder, cuda[1] if cuda else "none"


def isolated() -> bool:
    """Whether pip, build or uv made an environment for this build alone, by its folder's name."""
    marks = re.compile(r"/(pip-)?build-env-\w{8}(/|$)|/builds-v\d+/")
    return any(marks.search(folder) for folder in (sys.prefix, *sys.path))


if __name__ == "__main__":
    print(*find_torch(), sep="\n")
