"""linear_act against torch.nn.functional.linear in float64: values, gradients, types, bits."""

from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import linear_act_cases as cases
from support.activations import ACTS
from support.linear_act_cases import HALVES, RULES, SIZES, Types, answer, made, results
from support.tolerance import assert_rounded
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from fastcnn import reference
from fastcnn.functional import linear_act
from fastcnn.nn import LinearAct
from fastcnn.ops.conv2d import float32_products
from fastcnn.ops.conv2d.float32_products import Least
from fastcnn.ops.linear_act.interface import in_float32, outruns_pytorch

DTYPES = [torch.float32, *HALVES, torch.float64]


def check(case: cases.Case) -> None:
    found, expected, errors = results(linear_act, case), cases.exact(case), cases.errors(case)
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert_rounded(name, t, expected[name], errors[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(
    sizes: cases.Sizes, dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(rule, monkeypatch)
    case = made(sizes, dtype, "gelu")
    with Types() as types:
        check(case)
    wide = torch.float32 if rule == "in float32" and dtype in HALVES else dtype
    assert set(types.read) - {torch.float64} == {wide} - {torch.float64}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(
    act: str, dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(rule, monkeypatch)
    for sizes in SIZES[2:4]:
        check(made(sizes, dtype, act, bias=act != "silu"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_weights_beside_half_inputs(
    dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(rule, monkeypatch)
    case = made(SIZES[3], dtype, "silu", param_dtype=torch.float32)
    check(case)
    found = results(linear_act, case)
    assert found["dweight"].dtype is torch.float32
    rounded = torch.equal(found["dweight"], found["dweight"].to(dtype).float())
    assert not rounded or rule == "by PyTorch"


@pytest.mark.parametrize("act", ACTS)
def test_the_reference_agrees(act: str) -> None:
    case = made(SIZES[3], torch.float64, act)
    y = results(reference.linear_act, case)["y"]
    assert_rounded("y", y, cases.exact(case)["y"], cases.errors(case)["y"])


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act: str) -> None:
    # Twice: z is recomputed there, or it would be a constant.
    case = made(SIZES[2]._replace(x=(3, 4), c_out=5), torch.float64, act)
    leaves = [t.requires_grad_() for t in case[:3] if t is not None]
    assert torch.autograd.gradcheck(partial(linear_act, act=act), leaves)
    assert torch.autograd.gradgradcheck(partial(linear_act, act=act), leaves)


@pytest.mark.parametrize("rule", RULES)
def test_each_gradient_alone(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Frozen weights, or an input that needs no gradient: the same bits, and nothing else computed.
    answer(rule, monkeypatch)
    case = made(SIZES[3], torch.bfloat16, "silu")
    whole = results(linear_act, case)
    for i, name in enumerate(("dx", "dweight", "dbias")):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(case[:3])]  # type: ignore[union-attr]
        linear_act(*leaves, act="silu").backward(case.dy)
        assert torch.equal(leaves[i].grad, whole[name])  # type: ignore[arg-type]
        assert [t.grad is None for t in leaves] == [i != j for j in range(3)]


def test_a_gradient_of_other_strides() -> None:
    case = made(SIZES[4], torch.float32)
    x = case.x.detach().requires_grad_()
    linear_act(x, case.weight).sum().backward()  # expanded
    ones = case._replace(dy=torch.ones_like(case.dy))
    assert_rounded("dx", x.grad, cases.exact(ones)["dx"], cases.errors(ones)["dx"])  # type: ignore[arg-type]


def test_pixels_in_channels_last() -> None:
    case = made(SIZES[4], torch.float32, "gelu")
    last = case._replace(x=case.x.to(memory_format=torch.channels_last))
    for name, t in results(linear_act, last).items():
        assert torch.equal(t, results(linear_act, case)[name]), name
        assert t.is_contiguous() or name == "dx"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(rule, monkeypatch)
    case = made(SIZES[3]._replace(x=(0, 9, 24)), dtype, "gelu")
    found = results(linear_act, case)
    assert found["y"].shape == (0, 9, 96)
    assert not found["dweight"].any()
    assert not found["dbias"].any()


@pytest.mark.parametrize("rule", RULES)
def test_autocast(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The input is cast, a float32 weight read as it is: what autocast is not there changes nothing.
    answer(rule, monkeypatch)
    case = made(SIZES[3], torch.float32, "gelu")
    half = case._replace(x=case.x.bfloat16(), dy=case.dy.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = results(linear_act, case)
    assert found["y"].dtype is torch.bfloat16
    assert found["dx"].dtype is torch.float32
    for name, t in results(linear_act, half).items():
        assert torch.equal(found[name], t.to(found[name].dtype)), name


def test_the_rule_counts_what_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, half, wide = torch.empty(6, 8).bfloat16(), torch.empty(8, 8).bfloat16(), torch.empty(8, 8)
    # 384 multiply-adds for 96 values of x and y, and 64 of a weight in a half type.
    for weight, least, more in [(half, 2, 1), (half, 3, 0), (wide, 4, 1), (wide, 5, 0)]:
        for backward in (False, True):
            pair = Least(10**9, least) if backward else Least(least, 10**9)
            monkeypatch.setattr(float32_products, "LEAST", {torch.bfloat16: pair})
            assert in_float32(x, weight, backward) == more
            assert outruns_pytorch(x, weight, "none") == more
            assert not in_float32(x, weight, not backward)
            for kept in (x.float(), x.half(), x.to("meta")):
                assert not in_float32(kept, weight, backward)


def test_float32_is_pytorch_s_without_an_activation() -> None:
    large, small, weight = torch.empty(2**21, 1), torch.empty(8, 1), torch.empty(4, 1)
    assert outruns_pytorch(large, weight, "gelu")
    assert not outruns_pytorch(large, weight, "none")
    assert not outruns_pytorch(small, weight, "gelu")
    assert not outruns_pytorch(large.to("meta"), weight, "gelu")


def test_the_module_is_a_linear_layer() -> None:
    ours, theirs = LinearAct(6, 5, act="relu6"), nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(ours(x), ACTS["relu6"](theirs(x)))
    assert repr(ours) == "LinearAct(in_features=6, out_features=5, bias=True, act=relu6)"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_autocast_is_off_in_a_compiled_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    answer("in float32", monkeypatch)
    tensors = [t.requires_grad_() for t in (torch.randn(33, 17), torch.randn(20, 17))]
    read: list[torch.dtype] = []

    def note(graph: fx.GraphModule, _: Any) -> Any:
        products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
        read.extend(a.meta["val"].dtype for node in products for a in node.all_input_nodes)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(linear_act, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(*tensors, act="gelu")
    y.float().square().sum().backward()
    assert read == [torch.float32] * 6
