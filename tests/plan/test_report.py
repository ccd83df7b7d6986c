"""fastcnn.report(): what people read."""

import pytest
import torch
from support.plan_cases import H200

import fastcnn
from fastcnn.plan import Problem, Row
from fastcnn.plan.table import table

CUDA = torch.device("cuda", 0)

LONG = """
problem                                                                  plan         source      ms
on NVIDIA H200 sm_90
conv_bn_act x=256x64x56x56 weight=256x64x1x1 stride=2x2 padding=1x1      cudnn_fused  tuned    0.219
  bfloat16 act=leaky_relu channels_last residual
    cudnn 0.41 ms, cudnn_fused 0.219 ms; triton: expected channels_last, got x in NCHW order
conv_bn_act x=256x64x56x56 weight=256x64x1x1 bfloat16                    cudnn_fused  default      -
    cudnn 0.41 ms
"""


def row(problem: Problem, **others: object) -> Row:
    fields: dict[str, object] = {
        "plan": "cudnn_fused",
        "source": "tuned",
        "reason": "cudnn 0.41 ms",
        "milliseconds": 0.219,
        **others,
    }
    return Row(problem.key(H200), **fields)  # type: ignore[arg-type]


def test_a_report_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    fastcnn.plan._planner.cache_clear()
    assert fastcnn.report() == []
    expected = "nothing was planned: no op with several candidates has run\n"
    assert capsys.readouterr().out == expected


def test_long_lines_are_wrapped() -> None:
    # As CUDA's convolutions name themselves: all options, and why others did not run.
    short = Problem("conv_bn_act", (256, 64, 56, 56), (256, 64, 1, 1), torch.bfloat16, CUDA)
    long = short._replace(
        stride=(2, 2), padding=(1, 1), options=("act=leaky_relu", "channels_last", "residual")
    )
    why = "cudnn 0.41 ms, cudnn_fused 0.219 ms; triton: expected channels_last, got x in NCHW order"
    rows = [row(long, reason=why), row(short, source="default", milliseconds=None)]
    assert table(rows) == LONG.strip()
    # Nothing is lost, however long, and no line is longer than a terminal.
    lines = table([row(long, reason=f"{why}; triton refused: {'#' * 150}; {why}")]).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).count("NCHW order") == 2
    assert "".join(lines).count("#") == 150


def test_devices_have_parts_of_their_own() -> None:
    problem = Problem("conv_bn_act", (1, 8, 4, 4), (8, 8, 1, 1), torch.float32, CUDA)
    other = Row(problem.key(H200._replace(name="NVIDIA A100")), "cudnn", "default", "", None)
    text = table([row(problem), other, row(problem._replace(groups=8, weight=(8, 1, 3, 3)))])
    assert [line for line in text.splitlines() if line.startswith("on ")] == [
        "on NVIDIA A100 sm_90",
        "on NVIDIA H200 sm_90",
    ]
    assert "groups=8" in text  # what is not the default is said
