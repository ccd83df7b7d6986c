"""Builds CUDA sources as ordinary programs: g++ with cuda_emu.h in front, ASan and UBSan."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "cuda_emu"
HEADER = Path(__file__).with_name("cuda_emu.h")
AS_CUDA = ["-x", "c++", "-DFASTCNN_CUDA_EMULATION", "-include", str(HEADER)]
PROCESSES = 2  # what CI's machines have cores for
STANDARD = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
STANDARD += ["-Wno-unknown-pragmas"]  # #pragma unroll is nvcc's
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Of an access to no object ASan tells as well; UBSan's three checks of it are half of compilation.
SANITIZE += ["-fno-sanitize=null,object-size,pointer-overflow"]
FLAGS = [*STANDARD, "-g1", *SANITIZE, *AS_CUDA]


def build_runner(sources: list[Path], out: Path) -> Path:
    """Compile `sources` into the program `CACHE / out`, unless it is there from the same text."""
    command = compile_command()
    objects = compile_all([(source, command) for source in sources], out.parent / "objects")
    return build([command[0], *SANITIZE, *map(str, objects)], objects, out)


def compile_all(sources: list[tuple[Path, list[str]]], folder: Path) -> list[Path]:
    """Compile each source by its command into an object file in `CACHE / folder`, several at once.

    Programs share objects: a source that is there from the same text is not compiled again.
    """

    def compiled(given: tuple[Path, list[str]]) -> Path:
        source, command = given
        return build(
            [*command, "-c", str(source)],
            [source],
            folder / f"{source.parent.name}.{source.name}.o",
        )

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(compiled, sources))


def build(command: list[str], sources: list[Path], out: Path) -> Path:
    """Let `command -o` write `CACHE / out`, unless it is there from the same command and text."""
    key = _key(command, sources)
    out = CACHE / out
    out.parent.mkdir(parents=True, exist_ok=True)
    built_from = out.with_name(out.name + ".key")
    with open(out.with_name(out.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another pytest process may want the same program now
        if not (out.exists() and built_from.exists() and built_from.read_text() == key):
            # Never write over `out` itself: another process may be running it.
            new = out.with_name(out.name + ".new")
            done = subprocess.run(
                [*command, "-o", str(new)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"g++ failed on {', '.join(map(str, sources))}:\n{done.stderr}")
            os.replace(new, out)
            built_from.write_text(key)
    return out


def compile_command() -> list[str]:
    """The g++ command line without sources and output."""
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(find_cuda_include())]
    return [find_gxx(), *FLAGS, *include]


def find_gxx() -> str:
    gxx = shutil.which("g++")
    if gxx is None:
        raise RuntimeError(
            "the CUDA kernels are tested by compiling them with g++: install g++ 12 or newer"
        )
    return gxx


def find_cuda_include() -> Path:
    """The CUDA headers of $CUDA_HOME, nvcc, /usr/local/cuda, pip's wheels: the first complete."""
    tried = list(_cuda_include_candidates())
    for folder in tried:
        # One header of each wheel: cuda_runtime.h includes crt/, and cuda_bf16.h <nv/target>.
        needed = ("cuda_runtime.h", "crt/host_config.h", "nv/target")
        if all((folder / header).exists() for header in needed):
            return folder
    raise RuntimeError(
        "no CUDA headers found: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
        " (no GPU is needed), or set CUDA_HOME to a CUDA toolkit."
        f" Looked into {', '.join(map(str, tried))}"
    )


def _cuda_include_candidates() -> Iterator[Path]:
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"]) / "include"
    if nvcc := shutil.which("nvcc"):
        # Ask nvcc itself: the one on PATH is often a symbolic link or a wrapper script.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull],
            capture_output=True,
            text=True,
            check=False,
        )
        if found := re.search(r'INCLUDES="-I([^"]+)"', dry.stderr):
            yield Path(found[1])
    yield Path("/usr/local/cuda/include")
    if wheels := importlib.util.find_spec("nvidia"):
        for folder in wheels.submodule_search_locations or ():
            yield from sorted(Path(folder).glob("cu*/include"), reverse=True)


def _key(command: list[str], sources: list[Path]) -> str:
    """A hash of all that goes into the program; the CUDA headers are known by their place alone."""
    headers = [path for folder in (ROOT / "csrc", HEADER.parent) for path in folder.rglob("*.*h")]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True
    ).stdout
    digest = hashlib.sha256(repr((version, command)).encode())
    for path in [*sources, *sorted(headers)]:
        text = path.read_bytes()
        digest.update(f"{path} {len(text)}\n".encode() + text)
    return digest.hexdigest()
