"""fastcnn.models with each memory level: the results, the bytes promised, the errors in bf16."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from chains import randomize
from oracles import torchvision_resnet
from test_models import assert_same_network
from torch import Tensor, nn

from fastcnn import convert, models
from fastcnn.lab import eager_twin, kept_for_backward

LEVELS = ["default", "low", "lowest"]


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", ["low", "lowest"])  # the default: tests/test_models.py
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_computes_what_torchvision_computes(name: str, memory: str) -> None:
    theirs = getattr(torchvision_resnet, name)(num_classes=10).double()
    randomize(theirs)
    ours = getattr(models, name)(num_classes=10, memory=memory).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 51, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same_network(ours, theirs, x)
    for model in (ours, theirs):  # and evaluated, with gradients
        model.eval().zero_grad()
    assert_same_network(ours, theirs, x)


def test_wide_networks_have_the_levels_too() -> None:
    # Groups, dilation and blocks that widen otherwise.
    options = {
        "groups": 4, "width_per_group": 8, "num_classes": 10,
        "replace_stride_with_dilation": [False, True, True],
    }  # fmt: skip
    theirs = torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 2, 1, 1], **options)
    randomize(theirs.double())
    x = torch.randn(2, 3, 65, 51, dtype=torch.float64)
    for memory in LEVELS:
        ours = models.ResNet(models.Bottleneck, [1, 2, 1, 1], **options).double()
        convert(ours, memory=memory)
        ours.load_state_dict(theirs.state_dict())
        assert_same_network(ours, copy.deepcopy(theirs), x)


def test_memory_of_a_later_conversion_is_that_of_the_last() -> None:
    # Bytes, since results are the same: a level that stays in one stage would show nowhere else.
    def kept(model: nn.Module) -> int:
        x, state = images(1, 64), [*model.parameters(), *model.buffers()]
        return kept_for_backward(lambda: model(x), exclude=state)

    model, found = models.resnet50(num_classes=10), {}
    for memory in (*LEVELS, "default"):
        found[memory] = kept(convert(model, memory=memory))
        assert found[memory] == kept(models.resnet50(num_classes=10, memory=memory))
    assert found["lowest"] < found["low"] < found["default"]


def kept_at_batch_16(build: Callable[[], nn.Module]) -> int:
    """From batches of 1 and 2: every tensor that is kept either has the batch as its first size, or
    none of it (statistics, weights in bfloat16), so that the bytes are a + b * batch."""
    model = build().to(memory_format=torch.channels_last)
    state = [*model.parameters(), *model.buffers()]
    kept = []
    for n in (1, 2):
        x = images(n, 224)
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(kept_for_backward(lambda x=x: model(x), exclude=state))
    one, two = kept
    return one + 15 * (two - one)


def test_bytes_kept_by_resnet50() -> None:
    # Beside eager PyTorch with ReLU in place, as torchvision has it: batch 16, bfloat16 autocast,
    # channels_last, 224x224.
    eager = kept_at_batch_16(lambda: eager_twin(models.resnet50()))
    for memory, limit in (("default", 0.83), ("low", 0.65), ("lowest", 0.5)):
        ratio = kept_at_batch_16(lambda m=memory: models.resnet50(memory=m)) / eager
        assert ratio <= limit, f"{memory}: {ratio:.3f}"


def test_bf16_gradients_of_resnet50_are_as_exact_as_pytorchs() -> None:
    # Against float64 of the same weights, per parameter by the norm of the error. As initialised, a
    # network of this depth amplifies bfloat16's roundings to more than the gradients themselves
    # (eager's error is 1.3 of them), which is no yardstick. Residual branches that begin small, as
    # with zero_init_residual, keep it meaningful: that it is so is asserted too.
    model = models.resnet50(num_classes=10).to(memory_format=torch.channels_last)
    for name, p in model.named_parameters():
        if name.endswith("bn3.weight"):
            p.data.fill_(0.2)
    x, target = images(8, 64), torch.arange(8)

    def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
        network = copy.deepcopy(network)
        with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
            logits = network(x)
        F.cross_entropy(logits.double(), target).backward()
        return {name: p.grad.double() for name, p in network.named_parameters()}

    twin = eager_twin(model)
    exact, eager = gradients(twin.double(), x.double()), gradients(eager_twin(model), x)
    found = {}
    for memory in LEVELS:
        found[memory] = gradients(convert(model, memory=memory), x)
    for name, g in exact.items():
        limit = (eager[name] - g).norm() / g.norm()
        error = (found["default"][name] - g).norm() / g.norm()
        assert limit < 0.5, f"{name}: eager's error is {limit:.2f}"
        assert error <= 2 * limit, f"{name}: error {error:.3f}, eager's {limit:.3f}"
        for memory in LEVELS[1:]:
            assert torch.equal(found[memory][name], found["default"][name]), f"{memory}: {name}"
