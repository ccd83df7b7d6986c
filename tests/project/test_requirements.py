"""What fastcnn asks of torch, of the GPU and of the processor, and how it says so."""

import os
import subprocess
import sys

import pytest

from fastcnn import _C
from fastcnn._version_check import check_torch


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "nightly"])
def test_torch_too_old(version: str) -> None:
    with pytest.raises(ImportError, match=r"fastcnn 0.1 needs torch 2.11 or later, found torch"):
        check_torch(version, "0.1")


def test_torch_new_enough() -> None:
    # By numbers, not by text: "2.9" > "2.11" and "10.0" < "2.11" as strings.
    for version in ("2.11.0", "2.13.0+cpu", "3.0.0a0+git1234", "10.0.1"):
        check_torch(version, "0.1")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real,90", 80, True),  # its own machine code
        ("80-real,90", 86, True),  # machine code of a lower minor version
        ("80-real,90", 75, False),  # older than everything there is
        ("80-real,90", 100, True),  # from PTX of 90
        ("80-real,90-real", 100, False),  # no PTX
        ("86-real", 80, False),  # machine code of a higher minor version
        ("90-virtual", 90, True),  # PTX alone serves its own version
        ("90-virtual", 89, False),  # and none before
        ("100-real", 120, False),  # another major version
    ],
)
def test_code_for_the_gpu_that_is_there(archs: str, capability: int, runs: bool) -> None:
    missing = _C.missing_cuda_code(archs, capability)
    if runs:
        assert missing == ""
    else:
        for part in (f"for {archs} ", f"got sm_{capability}", f"FASTCNN_CUDA_ARCHS={capability}"):
            assert part in missing


def test_an_unknown_cpu_capability() -> None:
    code = "import fastcnn, torch; fastcnn.nn.BatchNormAct2d(3)(torch.ones(2, 3, 4, 4))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1, "an exception, not a crash"
    assert "FASTCNN_CPU_CAPABILITY: expected baseline, avx2 or avx512, got avx3" in done.stderr
