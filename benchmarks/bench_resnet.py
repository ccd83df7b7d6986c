"""A training step of whole networks: chains through fastcnn, and the same in plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcnn import models
from fastcnn.lab import eager_twin, kept_for_backward

# name: builder, batch, image size, autocast dtype
NETWORKS: dict[str, tuple[str, int, int, torch.dtype | None]] = {
    "resnet20-32px-fp32": ("resnet20", 128, 32, None),
    "resnet18-224px-fp32": ("resnet18", 8, 224, None),
    "resnet50-224px-bf16": ("resnet50", 16, 224, torch.bfloat16),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(compare: Any, benchmark: Any, network: str) -> None:
    name, batch, size, dtype = NETWORKS[network]
    torch.manual_seed(0)
    ours = getattr(models, name)().to(memory_format=torch.channels_last)
    eager = eager_twin(ours)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return F.cross_entropy(model(x).float(), labels)

    def kept(model: nn.Module) -> int:
        weights = [*model.parameters(), *model.buffers()]
        return kept_for_backward(lambda: loss(model), exclude=weights)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        loss(model).backward()

    benchmark.extra_info["activation_memory_ratio"] = kept(ours) / kept(eager)
    compare(lambda _: step(ours), lambda _: step(eager), [None], 0, x)
