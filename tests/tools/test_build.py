"""The build: its options, its one-sentence failures, and the separation of instruction sets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import find_torch
import pytest
from support.paths import ROOT

BARE = [sys.executable, "-S"]  # sees no site-packages
FIND_TORCH = [*BARE, str(ROOT / "tools/find_torch.py")]
NO_PYBIND11 = "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON"  # where a configuration ends that is right


def run_cmake(*arguments: str | Path) -> tuple[int, str]:
    """Run CMake; return its status and what it said."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)  # .venv has one where the system has none
    done = subprocess.run([str(cmake), *arguments], capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())  # CMake wraps its lines


def configure(tmp_path: Path, *options: str) -> str:
    """Configure the project up to its first failure; return what CMake said."""
    python = f"-DPython_EXECUTABLE={sys.executable}"
    status, said = run_cmake("-S", ROOT, "-B", tmp_path, python, *options)
    assert status != 0
    return said


def choose_cuda(
    tmp_path: Path,
    *options: str,
    gpus: str = "",
    cmake: str = "3.25.2",
    nvcc: str = r"printf 'sm_75\nsm_80\nsm_90\n'",
) -> str:
    """Return what the build says of CUDA with these GPUs, an nvcc and a torch with CUDA."""
    # A broken driver prints numbers, too.
    smi = f"printf '{gpus or 'driver 535.54 failed'}'; exit {not gpus:d}"
    write_programs(tmp_path, nvidia_smi=smi, nvcc=nvcc)
    script = tmp_path / "ask.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f"set(CMAKE_VERSION {cmake})\n"  # any CMake can say that it is an older one
        f"include({ROOT / 'tools/choose_cuda.cmake'})\n"
        'message(STATUS "with CUDA: ${WITH_CUDA}")\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        options = (f"-DNVCC={tmp_path / 'nvcc'}", "-DTORCH_CUDA=13.0", *options)
        return run_cmake(*options, "-P", script)[1]


