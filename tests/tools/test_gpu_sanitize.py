"""What `make gpu` understands of compute-sanitizer, with synthetic output of it and no GPU."""

import sys
import time
from pathlib import Path

import pytest
from gpu import run as runs, sanitize
from gpu.run import Failed, Run


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= ERROR SUMMARY: 1 error", 86, 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)", 86, 3),
        ("========= ERROR SUMMARY: 0 errors", 1, "no errors, but status 1"),
        ("Traceback", 1, "no summary, status 1"),
        ("========= ERROR SUMMARY: 0 errors", None, "took too long"),
    ],
)
def test_what_compute_sanitizer_says(text: str, status: int | None, expected: int | str) -> None:
    assert sanitize.errors_of(text, status) == expected


UNWRITTEN = """
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int, T2, T3)+0x1f0
=========     by thread (0,0,0) in block (0,0,0)
========= Uninitialized __global__ memory read of size 16 bytes
=========     at fastcnn::load(const float *)+0x120 in vector.cuh:12
=========     by thread (32,0,0) in block (1,0,0)
=========     Device Frame: void fastcnn::(anonymous namespace)::dropout_flat_kernel<float, (int)4>
=========
========= ERROR SUMMARY: 2 errors
"""


def test_errors_of_other_people_s_kernels_are_not_ours() -> None:
    assert sanitize.ours(UNWRITTEN, 86) == 1
    assert sanitize.ours(UNWRITTEN.replace("dropout_flat_kernel", "some_kernel"), 86) == 0
    assert sanitize.ours("Traceback", 1) == "no summary, status 1"
    assert sanitize.triton_kernels() >= {"conv2d_kernel", "depthwise_int8_kernel"}


def test_a_tool_looks_although_a_case_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    cases = tmp_path / "cases.py"
    cases.write_text("import sys\nprint('launched: void one_kernel<float>(int)')\nsys.exit(1)")
    monkeypatch.setattr(sanitize, "CASES", [sys.executable, f"{cases}"])
    monkeypatch.setattr(sanitize, "kernels", lambda: {"one_kernel"})
    monkeypatch.setattr(sanitize, "triton_kernels", set)
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "filter_option", lambda program: "--kernel-name")
    monkeypatch.setattr(sanitize, "check", lambda *_: 0)
    with pytest.raises(Failed, match=r"cases\.py ended with status 1$") as failed:
        sanitize.sanitize(Run(tmp_path, tmp_path / "log", time.monotonic() + 60))
    assert failed.value.found["kernels"] == 1
    assert set(failed.value.found["errors"].values()) == {0}
