"""The model of bytes and flops, against numbers worked out by hand; and a problem's name."""

import pytest
import torch
from support.plan_cases import H200, problem

from fastcnn.plan.problem import Device, Problem, describe
from fastcnn.plan.roofline import PEAKS, Kernel, peaks_of, predicted_seconds

CUDA = torch.device("cuda", 0)


def conv(c: int, c_out: int, size: int, k: int) -> Problem:
    return Problem(
        "conv_bn_act",
        (256, c, size, size),
        (c_out, c, k, k),
        torch.bfloat16,
        CUDA,
        padding=(k // 2, k // 2),
    )


def milliseconds(problem: Problem, kernels: list[Kernel]) -> float:
    return 1e3 * predicted_seconds(PEAKS["sm_90"]["H200"], problem.dtype, kernels)


def test_memory_bound() -> None:
    # ResNet-50's expanding 1x1 convolution, 64 to 256 channels at 56x56, BN, residual, ReLU.
    p = conv(64, 256, 56, 1)
    # x: 256 * 64 * 56 * 56 * 2 bytes = 102.8 MB, y 411.0 MB, weights 32 KB. 2 * 64 flops for each
    # of the 205.5M outputs: 26.3 GFLOP.
    assert p.flops == 26_306_674_688
    x, y = 102_760_448, 411_041_792
    # Fused: reads x and the residual, writes y: 924.8 MB over 4.3 TB/s = 215.1 us; its arithmetic
    # would take 26.3 / 790 = 33.3 us. And 4 us of launch.
    fused = milliseconds(p, [Kernel(x + 2 * y, p.flops)])
    assert fused == pytest.approx(0.2191, abs=1e-4)
    # Two kernels: x and y, then y and the residual read, y written: 513.8 + 1233.1 MB.
    two = milliseconds(p, [Kernel(x + y, p.flops), Kernel(3 * y)])
    assert two == pytest.approx(0.1195 + 0.2868 + 0.008, abs=1e-4)


def test_compute_bound() -> None:
    # 512 channels, 3x3 at 28x28: 256 * 512 * 28 * 28 outputs of 2 * 512 * 9 flops: 947 GFLOP, 1.199
    # ms at 790 TFLOP/s; 205.5 MB each way, 95.6 us. Fusion saves the elementwise kernel, not bytes
    # that anybody would wait for: x and y are free.
    p = conv(512, 512, 28, 3)
    assert p.flops == 947_040_288_768 == 256 * 512 * 28 * 28 * 2 * 512 * 9
    x = y = 205_520_896
    assert milliseconds(p, [Kernel(x + y, p.flops)]) == pytest.approx(1.1988 + 0.004, abs=1e-4)
    two = milliseconds(p, [Kernel(x + y, p.flops), Kernel(2 * y)])
    assert two == pytest.approx(1.1988 + 0.0956 + 0.008, abs=1e-4)
    # int8 at 1979 TOP/s halves more than bytes do: 0.4785 ms; float32 without tf32 takes 14.1.
    int8 = milliseconds(p, [Kernel((x + y) / 2, p.flops, "int8")])
    assert int8 == pytest.approx(0.4785 + 0.004, abs=1e-4)
    assert milliseconds(p, [Kernel(x + y, p.flops, "float32")]) == pytest.approx(14.139, abs=1e-3)


def test_many_launches_cost() -> None:
    # 1 KB each: the launches are all there is.
    assert milliseconds(problem(), [Kernel(1e3)] * 3) == pytest.approx(0.012, rel=1e-2)


def test_an_arithmetic_without_a_rate() -> None:
    with pytest.raises(ValueError, match=r"arithmetic: expected one of int8, .*, got int4"):
        milliseconds(problem(), [Kernel(1.0, 1.0, "int4")])


@pytest.mark.parametrize(
    ("name", "capability", "peaks"),
    [
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA GH200 480GB", "sm_90", "H100"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "A100"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "A100"),
        ("Tesla V100", "sm_70", "A100"),
        ("NVIDIA GeForce RTX 5090", "sm_120", "B200"),
        ("AMD EPYC, 2 threads", "avx512", "CPU"),
    ],
)
def test_whose_numbers_count(name: str, capability: str, peaks: str) -> None:
    found, reason = peaks_of(Device(name, capability, "none"))
    assert found.name == peaks
    # Another GPU's numbers are never taken without saying so.
    own = name.startswith((f"NVIDIA {peaks}", "AMD"))
    assert ("there being none of" in reason) != own


def test_key_names_everything() -> None:
    p = conv(64, 256, 56, 1)._replace(stride=(2, 1), options=("residual", "act=relu"))
    assert p.key(H200) == (
        "conv_bn_act x=256x64x56x56 weight=256x64x1x1 stride=2x1 padding=0x0 dilation=1x1 groups=1 "
        "bfloat16 act=relu residual on NVIDIA H200 sm_90"
    )
    # The order of options is nobody's business.
    assert p._replace(options=("act=relu", "residual")).key(H200) == p.key(H200)
    changes: dict[str, object] = {
        "op": "conv", "x": (1, 64, 56, 56), "weight": (256, 64, 3, 3), "dtype": torch.float16,
        "stride": (1, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2, "options": (),
    }  # fmt: skip
    keys = {p._replace(**{name: value}).key(H200) for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys | {p.key(H200)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("x", (1, 2, 3)), ("weight", (1, 2, 3, -3)), ("stride", (1.0, 1.0)), ("groups", 0),
        ("groups", True), ("padding", (1,)), ("options", ("act relu",)), ("op", ""),
    ],
)  # fmt: skip
def test_key_of_an_invalid_problem(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        problem(**{field: value}).key(H200)


def test_output_size_is_the_convolution_s() -> None:
    p = Problem(
        "conv", (2, 6, 23, 17), (8, 3, 3, 5), torch.float32, torch.device("cpu"),
        stride=(2, 3), padding=(1, 0), dilation=(2, 3), groups=2,
    )  # fmt: skip
    x, weight = torch.randn(p.x), torch.randn(p.weight)
    y = torch.nn.functional.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    assert p.y == y.shape
    assert p.flops == 2 * y.numel() * 3 * 3 * 5


def test_devices() -> None:
    device = describe(torch.device("cpu"))
    assert device.name.endswith(f", {torch.get_num_threads()} threads")
    for wrong in (torch.device("cuda"), torch.device("meta")):
        with pytest.raises(
            ValueError, match=r"device: expected cpu or a CUDA device with its index"
        ):
            describe(wrong)
