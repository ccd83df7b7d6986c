"""Make .venv ready for `make`: torch, the extras asked for, and fastcnn built from this checkout.

    python3 tools/environment.py train|dev

Runs on the standard library alone. A torch of 2.11 or later that the calling Python already has is
used as it is (.venv then sees the packages of that Python); else one is installed into .venv. What
is there and unchanged is not touched: a second run takes a fraction of a second.
"""

import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OLDER = VENV / "older-triton"
STAMP = "fastcnn.json"  # in .venv: what it was made from, and what is installed
EXTRAS = {"train": {"train"}, "dev": {"train", "dev"}}  # what an installation serves

# Without a GPU: the release with which docs/performance.md was measured. A registry that has a CPU
# build of it gives that one. With a GPU: any release that the stable ABI serves.
TORCH_CPU, TORCH_CUDA = "torch==2.13.0", "torch>=2.11"
BUILD = ["scikit-build-core>=0.11", "pybind11>=2.13", "ninja", "cmake>=3.24", "numpy"]
# CUDA's headers, for the emulated tests where there is no toolkit. Without their dependencies, so
# that they cannot touch the packages that a CUDA build of torch brought along.
HEADERS = ["nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*"]
# Beside the newest Triton, for the tests of what both compile: the one of torch 2.11, in a folder
# of its own, which those tests put in front.
OLDER_TRITON = "triton==3.6.*"
ASK_TORCH = "import torch; print(torch.__version__)"


def main() -> None:
    """Bring .venv up to date."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        stop(f"expected one of {', '.join(EXTRAS)}, got {sys.argv[1:]}")
    if sys.version_info < (3, 10):
        stop(f"expected Python 3.10 or later, got {sys.version.split()[0]}")
    extra, started = sys.argv[1], time.monotonic()
    base = {"root": str(ROOT), "python": sys.version, "prefix": sys.prefix}
    stamp = read_stamp()
    key = fingerprint()
    same_base = {name: stamp.get(name) for name in base} == base
    # Called by .venv's own Python: it cannot replace itself, and what it has is what there is.
    if same_base or (Path(sys.prefix) == VENV and "key" in stamp):
        base = {name: stamp[name] for name in base}
        if stamp["key"] == key and extra in stamp["serves"]:
            return
    else:
        create()
        stamp = {**base, "key": None, "serves": []}
        write_stamp(stamp)
    serves = EXTRAS[extra] | set(stamp["serves"])
    wanted = "dev" if "dev" in serves else "train"
    say(f"building and installing fastcnn[{wanted}]")
    write_stamp({**stamp, "key": None})  # a failure here leaves torch and the tools in place
    pip("--no-build-isolation", "-c", constraints(), "-e", f"{ROOT}[{wanted}]")
    if wanted == "dev":
        install_oracles()
        if not OLDER.exists():
            pip("--no-deps", "--target", str(OLDER), OLDER_TRITON)
        if not toolkit():
            pip("--no-deps", *HEADERS)
    write_stamp({**stamp, "key": key, "serves": sorted(serves)})
    built = run_python("from fastcnn import info; print(info.facts()['CUDA kernels'])")
    say(f"ready after {time.monotonic() - started:.0f} s; CUDA kernels: {built}")


def create() -> None:
    """Make .venv anew, with a torch in it or the calling Python's in sight."""
    if VENV.exists() and not (VENV / STAMP).exists():
        stop(f"expected {VENV} to be made by this script, got another one: move it away")
    if Path(sys.prefix) == VENV:
        stop(f"expected another Python than that of {VENV}, which is unfinished: deactivate it")
    say(f"creating {VENV.relative_to(ROOT)}")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        stop("this Python cannot make virtual environments: on Debian, apt install python3-venv")
    write_stamp({"root": None})  # from here on .venv is known as ours
    if usable(version_of_torch(Path(sys.executable))):
        # A .pth file, not system_site_packages: that shows the packages of the system's Python, and
        # the caller may be a virtual environment itself.
        shown = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        if sys.prefix == sys.base_prefix:
            shown |= {*site.getsitepackages(), site.getusersitepackages()}
        packages = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))"))
        (packages / "caller.pth").write_text("\n".join(sorted(shown)) + "\n")
    if not usable(version_of_torch(VENV / "bin" / "python")):
        torch = TORCH_CUDA if has_gpu() else TORCH_CPU
        say(f"installing {torch}")
        pip(torch)
    pip(*BUILD)


def read_stamp() -> dict[str, Any]:
    """What the stamp says, {} without one."""
    path = VENV / STAMP
    return json.loads(path.read_text()) if path.exists() else {}


def write_stamp(stamp: dict[str, Any]) -> None:
    """Replace the stamp."""
    (VENV / STAMP).write_text(json.dumps(stamp))


def fingerprint() -> str:
    """A hash of everything that the built package depends on; Python sources only by their names.

    The installation is editable: Python files are used from the checkout as they are.
    """
    names = ("FASTCNN_CUDA", "FASTCNN_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS")
    options = [os.environ.get(name) for name in names]
    digest = hashlib.sha256(repr((options, toolkit())).encode())
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", ROOT / "tools" / "find_torch.py"]
    for path in sorted([*files, *(ROOT / "csrc").rglob("*.*")]):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    for path in sorted((ROOT / "fastcnn").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}".encode())
    return digest.hexdigest()


def toolkit() -> str | None:
    """The path of nvcc where CMakeLists.txt will find it, None without one."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def version_of_torch(python: Path) -> str:
    """The version of the torch that a Python has, '' where it has none that can be imported."""
    told = subprocess.run([python, "-c", ASK_TORCH], capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else ""


def usable(version: str) -> bool:
    """Whether fastcnn works with this version of torch."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= (2, 11)


def constraints() -> str:
    """A constraints file that keeps pip from replacing the torch that is there."""
    version = version_of_torch(VENV / "bin" / "python")
    path = VENV / "constraints.txt"
    path.write_text(f"torch=={version}\n")
    return str(path)


def install_oracles() -> None:
    """Install those whose models the tests compare with, torchvision for the torch in .venv.

    Without their dependencies, of which torch is one: they would replace a CPU build of torch.
    """
    minor = int(version_of_torch(VENV / "bin" / "python").split(".")[1])
    oracles = {
        "torchvision": f"torchvision==0.{minor + 15}.*",  # torch 2.11 goes with 0.26, and so on
        "timm": "timm>=1.0",
        "segmentation_models_pytorch": "segmentation-models-pytorch>=0.5",
    }
    for name, requirement in oracles.items():
        ask = f"import importlib.util as u; print(u.find_spec({name!r}) is not None)"
        if run_python(ask) == "False":
            pip("--no-deps", requirement)


def run_python(code: str) -> str:
    """What a line of Python prints in .venv."""
    command = [VENV / "bin" / "python", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def pip(*arguments: str) -> None:
    """Run `pip install` in .venv; show its words only if it fails."""
    command = [VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        stop(f"{done.stdout}pip install {' '.join(arguments)} failed: its words are above")


def say(words: str) -> None:
    """Print one line at once."""
    print(f"environment: {words}", flush=True)


def stop(words: str) -> None:
    """End with one sentence."""
    sys.exit(f"environment: {words}")


if __name__ == "__main__":
    main()
