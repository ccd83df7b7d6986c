"""Squeeze-and-excitation in foreign forwards: found by the graph, not by the names of classes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import Forward
from support.conversions import assert_converts, assert_infers, images, patterns, reasons
from support.oracles import torchvision
from torch import Tensor, nn

import fastcnn
from fastcnn import convert
from fastcnn.convert.codegen import fit

SqueezeExcitation = torchvision.ops.misc.SqueezeExcitation


def squeeze(run: Callable[..., Any], **more: nn.Module) -> Forward:
    fcs = {"fc1": nn.Conv2d(6, 3, 1), "fc2": nn.Conv2d(3, 6, 1), "pool": nn.AdaptiveAvgPool2d(1)}
    rest = {"act": nn.SiLU(), "gate": nn.Sigmoid(), "hard": nn.Hardsigmoid()}
    return Forward(run, **{**fcs, **rest, **more})


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


# A model, and what is one call of it.
CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "torchvision": (
        lambda: nn.Sequential(SqueezeExcitation(6, 3)),
        ["squeeze_excite-relu-sigmoid"],
    ),
    "torchvision, as in MobileNetV3": (
        lambda: nn.Sequential(SqueezeExcitation(6, 3, scale_activation=nn.Hardsigmoid)),
        ["squeeze_excite-relu-hardsigmoid"],
    ),
    "mean, the image first": (
        lambda: squeeze(lambda m, x: x * m.gate(m.fc2(m.act(m.fc1(mean(x)))))),
        ["squeeze_excite-silu-sigmoid"],
    ),
    "functions": (
        lambda: squeeze(
            lambda m, x: torch.mul(
                x, F.hardsigmoid(m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(x, (1, 1))))))
            )
        ),
        ["squeeze_excite-relu-hardsigmoid"],
    ),
    "methods": (
        lambda: squeeze(
            lambda m, x: x.mul(m.fc2(m.fc1(torch.mean(x, [-2, -1], True)).relu()).sigmoid())
        ),
        ["squeeze_excite-relu-sigmoid"],
    ),
    "an identity, and no bias": (
        lambda: squeeze(
            lambda m, x: x * m.gate(m.fc2(m.act(m.bn(m.fc1(m.pool(x)))))),
            bn=nn.Identity(),
            fc1=nn.Conv2d(6, 3, 1, bias=False),
        ),
        ["squeeze_excite-silu-sigmoid"],
    ),
    "no activation": (
        lambda: squeeze(lambda m, x: x * m.gate(m.fc2(m.fc1(m.pool(x))))),
        ["squeeze_excite-sigmoid"],
    ),
    "one product": (
        lambda: squeeze(lambda m, x: x * m.hard(m.fc1(mean(x))), fc1=nn.Conv2d(6, 6, 1)),
        ["squeeze_excite-hardsigmoid"],
    ),
    "behind a chain, and before one": (
        lambda: nn.Sequential(
            nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), SqueezeExcitation(6, 3),
            nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4),
        ),
        ["conv-bn-silu", "squeeze_excite-relu-sigmoid", "conv-bn"],
    ),
}  # fmt: skip

# What PyTorch computes by the same nodes, and is something else.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "the gate has another use": lambda: squeeze(
        lambda m, x: (lambda g: x * g + g)(m.gate(m.fc2(m.act(m.fc1(mean(x))))))
    ),
    "the mean of another image": lambda: squeeze(
        lambda m, x: x * m.gate(m.fc2(m.act(m.fc1(mean(x + 1)))))
    ),
    "the mean has another use": lambda: squeeze(
        lambda m, x: (lambda s: x * m.gate(m.fc2(m.act(m.fc1(s)))) + s)(mean(x))
    ),
    "a gate of one channel": lambda: squeeze(
        lambda m, x: x * m.gate(m.fc2(m.act(m.fc1(mean(x))))), fc2=nn.Conv2d(3, 1, 1)
    ),
    "padding": lambda: squeeze(
        lambda m, x: x * m.gate(m.fc2(m.fc1(mean(x)))), fc1=nn.Conv2d(6, 3, 3, padding=1)
    ),
    "groups": lambda: squeeze(
        lambda m, x: x * m.gate(m.fc2(m.fc1(mean(x)))), fc1=nn.Conv2d(6, 3, 1, groups=3)
    ),
    "pooled to two": lambda: squeeze(
        lambda m, x: x[..., :2, :2] * m.gate(m.fc2(m.fc1(m.pool(x)))),
        pool=nn.AdaptiveAvgPool2d(2),
    ),
    "another gate": lambda: squeeze(lambda m, x: x * m.fc2(m.act(m.fc1(mean(x)))).tanh()),
    "a sum": lambda: squeeze(lambda m, x: x + m.gate(m.fc2(m.act(m.fc1(mean(x)))))),
    "the mean of a row": lambda: squeeze(
        lambda m, x: x * m.gate(m.fc2(m.act(m.fc1(x.mean((3,), keepdim=True)))))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_found(name: str) -> None:
    make, expected = CASES[name]
    assert assert_converts(make(), images(2, 6, 7, 5)) == expected


@pytest.mark.filterwarnings("ignore:fastcnn.convert. nothing in")
@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    assert_converts(model := OTHERS[name](), images(2, 6, 7, 5))
    assert not [words for words in patterns(model) if "squeeze" in words]


@pytest.mark.parametrize("name", ["torchvision", "no activation", "behind a chain, and before one"])
def test_inference(name: str) -> None:
    found = assert_infers(CASES[name][0](), images(2, 6, 7, 5))
    assert [words for words in found if "squeeze" in words] == [
        words for words in CASES[name][1] if "squeeze" in words
    ]


@pytest.mark.parametrize("name", ["torchvision", "methods"])  # pooled, a mean over (-2, -1)
def test_an_image_without_a_batch_runs_as_written(name: str) -> None:
    model = CASES[name][0]()
    x = torch.randn(6, 5, 4)
    expected = model(x)
    assert torch.equal(convert(model)(x), expected)
    fc2 = next(module for path, module in model.named_modules() if path.endswith("fc2"))
    assert fit.notes[fc2] == "its input has 3 dimensions, the kernels take 4"


def test_a_mean_of_dims_that_an_image_lacks_is_pytorch_s_error() -> None:
    model = convert(CASES["mean, the image first"][0]())
    with pytest.raises(IndexError, match="Dimension out of range"):
        model(torch.randn(6, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_under_autocast_types_are_pytorch_s(dtype: torch.dtype) -> None:
    model = nn.Sequential(SqueezeExcitation(6, 3))
    x = torch.randn(2, 6, 5, 4).to(dtype)
    if dtype is torch.float64:
        model.double()
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = convert(model)(x), plain(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_types_that_do_not_go_together_are_pytorch_s_errors() -> None:
    model = nn.Sequential(SqueezeExcitation(6, 3))
    x = torch.randn(2, 6, 5, 4).bfloat16()
    convert(model)
    with pytest.raises(RuntimeError):
        model(x)


def test_a_hook_on_a_convolution_runs() -> None:
    model = nn.Sequential(SqueezeExcitation(6, 3))
    convert(model)
    x, seen = torch.randn(2, 6, 5, 4), []
    model(x)
    handle = model[0].fc1.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has hooks now"):
        model(x)
    handle.remove()
    assert seen == [1]


def test_the_pool_may_change() -> None:
    model = nn.Sequential(SqueezeExcitation(6, 3))
    plain = copy.deepcopy(model)
    convert(model)
    x = torch.randn(2, 6, 4, 4)
    model(x)
    for one in (model, plain):
        one[0].avgpool.output_size = (4, 4)
    with pytest.warns(UserWarning, match=r"AdaptiveAvgPool2d\.output_size was 1"):
        assert torch.equal(model(x), plain(x))


def test_report_names_the_op(capsys: pytest.CaptureFixture[str]) -> None:
    fastcnn.report(convert(nn.Sequential(SqueezeExcitation(6, 3))))
    assert "squeeze_excite-relu-sigmoid" in capsys.readouterr().out


def test_verify() -> None:
    make = CASES["behind a chain, and before one"][0]
    assert fastcnn.verify(convert(make()), torch.randn(2, 6, 7, 5)).ok


def test_reasons_are_not_given_for_what_is_fused() -> None:
    model = convert(CASES["behind a chain, and before one"][0](), mode="infer")
    model.eval()
    model(torch.randn(2, 6, 7, 5))
    assert reasons(model) == []
