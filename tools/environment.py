"""Make .venv ready for `make`: torch, the extras asked for, and fastcnn built from this checkout.

    python3 tools/environment.py train|dev
    python3 tools/environment.py wheel        torch and what building takes, without fastcnn

Runs on the standard library alone. A torch of 2.11 or later that the calling Python already has is
used as it is (.venv then sees the packages of that Python); else one is installed into .venv. What
is there and unchanged is not touched: a second run takes a fraction of a second.

Two cores are kept busy: torch is unpacked while the build's tools are, and fastcnn compiled while
the extras are installed. Only what is imported is compiled to bytecode, by the first import.
"""

import sys

# Before anything that an older Python has not: it must come as far as this.
if sys.version_info < (3, 10):
    sys.exit("environment: expected Python 3.10 or later, got " + sys.version.split()[0])

import ast
import functools
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sysconfig
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from find_torch import REQUIRES

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OLDER = VENV / "older-triton"
STAMP = "fastcnn.json"  # in .venv: what it was made from, and what is installed
EXTRAS = {"train": ["train"], "dev": ["bench", "dev", "train"], "wheel": []}  # of pyproject.toml

# Without a GPU: the release with which docs/performance.md was measured. A registry that has a CPU
# build of it gives that one. With a GPU: any release that the stable ABI serves.
TORCH_CPU, TORCH_CUDA = "torch==2.13.0", "torch>=2.11"
BUILD = [*REQUIRES, "numpy"]
# CUDA's headers, for the emulated tests where there is no toolkit. Without their dependencies, so
# that they cannot touch the packages that a CUDA build of torch brought along.
HEADERS = ["nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*"]
# Beside the newest Triton, for the tests of what both compile: the one of torch 2.11, in a folder
# of its own, which those tests put in front.
OLDER_TRITON = "triton==3.6.*"
# Seconds without a byte after which a download is stopped. pip's own limit, 15 where nobody has set
# another, comes first where the connection is what is broken.
STUCK = 120
TOLD = 10  # seconds between two lines about a download
ASK_TORCH = "import importlib.metadata as m; print(m.version('torch'))"


