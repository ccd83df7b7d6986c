"""The layout: every op has all its facets, imports run down, and tables agree with each other."""

import ast
import re

import pytest
import torch
from support.paths import ROOT
from torch.utils._device import _device_constructors

import fastcnn
from fastcnn import _C, functional, info
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.ops.squeeze_excite import GATE_NUMBER
from fastcnn.ops.upsample.arguments import SAMPLING_NUMBER

# Functions that have torch's name and not their op's, or are a second one of an op.
NAMES = {
    "interpolate": "upsample",
    "conv_bn_act_blocks": "conv_bn_act",
    "pack_conv2d_int8": "conv2d_int8",
}
OPS = sorted({NAMES.get(name, name) for name in functional.__all__ if name.islower()})
COMPOSED = {"conv_bn_act", "linear_act"}  # of other ops or PyTorch's: no kernels of their own
MODULES = {"augment": "fastcnn/augment/module.py"}  # the others: fastcnn/nn/<op>.py
NO_CUDA_SOURCE = {"conv2d_int8"}  # on GPUs convolutions are Triton's
NO_MODULE = {"conv2d_int8"}  # quantisation makes its modules
# On CUDA cuDNN's weight gradient needs no help, and it has a Winograd and 1x1 convolutions of its
# own; an inverted residual block is three calls, pieces are concatenated first, and conv2d_int8 is
# one kernel with its epilogue.
CPU_ONLY = {
    *(f"batch_norm_act_concat_{way}" for way in ("fwd", "apply", "bwd")),
    "conv2d_bwd_weight",
    "conv2d_int8_epilogue",
    "conv2d_winograd_bwd_weight",
    "conv2d_winograd_fwd",
    "inverted_residual_fwd",
    "pointwise_conv2d_fwd",
    "upsample_taps_fwd",
    "upsample_taps_bwd",
}
IN_PYTHON = {"clone_no_cse", "conv2d_int8"}  # registered on CUDA without a compiler for it
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
def test_op_has_all_facets(op: str) -> None:
    # The interface is a file, or a folder's interface.py.
    facets = [[f"fastcnn/ops/{op}.py", f"fastcnn/ops/{op}/interface.py"]]
    facets += [[f"fastcnn/reference/{op}.py"], [f"tests/ops/{op}/test_values.py"]]
    facets += [[f"benchmarks/bench_{op}.py"]]
    if op not in NO_MODULE:
        facets += [[MODULES.get(op, f"fastcnn/nn/{op}.py")]]
    if op in KERNEL_OPS:
        facets += [[f"csrc/{op}.h"], [f"csrc/{op}.cpp"], [f"csrc/cpu/{op}.cpp", f"csrc/cpu/{op}"]]
    if op in KERNEL_OPS and op not in NO_CUDA_SOURCE:
        facets += [[f"csrc/cuda/{op}.cu", f"csrc/cuda/{op}"]]
        facets += [[f"tests/ops/{op}/test_cuda.py"], [f"tests/cuda_emu/{op}.cpp"]]
    missing = [facet for facet in facets if not any((ROOT / file).exists() for file in facet)]
    assert not missing


def imports() -> dict[str, set[str]]:
    """Return what each module of fastcnn imports of fastcnn, at its top or later."""
    folder = ROOT / "fastcnn"
    files = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {name.name for name in node.names if name.name in files}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcnn"):
                whole = {f"{node.module}.{name.name}" for name in node.names}
                modules = {name for name in whole if name in files or name == "fastcnn._C"}
                found[module] |= modules if modules == whole else {*modules, str(node.module)}
    return found


def test_torch_is_included_by_glue_alone() -> None:
    # Kernels see sizes and pointers: one build serves every torch, and they compile in a second.
    for path in (ROOT / "csrc").rglob("*.*"):
        folder, *more = path.relative_to(ROOT / "csrc").parts
        if folder != "bindings" and (more or path.suffix != ".cpp"):
            assert not re.search(r'#include [<"](torch|ATen|c10|bindings)/', path.read_text()), path


def test_imports_make_no_circle() -> None:
    # One whose modules only import what was taken away before, until nothing can be taken.
    found = imports()
    left = {module: others & set(found) for module, others in found.items()}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left


def test_imports_run_down() -> None:
    # What a folder's modules may import besides their own: what stands below it.
    allowed = {
        "common": {"_C"},
        "triton": {"common"},
        "plan": {"_C", "common"},
        "ops": {"_C", "common", "plan", "triton"},
        "reference": {"common", "ops"},
        "info": {"_C", "ops", "plan"},
        "memory": {"_C"},
        "graphs": {"common"},
        "functional": {"common", "ops"},
        "nn": {"common", "functional", "ops"},
        "augment": {"common", "functional", "ops"},
        "convert": {"_C", "common", "functional", "nn", "ops", "plan"},
        "models": {"convert", "ops"},
        "lab": {"convert", "plan"},
        "train": {"lab", "models"},
        "cli": {"_C", "info", "train"},
        "__main__": {"cli"},
        "_version_check": set(),
    }
    for module, others in imports().items():
        if module == "fastcnn":
            continue
        own = module.split(".")[1]
        used = {other.split(".")[1] for other in others if "." in other} - {own}
        assert used <= allowed[own], module


def test_tensors_are_made_on_a_named_device() -> None:
    # Under torch.set_default_device they would be made there. Docstrings are no code.
    factories = {f.__name__ for f in _device_constructors()}
    missing = []
    for path in (ROOT / "fastcnn").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(ast.Attribute(ast.Name("torch"), name), keywords=keywords):
                    if name in factories and not {"device", None} & {k.arg for k in keywords}:
                        missing.append(f"{path.relative_to(ROOT)}:{call.lineno}: torch.{name}")
    assert not missing


def test_sources_are_built() -> None:
    # CMakeLists.txt lists sources by name: a forgotten one leaves its operators without kernels.
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for source in (ROOT / "csrc").rglob("*.c*"):
        if source.suffix in (".cpp", ".cu"):
            assert str(source.relative_to(ROOT)) in cmake


def test_info_names_every_op() -> None:
    assert set(info.BACKENDS) == set(OPS)


def test_sampling_tables_agree() -> None:
    header = (ROOT / "csrc/common/resample.h").read_text()
    names = {
        ("nearest", False): "Nearest",
        ("nearest-exact", False): "NearestExact",
        ("bilinear", False): "Bilinear",
        ("bilinear", True): "BilinearCorners",
    }
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


def test_gate_tables_agree() -> None:
    header = (ROOT / "csrc/squeeze_excite.h").read_text()
    table = re.search(r"enum class Gate : int32_t \{(.*?)\};", header, re.DOTALL)
    assert table is not None
    found = re.findall(r"k(\w+) = (\d+)", table[1])
    assert {name.lower(): int(n) for name, n in found} == GATE_NUMBER


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
