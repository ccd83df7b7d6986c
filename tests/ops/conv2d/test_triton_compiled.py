"""The Triton kernels compiled for GPUs that are not there, by the newest Triton and an older."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.older_triton import OLDER, run

NO_PRODUCT = ("depthwise", "merge of statistics")
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def compiled(
    tmp_path: Path, older: Path | None, archs: list[int], *names: str
) -> list[dict[str, Any]]:
    """Compile kernels, all where none is named; return what came out."""
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
    return rows


def check(row: dict[str, Any]) -> None:
    """Matrix instructions as fast as they are: fed by shared memory, asynchronous, no spills.

    float64, which int8's formula does without, takes 2 to 64 times as long as float32.

    The left operand of an asynchronous wgmma in registers is what ptxas before 13.3 may overwrite
    too early (Triton's issue 9433).
    """
    assert row["matrix"] == [MATRIX[row["arch"]]] * (row["name"] not in NO_PRODUCT), row
    assert row["int8"] is row["name"].startswith("int8"), row
    assert not row["float64"], row
    assert not (row["int8"] and row["fused"]), f"rounds once where the formula does twice: {row}"
    assert row["stack"] == row["local"] == 0, f"spills: {row}"
    by_descriptors = row["name"].startswith("1x1") and "stride" not in row["name"]
    assert row["tma"] is by_descriptors, row
    assert not row["serialised"], row
    assert not row["from_registers"], row


def test_matrix_instructions_and_no_spills(tmp_path: Path) -> None:
    some = ["1x1 in training", "3x3 in training", "3x3 in evaluation", "int8 3x3 of i8"]
    rows = compiled(tmp_path, None, [90], *some)
    assert sorted(row["name"] for row in rows) == sorted(some)
    for row in rows:
        check(row)


OF_TRITONS = pytest.mark.parametrize("older", [None, OLDER], ids=["newest", "of torch 2.11"])


@pytest.mark.slow
@OF_TRITONS
def test_all_kernels(older: Path | None, tmp_path: Path) -> None:
    for row in compiled(tmp_path, older, [90] if older else [*MATRIX]):
        check(row)


@pytest.mark.slow
@OF_TRITONS
def test_float_convolutions_at_every_tile(older: Path | None, tmp_path: Path) -> None:
    for row in compiled(tmp_path, older, [90], "--tiles"):
        check(row)
