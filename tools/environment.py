"""Make .venv ready for `make`: torch, the extras asked for, and fastcnn built from this checkout.

    python3 tools/environment.py train|dev

Runs on the standard library alone. A torch of 2.11 or later that the calling Python already has is
used as it is (the environment then sees that Python's packages); else one is installed into .venv.
What is there and unchanged is not touched: a second run takes a fraction of a second.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "fastcnn.json"
EXTRAS = {"train": {"train"}, "dev": {"train", "dev"}}  # what an installation serves

# Without a GPU: the release with which the CPU numbers in docs/ were measured. A registry that has
# a CPU build of it gives that one. With a GPU: any release that the stable ABI serves.
TORCH_CPU, TORCH_CUDA = "torch==2.13.0", "torch>=2.11"
BUILD = ["scikit-build-core>=0.11", "pybind11>=2.13", "ninja", "cmake>=3.24", "numpy"]


def own_torch() -> bool:
    """Whether the Python that runs this has a torch that fastcnn can use."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return found is not None and (int(found[1]), int(found[2])) >= (2, 11)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def fingerprint() -> str:
    """A hash of everything that the built package depends on; Python sources only by their names.

    The installation is editable: Python files are used from the checkout as they are.
    """
    options = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTCNN_")}
    digest = hashlib.sha256(repr((sys.version, shutil.which("nvcc"), options)).encode())
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    for path in sorted((ROOT / "fastcnn").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}".encode())
    return digest.hexdigest()


def pip(*arguments: str) -> None:
    """Run `pip install` in .venv; show its words only if it fails."""
    command = [VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}environment: pip install {' '.join(arguments)} failed")


def install_oracle() -> None:
    """Install the torchvision that belongs to the torch in .venv: the tests compare with it.

    Without its dependencies, of which torch is one: they would replace a CPU build of torch.
    """
    ask = "import importlib.util as u, torch; print(torch.__version__, u.find_spec('torchvision'))"
    told = subprocess.run(
        [VENV / "bin" / "python", "-c", ask], capture_output=True, text=True, check=True
    ).stdout
    if told.rstrip().endswith(" None"):
        minor = int(told.split(".")[1])  # torch 2.11 goes with torchvision 0.26, and so on
        pip("--no-deps", f"torchvision==0.{minor + 15}.*")


def main() -> None:
    """Bring .venv up to date."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        sys.exit(f"environment: expected one of {', '.join(EXTRAS)}, got {sys.argv[1:]}")
    if sys.version_info < (3, 10):
        sys.exit(f"environment: expected Python 3.10 or later, got {sys.version.split()[0]}")
    extra, started = sys.argv[1], time.monotonic()
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    key = fingerprint()
    if stamp.get("key") == key and extra in stamp["serves"]:
        return
    if not stamp:
        respected = own_torch()
        print(f"environment: creating {VENV.relative_to(ROOT)}", flush=True)
        venv.create(VENV, clear=True, with_pip=True, system_site_packages=respected)
        if not respected:
            torch = TORCH_CUDA if has_gpu() else TORCH_CPU
            print(f"environment: installing {torch}", flush=True)
            pip(torch)
        pip(*BUILD)
    serves = EXTRAS[extra] | set(stamp.get("serves", ()))
    wanted = "dev" if "dev" in serves else "train"
    print(f"environment: building and installing fastcnn[{wanted}]", flush=True)
    STAMP.unlink(missing_ok=True)
    pip("--no-build-isolation", "-e", f"{ROOT}[{wanted}]")
    if wanted == "dev":
        install_oracle()
    STAMP.write_text(json.dumps({"key": key, "serves": sorted(serves)}))
    print(f"environment: ready after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