def write_torch(folder: Path, version: str, cuda: str) -> Path:
    """Write what the build reads of a torch."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n{cuda}\n")
    return package


def write_programs(folder: Path, **scripts: str) -> None:
    """Write programs of a line of shell each."""
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


def hook(name: str, *path: Path) -> str:
    """Return what a hook of the build backend says where it refuses, in one line."""
    code = f"import build_backend; build_backend.{name}"
    env = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT / "tools", *path]))}
    done = subprocess.run([*BARE, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_no_torch_is_one_sentence_with_the_command() -> None:
    done = subprocess.run(FIND_TORCH, capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert "there is none here: run pip install 'torch>=2.11'" in done.stderr
    assert f"&& pip install --no-build-isolation {ROOT}" in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "get_requires_for_build_wheel()",
        "get_requires_for_build_editable()",
        "prepare_metadata_for_build_wheel('')",
        "prepare_metadata_for_build_editable('')",
        "build_wheel('')",
        "build_editable('')",
    ],
)
def test_every_hook_asks_for_torch_first(call: str) -> None:
    said = hook(call)
    assert "builds against your own torch, and there is none here: run pip install" in said
    assert ("--no-build-isolation -e " in said) == ("editable" in call)


def test_isolation_is_named_before_anything_is_downloaded(tmp_path: Path) -> None:
    # --no-index: pip could download nothing, and would say so instead.
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path, ROOT]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "own torch, which an isolated build does not see: run pip install" in said
    assert f"&& pip install --no-build-isolation {ROOT}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("folder", "isolated"),
    [
        ("/tmp/pip-build-env-x1_y2z3w/overlay/lib/python3.12/site-packages", True),
        ("/tmp/build-env-abcd1234", True),  # python -m build
        ("/root/.cache/uv/builds-v0/.tmpGx3b0Z", True),
        ("/home/me/build-env", False),
        ("/home/me/.venv", False),
    ],
)
def test_isolation_is_told_by_its_folders(
    monkeypatch: pytest.MonkeyPatch, folder: str, isolated: bool
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", folder)
    assert find_torch.isolated() == isolated


def test_no_scikit_build_core_is_one_sentence(tmp_path: Path) -> None:
    write_torch(tmp_path, "2.13.0", "")
    said = hook("build_wheel('')", tmp_path)
    assert "builds with scikit-build-core, and there is none here: run pip install" in said
    assert said == hook("prepare_metadata_for_build_wheel('')", tmp_path)
    assert "scikit-build-core" in hook("build_sdist('')")  # which asks for no torch


@pytest.mark.parametrize(("missing", "way"), [("CMake", "'cmake>=3.25.2'"), ("Ninja", "ninja")])
def test_no_cmake_and_no_ninja_are_one_sentence_each(
    tmp_path: Path, missing: str, way: str
) -> None:
    write_torch(tmp_path, "2.13.0", "")
    package = tmp_path / "scikit_build_core"
    package.mkdir()
    (package / "__init__.py").touch()
    errors = "class CMakeNotFoundError(Exception): ...\nclass NinjaNotFoundError(Exception): ...\n"
    (package / "errors.py").write_text(errors)
    (package / "build.py").write_text(
        "from scikit_build_core import errors\n"
        f"def build_wheel(*_): raise errors.{missing}NotFoundError\n"
        "build_editable = prepare_metadata_for_build_wheel = build_wheel\n"
        "prepare_metadata_for_build_editable = build_wheel\n"
    )
    for name in ("build", "prepare_metadata_for_build"):
        for kind in ("wheel", "editable"):
            assert f"there is none: run pip install {way}" in hook(f"{name}_{kind}('')", tmp_path)
    # The names are scikit-build-core's.
    from scikit_build_core import errors as real

    assert issubclass(getattr(real, f"{missing}NotFoundError"), Exception)


def test_requirements_are_the_same_everywhere() -> None:
    lists = [(ROOT / name).read_text() for name in ("README.md", "pyproject.toml")]
    for requirement in find_torch.REQUIRES:
        assert all(requirement in text for text in lists), requirement


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        ("2.10.1", "cuda: Optional[str] = '12.8'", None),
        ("2.11.0+cu130", "cuda: Optional[str] = '13.0'", "13.0"),
        ("2.11.0", "cuda = '12.8'", "12.8"),
        ("2.13.0+cpu", "cuda: Optional[str] = None", "none"),
    ],
)
def test_torch_must_be_new_enough(
    tmp_path: Path, version: str, cuda: str, said: str | None
) -> None:
    package = write_torch(tmp_path, version, cuda)
    done = subprocess.run(
        FIND_TORCH, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode == 0) == bool(said)
    if said:
        assert done.stdout.split() == [str(package), said]
    else:
        assert f"expected torch 2.11 or later, got {version}" in done.stderr


def test_options_are_checked(tmp_path: Path) -> None:
    said = choose_cuda(tmp_path, "-DFASTCNN_CUDA=MAYBE")
    assert "FASTCNN_CUDA: expected AUTO, ON or OFF, got MAYBE" in said
    said = choose_cuda(tmp_path, "-DFASTCNN_CUDA=OFF", "-DFASTCNN_CUDA_ARCHS=Hopper")
    assert "FASTCNN_CUDA_ARCHS: expected numbers as in 80-real,90, or native, got Hopper" in said


def test_cuda_on_without_nvcc_says_the_way_out(tmp_path: Path) -> None:
    # NVCC=OFF is how CMake is told that a search has failed, also where there is an nvcc.
    said = choose_cuda(tmp_path, "-DFASTCNN_CUDA=ON", "-DNVCC=OFF")
    assert "FASTCNN_CUDA=ON needs nvcc" in said
    assert "FASTCNN_CUDA=OFF" in said


CPU_ONLY = "building for the CPU only; FASTCNN_CUDA=ON builds the CUDA kernels"


@pytest.mark.parametrize(
    ("asked", "gpus", "said"),
    [
        ("AUTO", "", f"no GPU found, {CPU_ONLY}"),
        ("", "", f"no GPU found, {CPU_ONLY}"),
        ("AUTO", r"8.6\n9.0\n8.6\n", "CUDA kernels for 86,90 by"),
        ("auto", r"9.0\n", "CUDA kernels for 90 by"),
        ("ON", "", "CUDA kernels for 80-real,90 by"),
        ("on", "", "CUDA kernels for 80-real,90 by"),
        ("1", "", "CUDA kernels for 80-real,90 by"),
        ("True", "", "CUDA kernels for 80-real,90 by"),
        ("OFF", r"9.0\n", ""),
        ("off", r"9.0\n", ""),
        ("0", r"9.0\n", ""),
        ("false", r"9.0\n", ""),
    ],
)
def test_cuda_kernels_are_for_the_gpus_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, gpus: str, said: str
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    told = choose_cuda(tmp_path, f"-DFASTCNN_CUDA={asked}", gpus=gpus)
    lines = [line for line in told.split("-- ") if line.startswith("fastcnn: ")]
    assert len(lines) == bool(said)
    assert said in told
    assert told.endswith(f"with CUDA: {'ON' if 'CUDA kernels for' in told else 'OFF'}")


@pytest.mark.parametrize(
    ("asked", "said"),
    [("AUTO", f"fastcnn: torch was built without CUDA, {CPU_ONLY}"), ("ON", "kernels for 90 by")],
)
def test_a_torch_without_cuda_gets_cuda_kernels_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    options = (f"-DFASTCNN_CUDA={asked}", "-DTORCH_CUDA=none")
    told = choose_cuda(tmp_path, *options, gpus=r"9.0\n")
    assert said in told
    assert told.endswith(f"with CUDA: {'ON' if asked == 'ON' else 'OFF'}")


@pytest.mark.parametrize(
    ("archs", "torch_archs", "gpus", "said"),
    [
        ("9.0", "", "", "CUDA kernels for 90 by"),
        ("8.0-real 9.0", "", "", "CUDA kernels for 80-real,90 by"),
        ("native", "", r"8.6\n9.0\n", "CUDA kernels for 86,90 by"),
        ("native", "8.0", r"9.0\n", "CUDA kernels for 90 by"),
        ("native", "", "", "FASTCNN_CUDA_ARCHS=native needs a GPU, and nvidia-smi shows none"),
        ("", "8.0;9.0+PTX", r"8.6\n", "CUDA kernels for 80-real,90 by"),
        ("", "8.0 10.0", "", "CUDA kernels for 80-real,100-real by"),
        ("80", "9.0", "", "CUDA kernels for 80 by"),
        ("", "Hopper", "", "TORCH_CUDA_ARCH_LIST: expected numbers as in 8.0;9.0+PTX, got Hopper"),
    ],
)
def test_architectures_are_understood_as_people_write_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    archs: str,
    torch_archs: str,
    gpus: str,
    said: str,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", torch_archs)
    options = ("-DFASTCNN_CUDA=ON", f"-DFASTCNN_CUDA_ARCHS={archs}")
    assert said in choose_cuda(tmp_path, *options, gpus=gpus)


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        (
            r"printf 'sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\nsm_121\n'",
            "kernels for 80-real,86-real,89-real,90-real,100-real,120 by",
        ),
        (r"printf 'sm_80\nsm_86\nsm_89\nsm_90\nsm_90a\n'", "for 80-real,86-real,89-real,90 by"),
        ("exit 1", "expected an nvcc that lists what it compiles for, as 12.4 and later do, got 1"),
        ("echo", "name numbers in FASTCNN_CUDA_ARCHS"),
    ],
)
def test_without_a_gpu_the_usual_ones_have_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: str, said: str
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    told = choose_cuda(tmp_path, "-DFASTCNN_CUDA=ON", nvcc=nvcc)
    assert said in " ".join(told.split())


@pytest.mark.parametrize(("version", "accepted"), [("3.25.1", False), ("3.25.2", True)])
def test_cuda_asks_for_a_cmake_that_knows_its_cpp(
    tmp_path: Path, version: str, accepted: bool
) -> None:
    told = choose_cuda(tmp_path, "-DFASTCNN_CUDA=ON", cmake=version)
    refused = "fastcnn expected CMake 3.25.2 or later for CUDA, got 3.25.1: run pip install"
    assert (refused in told) != accepted
    assert told.endswith("with CUDA: ON") == accepted


def test_the_project_asks_its_own_torch_for_cuda(tmp_path: Path) -> None:
    # The whole of it once: a GPU, an nvcc that cannot compile, and two torches.
    write_programs(tmp_path, nvidia_smi=r"printf '9.0\n'", nvcc="exit 1")
    for cuda, said in {
        "'13.0'": "CUDA kernels for 90 by",
        "None": "torch was built without",
    }.items():
        folder = tmp_path / cuda.strip("'")
        write_torch(folder, "2.13.0", f"cuda: Optional[str] = {cuda}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            patch.setenv("PYTHONPATH", str(folder))
            patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
            nvcc = f"-DNVCC={tmp_path / 'nvcc'}"
            assert said in configure(folder / "build", "-DFASTCNN_CUDA=auto", nvcc, NO_PYBIND11)


@pytest.mark.parametrize(
    ("cxx", "said"),
    [
        (None, "there is no c++, g++, clang++, icpx on PATH: install g++ 12"),
        ("g++ -pthread", "there is no g++ on PATH: install g++ 12"),  # as scikit-build-core sets it
        ("/opt/c++/bin/c++", "there is no /opt/c++/bin/c++ on PATH: install g++ 12"),
    ],
)
def test_no_compiler_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cxx: str | None, said: str
) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [str(cmake), "-S", str(ROOT), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"fastcnn expected a C++ compiler, and {said}" in " ".join(done.stderr.split())


def test_no_pybind11_is_one_sentence(tmp_path: Path) -> None:
    said = configure(tmp_path, "-DFASTCNN_CUDA=OFF", NO_PYBIND11)
    assert "fastcnn builds with pybind11, and there is none here: run pip install" in said


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
