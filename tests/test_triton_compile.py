"""The Triton kernels compiled for cards that are not there, by the newest Triton and torch 2.11's;
and the interpreter's tests once more with the latter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OLDER = TESTS.parent / ".venv/older-triton"
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def run(command: list[str], older: Path | None, **env: str) -> subprocess.CompletedProcess[str]:
    path = {} if older is None else {"PYTHONPATH": str(older)}
    return subprocess.run(
        [sys.executable, *command], cwd=TESTS, env={**os.environ, **env, **path},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("older", [None, OLDER], ids=["newest", "of torch 2.11"])
def test_matrix_instructions_and_no_spills(older: Path | None, tmp_path: Path) -> None:
    archs = [90] if older else [*MATRIX]  # 10 s each
    done = run(
        ["triton_compile.py", *map(str, archs)], older,
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["triton"].startswith("3.6.") is bool(older) for row in rows)
    assert {row["arch"] for row in rows} == set(archs)
    for row in rows:
        assert row["matrix"] == [MATRIX[row["arch"]]], row
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        if row["name"].startswith("1x1"):
            assert row["tma"], row


def test_the_interpreter_of_torch_211() -> None:
    files = ["test_conv2d_triton.py", "test_conv2d_bwd_triton.py"]
    # Its interpreter takes the int() of arrays with one number.
    warned = "ignore:Conversion of an array:DeprecationWarning"
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", warned, *files], OLDER)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
