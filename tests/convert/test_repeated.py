"""What a converted chain does at each call in eager mode: how little, and by which kernels."""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conv2d_folded_cases import operators
from support.conversion_cases import bn, conv
from support.oracles import torchvision
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, report
from fastcnn.ops.conv2d import float32_products, winograd
from fastcnn.ops.conv_bn_act import composite

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bfloat16 be multiplied as it is, as on processors that are fast at it."""
    monkeypatch.setattr(float32_products, "LEAST", {})


def frames(run: Callable[[], Any]) -> int:
    """Return how many calls of Python functions a run makes."""
    count = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def bottleneck(**kwargs: Any) -> nn.Module:
    block: Any = torchvision.models.resnet.Bottleneck(32, 8, **kwargs)
    made: nn.Module = block.to(memory_format=torch.channels_last)
    return made


def image(*sizes: int) -> Tensor:
    return torch.randn(sizes or (2, 32, 4, 4)).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def few_values(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, int]:
    """The rule of composite.py, which the other tests do without."""
    rule = {torch.float32: 1 << 12, torch.bfloat16: 1 << 12}
    monkeypatch.setattr(composite, "MOST_VALUES", rule)
    return rule


# Asked anew at each call, these were 348 frames of a bottleneck's forward, and 213 in inference.
def test_frames_of_training(few_values: dict[torch.dtype, int]) -> None:
    eager, x = bottleneck().train(), image()
    small, fused = convert(copy.deepcopy(eager)), convert(copy.deepcopy(eager), memory="full")
    for model in (eager, small, fused):
        model(x)
    counts = [frames(functools.partial(model, x)) for model in (eager, small, fused)]
    assert counts[1] <= counts[0]  # 49 of 82
    assert counts[2] <= 2 * counts[0]  # 140


BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_frames_of_inference(dtype: torch.dtype) -> None:
    eager, x = bottleneck().eval().to(dtype), image().to(dtype)
    model = convert(copy.deepcopy(eager), mode="infer")
    with torch.no_grad():
        for m in (eager, model):
            m(x)
        assert frames(lambda: model(x)) <= frames(lambda: eager(x))  # 65 of 76
        # One for each convolution; nothing is folded, packed, cast or compared by an operator.
        assert len([n for n in operators(lambda: model(x)) if "detach" not in n]) == 3


def test_operators_of_training() -> None:
    """Of a step the convolution, the batch norm, its statistics; and the batches are counted."""
    model, x = convert(bottleneck().train()), image()
    model(x)
    names = operators(lambda: model(x))
    assert sum("convolution" in name for name in names) == 3
    assert sum("fastcnn" in name for name in names) == 6
    assert len([name for name in names if "detach" not in name]) == 10


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": bottleneck,
    "projection": lambda: bottleneck(
        stride=2, downsample=nn.Sequential(nn.Conv2d(32, 32, 1, 2), nn.BatchNorm2d(32))
    ),
    "pool": lambda: nn.Sequential(conv(32, 4), bn(), nn.ReLU(), nn.MaxPool2d(2), conv(), bn()),
    "silu": lambda: nn.Sequential(conv(32, 4), bn(), nn.SiLU(), conv(), bn(), nn.Hardswish()),
    "no running statistics": lambda: nn.Sequential(
        conv(32, 4), nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.ReLU()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHAINS)
def test_small_feature_maps_are_pytorchs_bit_for_bit(
    name: str, layout: str, dtype: torch.dtype, few_values: dict[torch.dtype, int]
) -> None:
    made: Any = CHAINS[name]()
    expected: Any = made.to(memory_format=LAYOUTS[layout]).train()
    model = convert(copy.deepcopy(expected))
    for _ in range(3):
        x = image().contiguous(memory_format=LAYOUTS[layout])
        found = []
        for m in (expected, model):
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = m(given)
            y.float().square().sum().backward()
            gradients = [p.grad for p in m.parameters()]
            found.append([y, given.grad, *gradients, *m.buffers()])
        assert all(torch.equal(t, other) for t, other in zip(*found, strict=True))


def kernels(model: nn.Module, x: Tensor) -> bool:
    """Whether it runs fastcnn's."""
    return any("fastcnn" in name for name in operators(lambda: model(x)))


