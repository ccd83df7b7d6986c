"""Every Triton kernel as its launches ask for it: compiled by the newest Triton and by an older."""

import json
from pathlib import Path

import pytest
from gpu.sanitize import triton_kernels
from support.older_triton import OLDER, run


@pytest.mark.slow
@pytest.mark.parametrize("older", [None, OLDER], ids=["newest", "of torch 2.11"])
def test_launches_compile(older: Path | None, tmp_path: Path) -> None:
    done = run(
        ["-m", "support.triton_jit", *(["more"] if older else [])],
        older,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["triton"].startswith("3.6.") is bool(older) for row in rows)
    assert {row["kernel"] for row in rows} == triton_kernels()
