"""The candidates of conv_bn_act's plans: each is right, and who runs untuned.

Candidates run on the CPU here, PyTorch's convolutions in place of cuDNN's and Triton's in its
interpreter, under the planner's own check: the one that decides on a GPU.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.plan_cases import H200, Clock
from support.shapes import RESNET50_CONVS, Conv
from torch import nn

import fastcnn.plan.tune
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act import interface as op_module, problem as conv_bn_act_problem
from fastcnn.ops.conv_bn_act.candidates import FWD
from fastcnn.ops.conv_bn_act.inference_candidates import EVAL
from fastcnn.plan import OPS, Problem
from fastcnn.plan.planner import Planner
from fastcnn.plan.tune import tune
from fastcnn.triton import conv2d_fwd
from fastcnn.triton.tiles import Tile, default_tile

CPU = torch.device("cpu")
CASES = [(FWD, ()), (EVAL, ("out=relu",)), (EVAL, ("out=relu", "residual")), (EVAL, ("out=silu",))]
GEOMETRIES = {
    "1x1": {"weight": (24, 16, 1, 1)},
    "3x3, stride 2": {"weight": (16, 16, 3, 3), "stride": (2, 2), "padding": (1, 1)},
    "depthwise": {"weight": (16, 1, 3, 3), "padding": (1, 1), "groups": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "options"), CASES, ids=str)
def test_every_candidate_is_right(
    op: str, options: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # They are checked here; each round of calls takes the interpreter seconds.
    monkeypatch.setattr(fastcnn.plan.tune, "REPEATS", 1)
    monkeypatch.setattr(fastcnn.plan.tune, "WARMUP", 0)
    for geometry in GEOMETRIES.values():
        problem = Problem(
            op,
            (2, 16, 5, 6),
            dtype=dtype,
            device=CPU,
            options=(*options, "channels_last"),
            **geometry,
        )
        able, _ = OPS[op].supporting(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a refusal warns
            entry = tune(OPS[op], problem, list(able.values()), Clock())
        assert not entry.refused
        expected = set(OPS[op].candidates)
        if "out=silu" in options:
            expected -= {"cudnn_fused"}
        assert entry.names() == expected


@pytest.mark.parametrize("weight", [(24, 16, 1, 1), (24, 16, 3, 3)], ids=str)
def test_a_candidate_is_checked_at_the_tiles_that_it_runs_with(
    weight: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several of them, with ragged edges: 70 pixels, 24 channels.
    monkeypatch.setattr(fastcnn.plan.tune, "REPEATS", 1)
    tiles: list[tuple[int, Tile]] = []

    def noted(pixels: int, *sizes: Any) -> Tile:
        tiles.append((pixels, default_tile(pixels, *sizes)))
        return tiles[-1][1]

    monkeypatch.setattr(conv2d_fwd, "default_tile", noted)
    padding = (weight[2] // 2,) * 2
    problem = Problem(
        FWD, (2, 16, 5, 7), weight, torch.float32, CPU, padding=padding, options=("channels_last",)
    )
    able, _ = OPS[FWD].supporting(problem)
    tune(OPS[FWD], problem, list(able.values()), Clock())
    in_tuning = set(tiles)
    tiles.clear()
    x, w = (
        torch.randn(sizes).contiguous(memory_format=torch.channels_last)
        for sizes in (problem.x, problem.weight)
    )
    conv2d_fused(x, w, ConvGeometry(padding=padding), Epilogue(statistics=True))
    assert in_tuning == set(tiles)
    ((pixels, tile),) = tiles
    assert pixels > tile.m
    assert pixels % tile.m != 0
    assert weight[0] % tile.n != 0


def on_gpu(op: str, conv: Conv, *options: str, **others: object) -> Problem:
    fields: dict[str, object] = {
        "dtype": torch.bfloat16,
        "stride": (conv.stride,) * 2,
        "padding": (conv.kernel // 2,) * 2,
        "options": (*options, "channels_last"),
        "device": torch.device("cuda", 0),
        **others,
    }
    side, kernel = conv.side, conv.kernel
    return Problem(
        op, (256, conv.c_in, side, side), (conv.c_out, conv.c_in, kernel, kernel), **fields
    )


def opt_in(monkeypatch: pytest.MonkeyPatch, kib: int) -> None:
    """A GPU with so much opt-in shared memory."""
    gpu = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    opt_in(monkeypatch, 227)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return Planner("off", OPS, {}, describe=lambda _: H200, busy=lambda _: "here")


def test_untuned_convolutions_are_cudnn_s(h200: Planner) -> None:
    """Whatever the model says of ResNet-50 at batch 256 on a H200; the report shows it."""
    for op, options in ((FWD, ()), (EVAL, ("out=relu",))):
        for conv in RESNET50_CONVS:
            plan = h200.choose(on_gpu(op, conv, *options))
            assert plan[:2] == ("cudnn", "default")
            assert plan.reason.startswith("not measured; at least, by the numbers of H200: cudnn ")


def test_who_cannot_says_why(h200: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = RESNET50_CONVS[1]
    nchw = h200.choose(on_gpu(FWD, conv, options=()))
    assert nchw.name == "cudnn"
    assert nchw.reason.endswith("triton: channels_last only")
    double = h200.choose(on_gpu(FWD, conv, dtype=torch.float64))
    assert double.reason.endswith("float16, bfloat16 and float32 only, not torch.float64")
    silu = h200.choose(on_gpu(EVAL, conv, "out=silu"))
    assert silu.reason.endswith("cudnn_fused: relu only")
    asked = on_gpu(EVAL, conv, "out=relu", "deterministic")
    assert "cudnn_fused: PyTorch's operator does not ask" in h200.choose(asked).reason
    opt_in(monkeypatch, 99)  # sm_86, sm_89 and sm_120: a launch of these tiles would raise
    small = h200.choose(on_gpu(FWD, conv))
    assert small.name == "cudnn"
    assert small.reason.endswith("166912 bytes of opt-in shared memory only, not 101376")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    old = h200.choose(on_gpu(FWD, conv, "deterministic"))
    assert old.reason.endswith("triton: sm_80 and later only")
    monkeypatch.setattr(conv_bn_act_problem.importlib.util, "find_spec", lambda _: None)
    assert h200.choose(on_gpu(EVAL, conv, "out=relu")).reason.endswith("triton is not installed")


def test_the_report_shows_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = Planner("off", OPS, {})
    monkeypatch.setattr(fastcnn.plan, "_planner", lambda: plans)
    monkeypatch.setattr(op_module, "is_planned", lambda x: True)
    step = nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    conv_bn_act(x, [step, step]).sum().backward()
    conv_bn_act(x, [(step[0], step[1].eval())]).sum().backward()  # nothing to fuse: no problem
    rows = fastcnn.report()
    assert [row.problem.split()[0] for row in rows] == [FWD]
    assert "conv_bn_act_fwd x=2x8x4x4 weight=8x8x1x1" in capsys.readouterr().out