def test_the_rule(few_values: dict[torch.dtype, int], capsys: pytest.CaptureFixture[str]) -> None:
    model = convert(bottleneck().train())
    assert not kernels(model, image(32, 32, 2, 2))  # 4096 values of the widest step's output
    report(model, verbose=True)
    assert "up to 4096 values of torch.float32" in capsys.readouterr().out
    assert kernels(model, image(33, 32, 2, 2))
    assert not kernels(model, image(32, 32, 2, 2))
    assert kernels(model, image(32, 32, 2, 2).requires_grad_()) is False
    others: list[dict[str, Any]] = [{"memory": "full"}, {"memory": "low"}, {"backend": "cpu"}]
    for kwargs in others:
        assert kernels(convert(bottleneck().train(), **kwargs), image())
    assert kernels(convert(bottleneck().train().double()), image().double())


def test_convolutions_that_outrun_pytorchs_run_by_kernels(
    few_values: dict[torch.dtype, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_by_kernels(kernel: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> bool:
        conv = nn.Conv2d(8, 8, kernel, 1, kernel // 2, groups=groups)
        model = convert(nn.Sequential(conv, nn.BatchNorm2d(8)).to(memory_format=LAST).train())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return kernels(model, image(2, 8, 4, 4))

    assert [runs_by_kernels(k, 8) for k in (3, 5, 7)] == [False, True, True]  # depthwise
    assert not runs_by_kernels(3)
    assert not runs_by_kernels(3, dtype=torch.bfloat16)
    least = {torch.bfloat16: float32_products.Least(0, 0)}
    monkeypatch.setattr(float32_products, "LEAST", least)
    assert runs_by_kernels(3, dtype=torch.bfloat16)
    assert not runs_by_kernels(1, dtype=torch.bfloat16)
    monkeypatch.setattr(winograd, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(winograd, "_has_kernels", lambda: True)
    assert runs_by_kernels(3)
    assert not runs_by_kernels(1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weight": lambda m: setattr(m.conv1, "weight", nn.Parameter(2 * m.conv1.weight.detach())),
    "no weight": lambda m: setattr(m.bn1, "weight", None),
    "statistics": lambda m: setattr(m.bn2, "running_mean", torch.ones_like(m.bn2.running_mean)),
    "counter": lambda m: setattr(m.bn2, "num_batches_tracked", torch.tensor(5)),
    "momentum": lambda m: setattr(m.bn1, "momentum", 0.5),
    "cumulative": lambda m: setattr(m.bn1, "momentum", None),
    "eps": lambda m: setattr(m.bn3, "eps", 0.5),
    "frozen": lambda m: m.bn1.eval(),
    "loaded": lambda m: m.load_state_dict(
        {k: 1.5 * v.double() for k, v in m.state_dict().items()}, assign=True, strict=False
    ),
    "double": lambda m: m.double(),
    "in place": lambda m: m.conv1.weight.data.mul_(2),
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str, small: bool, few_values: dict[torch.dtype, int]) -> None:
    few_values[torch.float64] = few_values[torch.float32]
    expected, x = bottleneck().train(), image()
    if name != "double":
        expected, x = expected.double(), x.double()
    model = convert(copy.deepcopy(expected), memory="auto" if small else "full")
    model(x), expected(x)
    for m in (model, expected):
        CHANGES[name](m)
    if name == "double":
        model.load_state_dict(expected.state_dict())  # without what float32 has rounded
    for _ in range(2):
        assert_same(model(x.double()), expected(x.double()))
    assert_same(dict(model.named_buffers()), dict(expected.named_buffers()))


def test_other_dtypes_of_the_same_parameters_are_refused_in_the_same_words() -> None:
    model, x = convert(bottleneck().train()), image()
    model(x)
    model.double()  # in place: the Parameter objects stay
    with pytest.raises(TypeError, match="input: expected torch"):
        model(x)
