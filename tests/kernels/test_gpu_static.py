"""What the compiled GPU code says about its speed, and that it says nothing worse than before."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_static import known, networks
from gpu_static.kernels import Row, row_of
from gpu_static.sass import functions
from support.paths import ROOT

from fastcnn import _C

# A loop of four 16-byte loads and stores; the same, each load waited for; a slow way in it; more
# values than there are registers.
PLANTED = """
__device__ float4 half_of(float4 v) { v.x *= .5f; v.y *= .5f; v.z *= .5f; v.w *= .5f; return v; }

template <class T, int kVector>
__global__ void __launch_bounds__(256) dropout_together_kernel(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 1024) {
    float4 words[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) words[u] = x[i + 256 * u];
#pragma unroll
    for (int u = 0; u < 4; ++u) __stcg(y + i + 256 * u, half_of(words[u]));
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(256) dropout_waiting_kernel(const float4* x, volatile float* y,
                                                              int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 word = __ldcg(x + i);
    *y = word.x + word.y + word.z + word.w;
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(256) dropout_branch_kernel(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    float4 word = x[i];
    if (n % 3 == 0) {
#pragma unroll
      for (int k = 0; k < 200; ++k) word.x = word.x * word.y + word.z;
    }
    __stcg(y + i, word);
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(1024) dropout_spilling_kernel(const float* x, float* y, int n) {
  float values[128];
#pragma unroll
  for (int k = 0; k < 128; ++k) values[k] = x[k * n];
#pragma unroll
  for (int k = 0; k < 128; ++k) y[k * n] = values[k] + values[127 - k] * values[(k + 64) % 128];
}

template __global__ void dropout_together_kernel<float, 4>(const float4*, float4*, int);
template __global__ void dropout_waiting_kernel<float, 4>(const float4*, volatile float*, int);
template __global__ void dropout_branch_kernel<float, 4>(const float4*, float4*, int);
template __global__ void dropout_spilling_kernel<float, 1>(const float*, float*, int);
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("planted")
    source, cubin = folder / "planted.cu", folder / "planted.cubin"
    source.write_text(PLANTED)
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", source, "-o", cubin], check=True)
    return {f.kernel.split("_")[1]: row_of(f) for f in functions(cubin)}


def test_a_hot_loop_is_found(planted: dict[str, Row]) -> None:
    row = planted["together"]
    (trip,) = row.trips
    assert (trip.loaded, trip.moved, trip.in_flight) == (64, 128, 64)
    assert (row.wide, row.narrow, row.function.spilled) == (8, 0, 0)
    # 16 multiplications, 8 accesses, and a few for the loop and its addresses.
    assert 26 <= trip.issued <= 45
    threads = min(65536 // (-(-row.function.registers // 8) * 8 * 256), 8) * 256
    assert row.in_flight == 64 * threads
    assert not row.misses()


def test_a_load_that_is_waited_for_is_alone(planted: dict[str, Row]) -> None:
    row = planted["waiting"]
    assert row.in_flight // row.blocks // 256 == 16
    assert row.narrow == 1  # the store


def test_the_slowest_way_counts(planted: dict[str, Row]) -> None:
    (trip,) = planted["branch"].trips
    assert trip.issued > 200
    # 4.3 TB/s / (132 SMs x 7.4e9 instructions/s) are 4.402 bytes in the time of one.
    assert planted["branch"].misses()["issue %"] == round(100 * trip.issued / 1024 * 4.402)


def test_spills_are_found(planted: dict[str, Row]) -> None:
    assert planted["spilling"].misses()["spilled bytes"] > 0


def test_a_better_and_a_worse_figure_are_told(
    planted: dict[str, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "FILE", tmp_path / "known.json")
    rows = [planted["branch"]]
    misses = known.found_misses(rows)
    for factor, expected in ((1, (0, 0)), (0.9, (1, 0)), (1.1, (0, 1))):
        then = {name: {**f, "issue %": f["issue %"] * factor} for name, f in misses.items()}
        known.FILE.write_text(json.dumps({"misses": then}))
        worse, better = known.differences(rows)
        assert (len(worse), len(better)) == expected


def check(worse: list[str], better: list[str]) -> None:
    assert not worse, "of what docs/gpu-static.md asks"
    assert not better, "run make sass ACCEPT=1"


def of_these_compilers() -> None:
    made_by = json.loads(known.FILE.read_text())["compiler"]
    if made_by != known.compiler():
        pytest.skip(f"the list is of {made_by}, this is {known.compiler()}")


@pytest.mark.slow
@pytest.mark.skipif(
    re.search(r"\b90(-real)?\b", _C.cuda_archs) is None, reason="built without code for sm_90"
)
def test_no_cuda_kernel_misses_more_than_known() -> None:
    of_these_compilers()
    rows = [row_of(f) for f in functions(Path(_C.__file__).with_name("_ops.so"))]
    check(*known.differences(rows))
    written = (ROOT / "docs" / "gpu-static.md").read_text()
    missing = [row.name for row in rows if f"`{row.name}`" not in written]
    assert not missing, "run make sass"


BY_TRITON = """
import json
from gpu_static import known, matrix
print(json.dumps(known.differences(matrix.rows())))
"""


@pytest.mark.slow
def test_no_triton_kernel_misses_more_than_known(tmp_path: Path) -> None:
    of_these_compilers()
    # In a process of its own: with the compiler, not the interpreter.
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": f"{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", BY_TRITON],
        env={**os.environ, **env, "PYTHONPATH": f"{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(*json.loads(done.stdout))


def test_a_network_s_step_is_the_sum_of_its_operations() -> None:
    # By hand: 2 images of 8 channels and 4 x 4, at half of the copy in the norm's passes.
    block = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    )
    found = list(networks.parts(block, (2, 3, 4, 4), lambda _: 0.5))
    image, y, weight = 2 * 3 * 16, 2 * 8 * 16, 8 * 3 * 9
    convolution = 2 * (image + y + weight) / (networks.CUDNN_MEMORY * networks.COPY)
    norm = 2 * y / (0.5 * networks.COPY)
    expected = [convolution] * 2 + [norm, 2 * norm, 2 * norm, 3 * norm]  # no gradient of the image
    assert [part.seconds for part in found] == pytest.approx(expected, rel=1e-9, abs=0)
    step = networks.Step("block", 2, found)
    assert step.seconds == pytest.approx(2 * convolution + 8 * norm, rel=1e-9, abs=0)
    assert step.share_of("memory") == 1.0
    assert [kind for kind, _ in step.by_kind()] == ["batch norm and activation", "convolution"]


def test_large_products_are_bound_by_tensor_cores() -> None:
    conv = torch.nn.Conv2d(512, 512, 3, padding=1, bias=False)
    sizes = torch.Size((64, 512, 28, 28))
    flops = 2 * sizes.numel() * 512 * 9
    for part in networks.convolution(conv, sizes, sizes, first=False):
        assert part.bound == "tensor cores"
        assert part.seconds == pytest.approx(flops / networks.TENSOR_CORES, rel=1e-9, abs=0)
