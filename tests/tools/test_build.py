"""The build: its options, its one-sentence failures, and the separation of instruction sets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

FIND_TORCH = [sys.executable, "-S", str(ROOT / "tools/find_torch.py")]  # -S: sees no site-packages


def configure(tmp_path: Path, *options: str) -> str:
    """Configure the project up to its first failure; return what CMake said."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)  # .venv has one where the system has none
    command = [cmake, "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode != 0
    return " ".join((done.stdout + done.stderr).split())  # CMake wraps its lines


def test_no_torch_is_one_sentence_with_the_command() -> None:
    done = subprocess.run(FIND_TORCH, capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert "there is none here: run pip install 'torch>=2.11'" in done.stderr
    assert "--no-build-isolation" in done.stderr


@pytest.mark.parametrize(("version", "accepted"), [("2.10.1", False), ("2.11.0+cu130", True)])
def test_torch_must_be_new_enough(tmp_path: Path, version: str, accepted: bool) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    done = subprocess.run(
        FIND_TORCH, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode == 0) == accepted
    if accepted:
        assert done.stdout.strip() == str(package)
    else:
        assert f"expected torch 2.11 or later, got {version}" in done.stderr


def test_options_are_checked(tmp_path: Path) -> None:
    said = configure(tmp_path, "-DFASTCNN_CUDA=MAYBE")
    assert "FASTCNN_CUDA: expected AUTO, ON or OFF, got MAYBE" in said
    # "native" would build, and then nobody could tell which GPUs the binary serves.
    said = configure(tmp_path, "-DFASTCNN_CUDA=AUTO", "-DFASTCNN_CUDA_ARCHS=native")
    assert "FASTCNN_CUDA_ARCHS: expected numbers as in 80-real,90, got native" in said


def test_cuda_on_without_nvcc_says_the_way_out(tmp_path: Path) -> None:
    # NVCC=OFF is how CMake is told that a search has failed, also where there is an nvcc.
    said = configure(tmp_path, "-DFASTCNN_CUDA=ON", "-DNVCC=OFF")
    assert "FASTCNN_CUDA=ON needs nvcc" in said
    assert "FASTCNN_CUDA=OFF" in said


@pytest.mark.parametrize(
    ("asked", "gpus", "said"),
    [
        ("AUTO", "", "no GPU found, building for the CPU only; FASTCNN_CUDA=ON builds the CUDA"),
        ("AUTO", r"8.6\n9.0\n8.6\n", "CUDA kernels for 86,90 by"),
        ("ON", "", "CUDA kernels for 80-real,90 by"),
        ("OFF", r"9.0\n", ""),
    ],
)
def test_cuda_kernels_are_for_the_gpus_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, gpus: str, said: str
) -> None:
    # The two programs that CMake calls, and their end: no compiler, and no pybind11 where none is
    # wanted. A broken driver prints numbers, too.
    tools = {"nvidia-smi": f"printf '{gpus or 'driver 535.54 failed'}'; exit {not gpus:d}"}
    for name, script in {**tools, "nvcc": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options = [f"-DFASTCNN_CUDA={asked}", f"-DNVCC={tmp_path / 'nvcc'}"]
    told = configure(tmp_path / "build", *options, "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON")
    lines = [line for line in told.split("-- ") if line.startswith("fastcnn: ")]
    assert len(lines) == bool(said)
    assert said in told


def test_instruction_sets_share_no_inline_functions() -> None:
    # A weak symbol outside the level's namespace, in an object compiled for AVX-512, could be the
    # copy that the linker keeps for all levels: it would crash a machine without AVX-512.
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/cpu_*.dir/**/*.o"))
    assert {path.relative_to(ROOT / "build").parts[2] for path in objects} >= {"cpu_avx512.dir"}
    for path in objects:
        level = next(p for p in path.parts if p.startswith("cpu_"))[4:-4]
        nm = subprocess.run([shutil.which("nm"), "-C", path], capture_output=True, text=True)
        weak = [line[17:] for line in nm.stdout.splitlines() if line[17:18] in "WVwvu"]
        strangers = [s for s in weak if f"fastcnn::{level}::" not in s and "DW.ref" not in s]
        assert not strangers, f"{path}: {strangers}"
        defined = [line[19:] for line in nm.stdout.splitlines() if line[17:18] == "T"]
        assert defined, f"{path} defines nothing: is the check looking at the right files?"
        assert all(name.startswith(f"fastcnn::{level}::") for name in defined)


def test_rows_are_prefetched() -> None:
    # GCC takes a function that only prefetches for one without effect, and drops what calls it.
    norms = (
        "batch_norm_act/fwd",
        "batch_norm_act/bwd",
        "group_norm_act/group",
        "group_norm_act/pixel",
    )
    for kernel in norms:
        (path,) = (ROOT / "build").glob(f"*/CMakeFiles/cpu_avx512.dir/csrc/cpu/{kernel}.cpp.o")
        code = subprocess.run([shutil.which("objdump"), "-d", path], capture_output=True, text=True)
        assert "\tprefetch" in code.stdout, f"{kernel}: no prefetch among its instructions"
