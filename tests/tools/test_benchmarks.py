"""The benchmarks run: a GPU's cases in sizes of nothing, what is written down, what ends a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

# Every way that a benchmark goes, most with what is special in it: a residual, a skip, one draw a
# channel, torch.compile, CUDA graphs, cases without a backward. `FASTCNN_BENCH=tiny pytest
# benchmarks` runs the others too.
SOME = [
    "bench_augment.py::test_augment[everything-nhwc-batch]",
    "bench_batch_norm_act.py::test_training[256x56x56-bf16-nhwc-residual]",
    "bench_conv2d_int8.py::test_convolutions[resnet50-128-128-k3-s1-28]",
    "bench_conv_bn_act.py::test_blocks[stage1-identity-bf16]",
    "bench_conv_bn_act.py::test_inference[infer-resnet50-64-256-k1-s1-56]",
    "bench_conv_bn_act.py::test_training[train-resnet50-128-128-k3-s1-28]",
    "bench_dropout.py::test_training[256x56x56-bf16-nhwc-channel]",
    "bench_group_norm_act.py::test_layer_norm_2d[bf16-nhwc]",
    "bench_group_norm_act.py::test_training[64x320x64x64-32-bf16-nhwc]",
    "bench_networks.py::test_inference[unet-256px-inference]",
    "bench_networks.py::test_training_step[resnet50-224px-bf16]",
    "bench_upsample.py::test_backward[128x128x128-bilinear-bf16-nhwc]",
    "bench_upsample.py::test_doubled[128x128x128-bilinear-skip-bf16-nhwc]",
]


def bench(tmp_path: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Run pytest as `make gpu` does; return its exit status, what it printed, and the rows."""
    rows = tmp_path / "rows.jsonl"
    path = f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT / 'tests'}"  # for -p conftest
    environment = {**os.environ, "FASTCNN_BENCH": "tiny", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "--benchmark-disable", f"--rows={rows}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert rows.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, list(map(json.loads, rows.read_text().splitlines()))


@pytest.mark.slow
def test_the_gpu_s_cases(tmp_path: Path) -> None:
    status, out, rows = bench(tmp_path, *[f"benchmarks/{case}" for case in SOME])
    assert status == 0, out
    assert sorted(f"{row['file']}.py::{row['test']}[{row['case']}]" for row in rows) == SOME
    assert all(row["device"].startswith("tiny sizes, no times") for row in rows)
    by_test = {(row["file"], row["test"]): row for row in rows}
    for (file, _), row in by_test.items():
        assert all(ms > 0 for ms in row["ms"].values())
        kernel = file in ("bench_batch_norm_act", "bench_dropout", "bench_group_norm_act")
        assert set(row["ms"]) >= {"ours", "eager", "copy"} | ({"compiled"} if kernel else set())
    # Sizes as made: 2 bytes an element, the largest of 16 a dimension, 32 where it is doubled.
    assert by_test["bench_batch_norm_act", "test_training"]["bytes"] == 2 * 16**4
    assert by_test["bench_upsample", "test_backward"]["bytes"] == 2 * 16**2 * 32**2
    training = by_test["bench_networks", "test_training_step"]
    assert set(training["ms"]) >= {"ours", "ours, graph", "eager", "eager, graph", "copy"}
    assert 0 < training["kept_ratio"] < 1
    two_images = 2 / training["ms"]["ours"] * 1e3
    assert training["images_per_s"]["ours"] == pytest.approx(two_images)


SYNTHETIC = """
import conftest
import pytest
import torch

def fails(_):
    raise RuntimeError("of the baseline")

def nothing(_):
    pass

@pytest.mark.parametrize("case", ["right", "baseline", "ours", "before", "setup", "late", "later"])
def test_it(compare, case):
    if case == "setup":
        raise ValueError("of the\\ncase")
    if case == "before":
        pytest.skip("of its own will")
    ours = fails if case == "ours" else nothing
    others = {"eager": nothing, "compiled": fails if case == "baseline" else nothing}
    compare(ours, others, [0, 1], 3, torch.ones(1000))
    if case == "baseline":
        raise AssertionError("not reached: what failed is said at the end")

@pytest.fixture(autouse=True)
def long_ago(request):
    if request.node.callspec.id == "late":
        conftest.START -= 1e6  # what begins after this one begins too late
"""


def test_errors_and_a_time_limit(tmp_path: Path) -> None:
    file = tmp_path / "bench_synthetic.py"
    file.write_text(SYNTHETIC)
    status, out, rows = bench(tmp_path, "-p", "conftest", "--seconds=1000", str(file))
    assert status == 1
    assert "1 cases were skipped: --seconds=1000" in out
    assert "2 cases ended in an error" in out
    by_case = {row["case"]: row for row in rows}
    assert list(by_case) == ["right", "baseline", "ours", "setup", "late", "later"]
    assert set(by_case["right"]["ms"]) == {"ours", "eager", "compiled", "copy"}
    assert "errors" not in by_case["right"]
    # One baseline is lost, not the others' times.
    assert set(by_case["baseline"]["ms"]) == {"ours", "eager", "copy"}
    assert by_case["baseline"]["errors"] == {"compiled": "RuntimeError: of the baseline"}
    assert by_case["baseline"]["best"] == "eager"
    assert "not reached" not in out
    assert by_case["ours"]["error"] == "RuntimeError: of the baseline"
    assert "ms" not in by_case["ours"]
    assert by_case["setup"]["error"] == "ValueError: of the\ncase"
    assert "\nlate  " in out  # in the table
    assert by_case["later"]["skipped"] == "--seconds=1000 were over"


def test_warming_up_times_nothing(tmp_path: Path) -> None:
    file = tmp_path / "bench_synthetic.py"
    file.write_text(SYNTHETIC)
    status, _, rows = bench(tmp_path, "-p", "conftest", "--warm", str(file), "-k", "right or ours")
    assert status == 1
    assert [(row["case"], "error" in row) for row in rows] == [("ours", True)]


def test_what_is_compiled_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "bench_synthetic.py"
    file.write_text(SYNTHETIC)
    arguments = ("-p", "conftest", "--eager", str(file), "-k", "right or baseline")
    _, _, rows = bench(tmp_path, *arguments)
    assert [set(row["ms"]) for row in rows] == [{"ours", "eager", "copy"}] * 2
    assert not any("errors" in row for row in rows)
