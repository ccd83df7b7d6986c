"""What must be the same for two times to be comparable: the plan file goes by it."""

import contextlib
import functools
import hashlib
from importlib import metadata
from pathlib import Path

import torch

from fastcnn import _C
from fastcnn.plan.problem import Device

__all__ = ["environment_of", "hash_of"]


def environment_of(device: Device) -> dict[str, str]:
    """Return device, driver, the versions of all that runs, and a hash of the kernels' source."""
    triton = "none"
    for name in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        with contextlib.suppress(metadata.PackageNotFoundError):
            triton = metadata.version(name)
            break
    return {
        "device": f"{device.name} {device.capability}",
        "driver": device.driver,
        "torch": str(torch.__version__),
        "triton": triton,
        "fastcnn": _C.version,
        "kernels": _kernels(),
    }


@functools.cache
def _kernels() -> str:
    """Hash Triton's kernels, which change in a checkout while the version stays."""
    return hash_of(Path(__file__).parents[1] / "triton")


def hash_of(folder: Path) -> str:
    """Return 16 hexadecimal digits for the Python files of a folder, by name and content."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        source = path.read_bytes()
        found.update(f"{path.name} {len(source)}\n".encode() + source)
    return found.hexdigest()[:16]
