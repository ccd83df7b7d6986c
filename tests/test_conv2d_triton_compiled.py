"""The Triton kernels compiled for cards that are not there, by the newest Triton and an older."""

import json
from pathlib import Path

import pytest
from older_triton import OLDER, run

NO_PRODUCT = ("depthwise", "join of statistics", "sums of tiles")
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


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
        assert row["matrix"] == [MATRIX[row["arch"]]] * (row["name"] not in NO_PRODUCT), row
        assert row["int8"] is row["name"].startswith("int8"), row
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        by_descriptors = "1x1" in row["name"] and "stride" not in row["name"]
        assert row["tma"] is by_descriptors, row
