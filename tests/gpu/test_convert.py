"""Networks that convert has changed, on the GPU: values, memory, and the way there and back."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from support.chains import expected_bytes, stage, state
from support.conversions import assert_inferred
from support.device import DEVICE, HAS_GPU, needs_gpu
from support.gpu_plans import planned_by, wherever_it_can
from support.oracles import timm, torchvision
from support.seeds import seed_all
from torch import nn

import fastcnn
from fastcnn import convert, models, revert, verify
from fastcnn.lab import saved_for_backward

pytestmark = pytest.mark.gpu

LAST = torch.channels_last
# How convolutions of float32 round what they read: to TF32, perhaps, which has float16's precision.
ON_DEVICE = torch.float16 if HAS_GPU else torch.float32


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    plan: str  # of its convolutions: Triton's take a second each to compile, the first time
    dtype: torch.dtype  # of autocast, float32 for none
    mode: str = "train"
    training: bool = True


def _four_bottlenecks() -> nn.Module:
    """Each of ResNet-50's stages by its first block: all its kernels, a quarter of its layers."""
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


def _unet(**options: Any) -> nn.Module:
    return models.UNet(num_classes=2, depth=2, width=16, **options)


ON_CPU_TOO = {
    "UNet": Case(partial(_unet, dropout=0.1), "cudnn", torch.float32),
    "UNet of instance norms, nearest": Case(
        partial(_unet, norm="instance", up="nearest", act="gelu"), "cudnn", torch.bfloat16
    ),
    "UNet, inference": Case(_unet, "cudnn", torch.float32, "infer", False),
}
CASES = ON_CPU_TOO | {
    "resnet50": Case(partial(torchvision.models.resnet50, num_classes=10), "cudnn", torch.float32),
    "bottlenecks by Triton": Case(_four_bottlenecks, "triton", torch.bfloat16),
    "bottlenecks, inference by Triton": Case(
        _four_bottlenecks, "triton", torch.float16, "infer", False
    ),
    "resnet50, inference": Case(
        partial(torchvision.models.resnet50, num_classes=10),
        "cudnn",
        torch.bfloat16,
        "infer",
        False,
    ),
    "mobilenet_v2": Case(torchvision.models.mobilenet_v2, "cudnn", torch.float32),
    "efficientnet_lite0": Case(
        lambda: timm.create_model("efficientnet_lite0"), "cudnn", torch.bfloat16
    ),
    "resnetv2_50x1_bit": Case(
        lambda: timm.create_model("resnetv2_50x1_bit"), "cudnn", torch.float32
    ),
    "unet_resnet18": Case(
        lambda: fastcnn.create_model("unet_resnet18", num_classes=2), "cudnn", torch.float32
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ON_CPU_TOO else needs_gpu) for n in CASES]
)
def test_a_network_is_what_it_was(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # verify runs it beside itself unconverted and beside float64, forward and backward, and looks
    # at each fused call: its table says where the first difference arises.
    case = CASES[name]
    seed_all(0)
    model = convert(case.make(), mode=case.mode).train(case.training)
    model = model.to(DEVICE, memory_format=LAST)
    x = torch.randn(4, 3, 33, 47).to(DEVICE, memory_format=LAST)
    autocast = torch.autocast(DEVICE.type, case.dtype, enabled=case.dtype is not torch.float32)
    with planned_by(partial(wherever_it_can, case.plan)), autocast:
        found = verify(model, x)
    assert found.ok, capsys.readouterr().out
    assert len(found.rows) > 10


@pytest.mark.parametrize("memory", ["default", "low", "lowest"])
@pytest.mark.parametrize(
    "plan", ["cudnn", pytest.param("triton", marks=needs_gpu), "as PyTorch runs it"]
)
def test_bytes_saved_for_backward(plan: str, memory: str) -> None:
    # By the formula that holds on the CPU: what plans and cuDNN need beside is freed by then.
    names = ("projection", "identity", "two steps")
    model = stage(*names, memory=memory).to(DEVICE, memory_format=LAST)
    x = torch.randn(2, 4, 9, 8).to(DEVICE, memory_format=LAST)
    if plan == "as PyTorch runs it":  # unplanned on the CPU, cuDNN's in another layout on a GPU
        model, x = model.to(memory_format=torch.contiguous_format), x.contiguous()
        kept = saved_for_backward(lambda: model(x), exclude=state(model))
    else:
        with planned_by(partial(wherever_it_can, plan)):
            kept = saved_for_backward(lambda: model(x), exclude=state(model))
    assert kept == expected_bytes(copy.deepcopy(model).cpu(), x.cpu())


def test_to_the_gpu_and_back() -> None:
    # Nothing of the GPU stays with the model: on the CPU again, it computes the bits of before.
    for mode in ("train", "infer"):
        model, x = _unet().eval(), torch.randn(2, 3, 16, 16)
        exact = copy.deepcopy(revert(model)).double()
        convert(model, mode=mode)
        with torch.no_grad():
            before = model(x)
            on_gpu = model.to(DEVICE)(x.to(DEVICE))
            assert on_gpu.is_cuda == HAS_GPU
            assert torch.equal(model.to("cpu")(x), before)
        for y, dtype in ((before, torch.float32), (on_gpu, ON_DEVICE)):
            assert_inferred(y, exact, x, dtype)


def test_a_changed_model_says_so_on_the_gpu_too() -> None:
    # A hook inside of what was fused: a warning, then its layers one by one.
    model, x = _unet().eval(), torch.randn(2, 3, 16, 16)
    exact = copy.deepcopy(revert(model)).double()
    convert(model).to(DEVICE)
    assert_inferred(model(x.to(DEVICE)), exact, x, ON_DEVICE)
    calls = []
    model.stem[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        found = model(x.to(DEVICE))
    assert calls == [1]
    assert_inferred(found, exact, x, ON_DEVICE)