def main() -> None:
    """Bring .venv up to date."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        stop(f"expected one of {', '.join(EXTRAS)}, got {sys.argv[1:]}")
    started = time.monotonic()
    base = {"root": str(ROOT), "python": sys.version, "prefix": sys.prefix}
    stamp = read_stamp()
    same_base = {name: stamp.get(name) for name in base} == base
    # Called by .venv's own Python: it cannot replace itself, and what it has is what there is.
    is_ours = same_base or (Path(sys.prefix) == VENV and "key" in stamp)
    extras = sorted({*EXTRAS[sys.argv[1]], *(stamp.get("extras", []) if is_ours else [])})
    if sys.argv[1] == "wheel":
        if not is_ours:
            create()
            write_stamp({**base, "key": None, "extras": []})
        return
    options = build_options("dev" in extras)
    key = fingerprint(options)
    if is_ours and stamp["key"] == key and stamp.get("extras") == extras:
        return
    if not is_ours:
        create()
        stamp = base
    packages = [requirement for extra in extras for requirement in requirements(extra)]
    stamp = {**stamp, "key": None, "extras": extras}  # a failure leaves what is installed in place
    write_stamp(stamp)

    def install_packages() -> None:
        if stamp.get("packages") != packages:
            # With torch, for what it needs itself.
            pip("-c", constraints(), "torch", *packages)
            if "dev" in extras:
                install_oracles()
            stamp["packages"] = packages
            write_stamp(stamp)

    say(f"building fastcnn[{','.join(extras)}]{cpu_only(options)}")
    at_once(lambda: build(options), install_packages)
    write_stamp({**stamp, "key": key})
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
    ask_index()
    if usable(version_of_torch(VENV / "bin" / "python")):
        pip(*BUILD)
    else:
        torch = TORCH_CUDA if has_gpu() else TORCH_CPU
        say(f"installing {torch}")
        # Without its dependencies: two pips at once must not install the same package.
        at_once(lambda: pip("--no-deps", torch), lambda: pip(*BUILD))


def build(options: dict[str, str]) -> None:
    """Build fastcnn and install it, editable."""
    pip("--no-build-isolation", "--no-deps", "-e", str(ROOT), **options)


def build_options(dev: bool) -> dict[str, str]:
    """The build's options (CMakeLists.txt) that differ from what it takes by itself.

    The tests read what nvcc makes of the kernels, with a GPU or without one: for one architecture,
    with the PTX that all others would be assembled from.
    """
    if not dev or "FASTCNN_CUDA" in os.environ or not toolkit():
        return {}
    archs = {} if has_gpu() or "FASTCNN_CUDA_ARCHS" in os.environ else {"FASTCNN_CUDA_ARCHS": "90"}
    return {"FASTCNN_CUDA": "ON", **archs}


def cpu_only(options: dict[str, str]) -> str:
    """What to add where the CUDA kernels could be compiled and are not, '' elsewhere."""
    cuda = {**os.environ, **options}.get("FASTCNN_CUDA", "").upper()
    if cuda not in ("", "AUTO") or not toolkit() or (has_gpu() and torch_has_cuda()):
        return ""
    why = "torch was built without CUDA" if has_gpu() else "there is no GPU"
    return f" for the CPU: {why} (FASTCNN_CUDA=ON builds the CUDA kernels)"


def read_stamp() -> dict[str, Any]:
    """What the stamp says, {} without one."""
    path = VENV / STAMP
    return json.loads(path.read_text()) if path.exists() else {}


def write_stamp(stamp: dict[str, Any]) -> None:
    """Replace the stamp."""
    (VENV / STAMP).write_text(json.dumps(stamp))


def fingerprint(options: dict[str, str]) -> str:
    """A hash of everything that the built package depends on; Python sources only by their names.

    The installation is editable: Python files are used from the checkout as they are.
    """
    names = ("FASTCNN_CUDA", "FASTCNN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    names += ("CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS")
    told = [os.environ.get(name) for name in names]
    digest = hashlib.sha256(repr((told, sorted(options.items()), toolkit(), has_gpu())).encode())
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    files += [ROOT / "tools" / name for name in ("choose_cuda.cmake", "find_torch.py")]
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


@functools.cache
def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def version_of_torch(python: Path) -> str:
    """The version of the torch that a Python has, '' where it has none."""
    told = subprocess.run([python, "-c", ASK_TORCH], capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else ""


def torch_has_cuda() -> bool:
    """Whether the torch of .venv was built with CUDA."""
    command = [VENV / "bin" / "python", ROOT / "tools" / "find_torch.py"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return told.split()[-1] != "none"


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


def requirements(extra: str) -> list[str]:
    """What pyproject.toml lists for an extra, except other extras of fastcnn.

    The list is read as Python's, which it is as well: Python 3.10 has no tomllib.
    """
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{extra} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        stop(f"expected pyproject.toml to have an extra {extra}, and it has none")
    return [listed for listed in ast.literal_eval(found[1]) if not listed.startswith("fastcnn[")]


def install_oracles() -> None:
    """Install those whose models, exporters and trainers the tests use, for the torch in .venv.

    Without their dependencies, of which torch is one: they would replace a CPU build of torch. What
    they need besides, and the extras do not bring, is named here too.
    """
    minor = int(version_of_torch(VENV / "bin" / "python").split(".")[1])
    oracles = {
        "torchvision": f"torchvision==0.{minor + 15}.*",  # torch 2.11 goes with 0.26, and so on
        "timm": "timm>=1.0",
        "segmentation_models_pytorch": "segmentation-models-pytorch>=0.5",
        "onnxscript": "onnxscript",
        "onnx_ir": "onnx-ir",
        "pytorch_lightning": "pytorch-lightning>=2.6.6",  # 2.6.2 and 2.6.3 were malicious
        "lightning_utilities": "lightning-utilities",
        "torchmetrics": "torchmetrics",
        "accelerate": "accelerate",
        "psutil": "psutil",
        "monai": "monai",
        "ignite": "pytorch-ignite",  # MONAI's trainers are its engines
    }
    ask = f"import importlib.util as u; print(*[n for n in {list(oracles)} if not u.find_spec(n)])"
    missing = [oracles[name] for name in run_python(ask).split()]
    missing += [] if toolkit() else HEADERS
    if missing:
        pip("--no-deps", *missing)
    if not OLDER.exists():
        pip("--no-deps", "--target", str(OLDER), OLDER_TRITON)


def at_once(*works: Callable[[], None]) -> None:
    """Do these at once; the first that fails ends the script, when the others are done."""
    with ThreadPoolExecutor() as pool:
        for work in [pool.submit(work) for work in works]:
            work.result()


def run_python(code: str) -> str:
    """What a line of Python prints in .venv."""
    command = [VENV / "bin" / "python", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def ask_index() -> None:
    """End with one sentence where no package index answers: pip would try for minutes.

    pip itself is asked, for a package of 0.2 MB: it knows indexes, mirrors, proxies and folders.
    """
    with tempfile.TemporaryDirectory() as folder:
        once = ["--retries", "1", "--timeout", "10", "--no-deps", "--dest", folder]
        command = [*pip_command("download"), *once, REQUIRES[0]]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return
    asked = re.search(r"^Looking in indexes: (.+)$", done.stdout, re.MULTILINE)
    index = asked[1] if asked else "https://pypi.org/simple"
    broken = re.findall(r"connection broken by '(.+)': /", done.stdout)
    warnings = [line for line in done.stdout.splitlines() if line.startswith(("WARN", "ERROR"))]
    stop(
        f"expected {REQUIRES[0]} from a package index, asked {index}, got none: connect, or name "
        f"another by PIP_INDEX_URL. pip says: {short([*broken, *warnings, done.stdout][0], 300)}"
    )


def pip(*arguments: str, **options: str) -> None:
    """Run `pip install` in .venv, with more in its environment; show its output if it fails.

    While it runs, a line for each package that it downloads and every ten seconds of a download.
    """
    lines: list[str] = []
    # Where pip's downloads lie until they are installed.
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        process = subprocess.Popen(
            [*pip_command("install"), "--no-compile", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": folder, **options},
        )

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as told:
                for line in told:
                    lines.append(line)
                    news = news_of(line)
                    if news:
                        say(news)

        reader = threading.Thread(target=read)
        reader.start()
        stuck = watch(process, lines, Path(folder))
        reader.join()
    if stuck:
        stop(f"{''.join(lines)}{stuck}: stopped; the next call goes on with what is there")
    if process.returncode != 0:
        stop(f"{''.join(lines)}pip install {' '.join(arguments)} failed: its output is above")


def pip_command(verb: str) -> list[str]:
    """A command of .venv's pip."""
    return [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", verb]


def watch(process: "subprocess.Popen[str]", lines: list[str], folder: Path) -> str:
    """Wait for pip; where a download stands still, end it and say which."""
    line, files = "", {}
    grown = told = time.monotonic()
    while True:
        try:
            process.wait(timeout=0.2)
            return ""
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        last = lines[-1] if lines else ""
        download = DOWNLOAD.match(last)
        if download is None:
            continue
        before, files = files, sizes(folder)
        if last != line:
            line, grown, told = last, now, now
        elif files != before:
            grown = now
        elif now - grown > STUCK:
            process.kill()
            process.wait()
            return f"no byte of {download['name']} came for {STUCK} s"
        if now - told > TOLD and files:
            told = now
            # The newest: what was downloaded before lies there as well.
            say(f"{download['name']}: {max(files.values())[1] / 1e6:.0f} MB came")


def sizes(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file in a folder was written last, and its bytes."""
    found = {}
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # moved meanwhile
            continue
        if not path.is_dir():
            found[path] = (status.st_mtime_ns, status.st_size)
    return found


# Of pip's lines: `Downloading https://…/torch-2.13.0-cp311-….whl (873.2 MB)`, not of metadata.
DOWNLOAD = re.compile(
    r"\s*Downloading (?:\S+/)?(?P<name>[^/\s]+?-\d[^-\s]*)\S*(?<!\.metadata)(?: \((?P<size>.+)\))?$"
)
INSTALL = re.compile(r"Installing collected packages: (.+)$")


def news_of(line: str) -> str:
    """What to show of a line of pip's, '' for most."""
    download, install = DOWNLOAD.match(line), INSTALL.match(line)
    if download:
        return f"downloading {download['name']} ({download['size'] or 'of unknown size'})"
    if install:
        packages = install[1].split(", ")
        return f"installing {', '.join(packages[:8])}{' and more' if packages[8:] else ''}"
    if "Retrying (" in line:
        return short(line.strip(), 200)
    return ""


def short(text: str, length: int) -> str:
    """A text, cut."""
    return text if len(text) <= length else f"{text[:length]}..."


def say(message: str) -> None:
    """Print one line at once."""
    print(f"environment: {message}", flush=True)


def stop(message: str) -> NoReturn:
    """End with one sentence."""
    sys.exit(f"environment: {message}")


if __name__ == "__main__":
    main()
