"""Errors inside converted models: the layer's path, and what was passed to it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conversion_cases import bn, cbr, net
from support.conversions import images, prepared
from support.oracles import torchvision
from torch import Tensor, nn

from fastcnn import convert, create_model, revert

X = torch.randn(2, 3, 32, 32)
# What is passed to a network of colour images, the error's type, and what it says of the input.
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "channels": (
        lambda x: x[:, :1].contiguous(), ValueError,
        r"expected 3 channels, got 1: \[2, 1, 32, 32\]$",
    ),
    "channels of a view": (
        lambda x: x.repeat(1, 3, 1, 1)[:, ::2], RuntimeError, r"expected 3 channels, got 5: ",
    ),
    "channels last": (
        lambda x: x.permute(0, 2, 3, 1).contiguous(), ValueError,
        r"expected 3 channels, got 32: \[2, 32, 32, 3\]; x\.permute\(0, 3, 1, 2\) puts",
    ),
    "dtype": (Tensor.double, TypeError, r"expected torch\.float32 .*, got torch\.float64; x\.to"),
    "bytes": (Tensor.byte, RuntimeError, r"expected torch\.float32 as .*, got torch\.uint8; x\.to"),
    "one image": (
        lambda x: x[0], ValueError,
        r"expected 4 dimensions \[n, c, h, w\], got 3: \[3, 32, 32\]; x\[None\] is a batch of one",
    ),
    "device": (
        lambda x: x.to("meta"), ValueError, r"expected device cpu as .*, got meta; x\.to\('cpu'\)$",
    ),
}  # fmt: skip
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (torchvision.models.resnet18, "conv1"),
    "unet": (lambda: revert(create_model("unet", depth=2, width=8)), r"stem\.0"),
}


@pytest.fixture(scope="module", params=["train", "infer"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, mode: Any) -> tuple[nn.Module, str]:
    make, first = NETWORKS[request.param]
    return convert(make(), mode=mode).eval(), first


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_input_is_named_with_its_layer(
    wrong: str, network: tuple[nn.Module, str], grad: bool
) -> None:
    model, first = network
    change, kind, words = WRONG[wrong]
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(kind, match=f"^{first}: input: {words}") as caught,
    ):
        model(change(X))
    assert type(caught.value) is kind
    assert type(caught.value.__cause__) is kind  # which says where


def test_a_part_has_its_path_in_the_whole(mode: Any) -> None:
    model = convert(torchvision.models.resnet18(), mode=mode)
    for part, path in ((model.layer2, r"layer2\.0\.conv1"), (model.layer2[1], r"layer2\.1\.conv1")):
        with pytest.raises((ValueError, RuntimeError), match=f"^{path}: input: .*nels, got 3") as e:
            part(X)
        assert type(e.value) is type(e.value.__cause__)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises((ValueError, RuntimeError), match=r"^layer2\.1\.conv1: input: expected"):
            same.layer2[1](X)


def test_below_a_forward_that_does_not_trace() -> None:
    model = convert(
        nn.Sequential(net(lambda m, x: m.inner(x) if x.sum() < 9e9 else x, inner=cbr()))
    )
    with pytest.raises(ValueError, match=r"^0\.inner\.0: input: expected 4 channels, got 3"):
        model(X)


def test_a_layer_by_itself() -> None:
    with pytest.raises(ValueError, match=r"^BatchNorm2d: input: expected 4 channels, got 3"):
        convert(bn())(X)


@pytest.mark.parametrize("memory", ["full", "default", "low"])
def test_a_later_layer(memory: Any, mode: Any) -> None:
    """A layer whose own tensors do not go with the others'."""
    model = convert(torchvision.models.resnet18(), mode=mode, memory=memory).eval()
    model.layer1[1].conv2.to("meta")
    with pytest.raises(
        ValueError, match=r"^layer1\.1\.conv2: weight: expected device cpu, got meta"
    ):
        model(X)
    model = convert(torchvision.models.resnet18(), mode=mode, memory=memory).eval()
    model.layer2[0].downsample[0].weight = nn.Parameter(torch.randn(128, 32, 1, 1))
    with pytest.raises(
        ValueError, match=r"^layer2\.0\.downsample\.0: input: expected 32 channels .*, got 64"
    ):
        model(X)


def test_layers_of_torch_that_are_not_fused() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(
        RuntimeError, match=r"^2: input: expected 8 features, got \[100\]: \[2, 100"
    ):
        model(images(2, 4, 5, 5).float())
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.AvgPool2d(9)))
    with pytest.raises(RuntimeError, match=r"^1: Given input size: .* Output size is too small"):
        model(images(2, 4, 5, 5).float())


def test_a_skip_of_another_size(mode: Any) -> None:
    model = prepared(net(lambda m, x: m.relu(m.bn(m.conv(_decoded(x))))))
    convert(model, mode=mode)
    with pytest.raises(ValueError, match=r"^conv \.\. relu: concat: expected sizes \[2, any"):
        model(images(2, 2, 5, 4))


def _decoded(x: Tensor) -> Tensor:
    up = nn.functional.interpolate(x, scale_factor=2.0)
    return torch.cat([x.tanh(), up], 1)


class Own(ValueError):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(code, why)


@pytest.mark.parametrize("error", [Own(3, "why"), ValueError("plain"), KeyError("k")])
def test_errors_of_other_people_s_layers_stay_as_they_are(error: Exception) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 9e9:  # so that it does not trace
                raise error
            return x

    model = convert(nn.Sequential(cbr(nn.ReLU()), Raises(), cbr()))
    with pytest.raises(type(error)) as caught:
        model(images(2, 4, 5, 5).float())
    assert caught.value is error
    assert error.__cause__ is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types_that_autocast_brings_together_are_not_blamed(dtype: torch.dtype) -> None:
    model = convert(cbr(nn.ReLU()))
    model[1].weight = nn.Parameter(torch.ones(5))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^0: bn_weight: expected 4 numbers, .* got sizes \[5\]"),
    ):
        model(images(2, 4, 5, 5).to(dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_exported_as_before() -> None:
    x = images(2, 4, 5, 5)
    model = prepared(nn.Sequential(cbr(nn.ReLU()), bn(), nn.Flatten(), nn.Linear(100, 3))).eval()
    expected = convert(model)(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected)
    # Where the compiler gives up, the eager call says it.
    torch._dynamo.reset()
    again = torch.compile(model, backend="eager")
    with pytest.raises((ValueError, RuntimeError), match=r"expected 4 channels.*got 3"):
        again(images(2, 3, 5, 5))
