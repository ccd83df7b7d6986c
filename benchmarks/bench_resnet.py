"""A training step of whole networks: chains through fastcnn, and the same in plain PyTorch.

ResNet-50 in each memory level beside eager, and beside torch.compile, whose first call compiles for
minutes.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcnn import models
from fastcnn.lab import eager_twin, kept_for_backward


class Network(NamedTuple):
    """What is trained, and beside what."""

    name: str
    batch: int
    size: int
    dtype: torch.dtype | None  # of autocast
    options: dict[str, Any]
    compiled: bool = False


def _resnet50(compiled: bool = False, **options: Any) -> Network:
    return Network("resnet50", 16, 224, torch.bfloat16, options, compiled)


NETWORKS = {
    "resnet20-32px-fp32": Network("resnet20", 128, 32, None, {}),
    "resnet18-224px-fp32": Network("resnet18", 8, 224, None, {}),
    "resnet50-224px-bf16": _resnet50(),
    "resnet50-224px-bf16-low": _resnet50(memory="low"),
    "resnet50-224px-bf16-lowest": _resnet50(memory="lowest"),
    "resnet50-224px-bf16-beside-compiled": _resnet50(compiled=True),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in torch.compile's own code
@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(compare: Any, benchmark: Any, network: str) -> None:
    name, batch, size, dtype, options, compiled = NETWORKS[network]
    torch.manual_seed(0)
    ours = getattr(models, name)(**options).to(memory_format=torch.channels_last)
    eager = eager_twin(ours)
    baseline = torch.compile(eager) if compiled else eager
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def loss(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return F.cross_entropy(model(x).float(), labels)

    def kept(model: nn.Module) -> int:
        weights = [*model.parameters(), *model.buffers()]
        return kept_for_backward(lambda: loss(model), exclude=weights)

    def step(model: Any) -> None:
        model.zero_grad()
        loss(model).backward()

    benchmark.extra_info["activation_memory_ratio"] = kept(ours) / kept(eager)
    compare(lambda _: step(ours), lambda _: step(baseline), [None], 0, x)
