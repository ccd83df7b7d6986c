"""The Triton kernels compiled for GPUs that are not there, by the newest Triton and an older."""

import json
from pathlib import Path

import pytest
from support.older_triton import OLDER, run

NO_PRODUCT = ("depthwise", "merge of statistics")
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def check(tmp_path: Path, older: Path | None, archs: list[int], *names: str) -> list[str]:
    """Compile kernels, all where none is named; return which."""
    done = run(
        ["-m", "support.triton_compile", ",".join(map(str, archs)), *names],
        older,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["triton"].startswith("3.6.") is bool(older) for row in rows)
    assert {row["arch"] for row in rows} == set(archs)
    for row in rows:
        assert row["matrix"] == [MATRIX[row["arch"]]] * (row["name"] not in NO_PRODUCT), row
        assert row["int8"] is row["name"].startswith("int8"), row
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        by_descriptors = row["name"].startswith("1x1") and "stride" not in row["name"]
        assert row["tma"] is by_descriptors, row
    return [row["name"] for row in rows]


def test_matrix_instructions_and_no_spills(tmp_path: Path) -> None:
    some = ["1x1 in training", "3x3 in training", "int8 3x3 of i8"]
    assert sorted(check(tmp_path, None, [90], *some)) == sorted(some)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("older", "archs"), [(None, [*MATRIX]), (OLDER, [90])], ids=["newest", "of torch 2.11"]
)
def test_all_kernels(older: Path | None, archs: list[int], tmp_path: Path) -> None:
    check(tmp_path, older, archs)
