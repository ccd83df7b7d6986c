"""The layout: every op has all its files, and its tables agree with each other."""

import re
from pathlib import Path

import pytest
import torch

import fastcnn
from fastcnn import _C, functional, info
from fastcnn.ops.activation import ACT_NUMBER
from fastcnn.ops.upsample_arguments import SAMPLING_NUMBER

ROOT = Path(__file__).resolve().parents[1]
# Functions that have torch's name and not their op's, or are a second one of an op.
NAMES = {
    "interpolate": "upsample",
    "conv_bn_act_blocks": "conv_bn_act",
    "pack_conv2d_int8": "conv2d_int8",
}
OPS = sorted({NAMES.get(name, name) for name in functional.__all__ if name.islower()})
COMPOSED = {"conv_bn_act"}  # made of other ops: no kernels of their own
MODULES = {"augment": "fastcnn/augment/module.py"}  # the others: fastcnn/nn/<op>.py
NO_CUDA_SOURCE = {"conv2d_int8"}  # on GPUs convolutions are Triton's
NO_MODULE = {"conv2d_int8"}  # quantisation makes its modules
# cuDNN's weight gradient needs no help; on CUDA conv2d_int8 is one kernel with its epilogue.
CPU_ONLY = {
    "conv2d_bwd_weight", "conv2d_int8_epilogue", "upsample_taps_fwd", "upsample_taps_bwd",
}  # fmt: skip
IN_PYTHON = {"afresh", "conv2d_int8"}  # registered on CUDA without a compiler for it
KERNEL_OPS = [op for op in OPS if op not in COMPOSED]
OPERATORS = [
    name.removeprefix("fastcnn::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastcnn::")
]


def test_there_are_ops() -> None:
    # The tests below walk these lists: empty ones would test nothing.
    assert "batch_norm_act" in KERNEL_OPS
    assert "batch_norm_act_fwd" in OPERATORS
    assert set(OPS) > COMPOSED


@pytest.mark.parametrize("op", OPS)
def test_op_has_all_files(op: str) -> None:
    files = [] if op in NO_MODULE else [MODULES.get(op, f"fastcnn/nn/{op}.py")]
    files += [f"fastcnn/ops/{op}.py", f"fastcnn/reference/{op}.py"]
    files += [f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    if op in KERNEL_OPS:
        files += [f"csrc/{op}.h", f"csrc/cpu/{op}.cpp"]
    if op in KERNEL_OPS and op not in NO_CUDA_SOURCE:
        files += [f"csrc/cuda/{op}.cu"]
        files += [f"tests/test_{op}_cuda.py", f"tests/cuda_emu/{op}.cpp"]
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not missing


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_sources_are_built(op: str) -> None:
    # CMakeLists.txt lists sources by name: a forgotten one leaves its operators without kernels.
    cmake = (ROOT / "CMakeLists.txt").read_text()
    sources = [f"csrc/{op}.cpp", f"csrc/cpu/{op}.cpp"]
    sources += [] if op in NO_CUDA_SOURCE else [f"csrc/cuda/{op}.cu"]
    for source in sources:
        assert source in cmake


def test_info_names_every_op() -> None:
    assert set(info.BACKENDS) == set(OPS)


def test_sampling_tables_agree() -> None:
    header = (ROOT / "csrc/common/source_index.h").read_text()
    names = {
        ("nearest", False): "Nearest", ("nearest-exact", False): "NearestExact",
        ("bilinear", False): "Bilinear", ("bilinear", True): "BilinearCorners",
    }  # fmt: skip
    in_cpp = {name: int(n) for name, n in re.findall(r"k((?:Near|Bilin)\w*) = (\d+)", header)}
    assert in_cpp == {names[how]: n for how, n in SAMPLING_NUMBER.items()}


def test_activation_tables_agree() -> None:
    # One table in Python, one in C++: the operator schemas carry the number.
    header = (ROOT / "csrc/common/activation.h").read_text()
    table = re.search(r"enum class Act : int32_t \{(.*?)\};", header, re.DOTALL)
    assert table is not None
    pairs = re.findall(r"k(\w+) = (\d+)", table[1])
    in_cpp = {re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower(): int(n) for name, n in pairs}
    assert in_cpp == ACT_NUMBER


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_cpu_and_cuda_kernels(name: str) -> None:
    # Declared in Python, implemented in _ops.so: a typo on one side shows here.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcnn::{name}", "CPU")
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcnn::{name}", "CUDA")
    built = bool(_C.cuda_version) or name in IN_PYTHON
    assert has_cuda == (built and name not in CPU_ONLY)


def test_version_is_the_project_s() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastcnn.__version__}"' in project
