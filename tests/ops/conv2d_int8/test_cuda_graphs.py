"""conv2d_int8 on CUDA looks at data once, waits for nothing then, and is captured in graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conv2d_int8_cases import PLAIN, assert_same, call, on_device, problem
from support.device import DEVICE, needs_gpu, on_gpu
from support.triton_interpreter import INTERPRETED
from torch import Tensor

from fastcnn import reference
from fastcnn.functional import conv2d_int8, pack_conv2d_int8
from fastcnn.ops.conv2d_int8 import cuda as launches
from fastcnn.ops.conv2d_int8.arguments import Call
from fastcnn.ops.conv2d_int8.value_checks import check_data

pytestmark = pytest.mark.gpu


class NoKernel:
    """In a kernel's place: the interpreter copies tensors, as a launch on a GPU does not."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


REFUSED = ("item", "tolist", "__bool__", "__int__", "__float__", "aminmax", "cpu", "nonzero")


@pytest.fixture
def waits_raise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        for name in ("conv2d_int8_kernel", "depthwise_int8_kernel"):
            monkeypatch.setattr(launches, name, NoKernel())
        for name in REFUSED:
            monkeypatch.setattr(Tensor, name, lambda *args: pytest.fail("waits for the device"))

    return refuse


EMPTY, SUM, COPY = ("aten.empty.memory_format", "aten.sum.dim_IntList", "aten.contiguous.default")


@pytest.mark.parametrize("groups", [1, 16])
def test_the_second_call_waits_for_nothing(groups: int, waits_raise: Callable[[], None]) -> None:
    case = PLAIN._replace(c_out=16, groups=groups)
    given = on_device(problem(case, residual_dtype=torch.int8))
    packed = {**given, "weight": pack_conv2d_int8(given["weight"])}
    number = {**packed, "weight_scale": 0.01}
    floating = {**packed, **problem(case, out_dtype=torch.bfloat16), "weight": packed["weight"]}
    floating = on_device({**floating, "residual": None, "residual_scale": None,
                          "residual_zero_point": None, "out_scale": None,
                          "out_zero_point": None})  # fmt: skip
    nchw = {**packed, "weight": given["weight"].clone(memory_format=torch.contiguous_format)}
    calls = [(packed, [EMPTY]), (number, [EMPTY]), (floating, [EMPTY]), (given, [EMPTY, SUM])]
    calls += [(nchw, [EMPTY, SUM] + [COPY] * (groups == 1))]
    for arguments, _ in calls:
        with on_gpu():
            conv2d_int8(**arguments)
    waits_raise()
    for arguments, kernels in calls:
        for change in ({}, {"x_zero_point": 9}, {"x_scale": 0.0456}):  # known on the host
            with on_gpu() as called:
                conv2d_int8(**{**arguments, **change})
            if INTERPRETED:
                assert called.others == kernels


def test_data_is_looked_at_anew_after_a_change() -> None:
    given = on_device(problem(PLAIN))
    expected = call(**given)
    for name, value, message in (
        ("weight_scale", 0.0, "weight_scale: expected finite numbers above 0, got 0.0"),
        ("bias", float("nan"), "bias: expected finite numbers .*, got nan"),
    ):
        kept = given[name].clone()
        with torch.inference_mode():
            given[name][3] = value
        for _ in range(2):  # refused, not remembered
            with pytest.raises(ValueError, match=message):
                call(**given)
        given[name].copy_(kept)
        assert_same(call(**given), expected)


def test_data_is_looked_at_anew_where_it_is_another() -> None:
    given = on_device(problem(PLAIN))
    call(**given)
    given["weight_scale"].data = torch.zeros(24, device=DEVICE)
    with pytest.raises(ValueError, match="weight_scale: expected finite numbers above 0, got 0"):
        call(**given)


def test_nothing_is_remembered_of_tensors_that_are_gone() -> None:
    given = problem(PLAIN)
    for value in (0.01, 0.0, 0.02, float("inf"), 0.03):  # likely at the same address
        given["weight_scale"] = torch.full((24,), value)
        if 0 < value < 1:
            assert_same(call(**given), reference.conv2d_int8(**given), value)
            continue
        with pytest.raises(ValueError, match="weight_scale: expected finite numbers above 0"):
            call(**given)


def test_a_packed_weight_that_changes() -> None:
    given = problem(PLAIN)
    packed = pack_conv2d_int8(given["weight"].to(DEVICE))
    sums = packed.sums()
    for _ in range(2):
        assert_same(call(**{**given, "weight": packed}), reference.conv2d_int8(**given))
        given["weight"] = given["weight"].flip(0)
        packed.weight.copy_(given["weight"])
    assert packed.sums() is sums  # the memory that a captured graph reads


def test_what_was_not_looked_at_is_refused_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(PLAIN)
    names = ("x", "weight", "weight_scale", "bias", "residual", "x_scale", "x_zero_point")
    names += ("residual_scale", "residual_zero_point", "out_scale", "out_zero_point", "out_dtype")
    arguments = Call(*map(given.get, names), [1, 1], [1, 1], [1, 1], 1, 0)
    packed = pack_conv2d_int8(given["weight"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match=r"^conv2d_int8: weight_scale and bias: .* call once"):
        check_data(arguments)
    packed.sums()
    packed.weight.zero_()
    with pytest.raises(RuntimeError, match=r"^conv2d_int8: weight: .* call once"):
        packed.sums()
    monkeypatch.undo()
    check_data(arguments)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    check_data(arguments)


@needs_gpu
def test_a_captured_graph_gives_the_same_and_reads_new_inputs() -> None:
    given = problem(PLAIN, residual_dtype=torch.uint8, act="relu")
    there = {k: t.cuda() if isinstance(t, Tensor) else t for k, t in given.items()}
    there["weight"] = pack_conv2d_int8(there["weight"])
    with pytest.raises(RuntimeError, match="call once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        conv2d_int8(**{**there, "x": there["x"] ^ 1})  # a graph that is not empty
    conv2d_int8(**there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv2d_int8(**there)
    for seed in range(3):
        given["x"] = problem(PLAIN, seed=seed)["x"]
        there["x"].copy_(given["x"])
        graph.replay()
        assert_same(y.cpu(), reference.conv2d_int8(**given), seed)
