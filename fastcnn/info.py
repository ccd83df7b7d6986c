"""`python -m fastcnn.info`: what this build is, what it runs on, and each op's backend."""

import platform

import torch

from fastcnn import _C, plan
from fastcnn.ops.backends import BACKENDS
from fastcnn.ops.conv2d_int8.onednn import pairs_saturate


def facts() -> dict[str, str]:
    """Return name and value of everything worth a line in a bug report."""
    built_with_cuda = bool(_C.cuda_version)
    cuda = f"nvcc {_C.cuda_version} for {_C.cuda_archs}" if built_with_cuda else "built without"
    cpu = f"{_C.cpu_capability()} of {_C.cpu_levels}, {torch.get_num_threads()} threads"
    rows = {
        "fastcnn": _C.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _C.compiler,
        "CUDA kernels": cuda,
        "GPU": _gpu(),
        "CPU capability": cpu,
        "plans": plan.summary(),
    }
    for op, (on_cpu, on_cuda) in BACKENDS.items():
        there = built_with_cuda or on_cuda == "Triton"  # which compiles where it runs
        rows[op] = f"CPU: {on_cpu}; CUDA: {on_cuda if there else 'none in this build'}"
    if pairs_saturate():
        rows["conv2d_int8"] += "; without VNNI, by two convolutions each"
    return rows


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    missing = _C.missing_cuda_code(_C.cuda_archs, 10 * major + minor) if _C.cuda_version else ""
    return f"{name}, sm_{major}{minor}" + (f": {missing}" if missing else "")


def main() -> None:
    """Print the facts."""
    rows = facts()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
