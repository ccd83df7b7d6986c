"""fastcnn.models with each memory level: the results, the bytes promised, the errors in bf16."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chains import LEVELS
from support.resnets import LAYERS, assert_same_network, resnets
from support.roundings import assert_expected_roundings
from torch import Tensor, nn

from fastcnn import convert, models, revert
from fastcnn.lab import eager_baseline, saved_for_backward


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size).to(memory_format=torch.channels_last)


# Groups, dilation and blocks that widen otherwise, too.
WIDE = {"groups": 4, "width_per_group": 8, "replace_stride_with_dilation": [False, True, True]}


@pytest.mark.parametrize("memory", ["low", "lowest"])  # the default: tests/models/test_resnet.py
@pytest.mark.parametrize(
    ("block", "options"), [("BasicBlock", {}), ("Bottleneck", {}), ("Bottleneck", WIDE)]
)
def test_computes_what_torchvision_computes(
    block: str, options: dict[str, Any], memory: str
) -> None:
    ours, theirs = resnets(block, memory, **options)
    x = torch.randn(2, 3, 65, 51, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same_network(ours, theirs, x)
    for model in (ours, theirs):  # and evaluated, with gradients
        model.eval().zero_grad()
    assert_same_network(ours, theirs, x)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes saved for backward."""
    state = [*model.parameters(), *model.buffers()]
    return saved_for_backward(lambda: model(x), exclude=state)


def test_memory_of_a_later_conversion_is_that_of_the_last() -> None:
    # Bytes, since results are the same: a level that stays in one stage would show nowhere else.
    model = models.ResNet(models.Bottleneck, LAYERS)
    x, found = images(1, 64), {}
    for memory in (*LEVELS, "default"):
        fresh = revert(copy.deepcopy(model))
        found[memory] = kept(convert(model, memory=memory), x)
        assert found[memory] == kept(convert(fresh, memory=memory), x)
    assert found["lowest"] < found["low"] < found["default"]


def kept_at_batch_16(model: nn.Module) -> int:
    """At 224x224, from smaller ones: every tensor that is kept has the batch as its first size, and
    then pixels, in sizes that are parts of the image's, or none (features, logits); or neither
    (statistics, weights in bfloat16). So the bytes are a + n * (b + c * pixels)."""
    model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        two, three, larger = (kept(model, images(*of)) for of in ((2, 32), (3, 32), (2, 64)))
    c, left = divmod(larger - two, 2 * (64**2 - 32**2))
    assert left == 0
    each = three - two
    return two - 2 * each + 16 * (each + c * (224**2 - 32**2))


def test_bytes_kept_by_resnet50() -> None:
    # Compared with eager PyTorch with ReLU in place, as torchvision has it: batch 16, bfloat16,
    # autocast, channels_last, 224x224.
    eager = kept_at_batch_16(eager_baseline(models.resnet50()))
    for memory, limit in (("default", 0.83), ("low", 0.65), ("lowest", 0.5)):
        ratio = kept_at_batch_16(models.resnet50(memory=memory)) / eager
        assert ratio <= limit, f"{memory}: {ratio:.3f}"


@pytest.mark.slow
def test_bf16_gradients_are_of_expected_roundings() -> None:
    # Bottlenecks with silu: a rounding decides on relu's gradients, and on a max pool's.
    model = models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.ReLU | nn.MaxPool2d):
            smooth = nn.SiLU() if isinstance(module, nn.ReLU) else nn.AvgPool2d(2)
            setattr(model.get_submodule(parent), leaf, smooth)
    model.to(memory_format=torch.channels_last)
    x, target = images(8, 32), torch.arange(8)

    def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        network = copy.deepcopy(network)
        with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
            logits = network(x)
        F.cross_entropy(logits.double(), target).backward()
        return {name: p.grad for name, p in network.named_parameters()}

    exact = copy.deepcopy(model).double()
    found = {memory: gradients(convert(model, memory=memory), x) for memory in LEVELS}
    assert_expected_roundings(
        found["default"], lambda: gradients(exact, x.double()), torch.bfloat16, torch.float32, True
    )
    for memory in LEVELS:
        for name, want in found["default"].items():
            assert torch.equal(found[memory][name], want), f"{memory}: {name}"
