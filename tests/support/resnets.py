"""Small ResNets beside torchvision's with the same weights, and how the two are compared."""

from typing import Any

import torch
from support.chains import randomize
from support.oracles import torchvision_resnet
from support.seeds import seeded
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, models

# Networks whose arithmetic differs: both blocks, and dilation, which changes no weight's shape. Of
# four stages the second has a block that repeats.
LAYERS = [1, 2, 1, 1]


def outputs_and_gradients(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Logits, gradients of x and of every parameter, and the buffers after the call."""
    x = x.clone().requires_grad_()
    logits = model(x)
    logits.backward(dy)
    results = {"logits": logits.detach(), "dx": x.grad}
    results.update({f"d {name}": p.grad for name, p in model.named_parameters()})
    results.update({name: b.double() for name, b in model.named_buffers()})
    return {name: value for name, value in results.items() if value is not None}


def assert_same_network(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    dy = torch.randn(len(x), 10, dtype=torch.float64, generator=seeded(2))
    expected = outputs_and_gradients(theirs, x, dy)
    assert_same(outputs_and_gradients(ours, x, dy), expected, floor=0.0)


def resnets(block: str, memory: Any = "default", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours, converted, and torchvision's with the same weights, in float64."""
    theirs = torchvision_resnet.ResNet(
        getattr(torchvision_resnet, block), LAYERS, num_classes=10, **options
    ).double()
    randomize(theirs)
    ours = models.ResNet(getattr(models, block), LAYERS, num_classes=10, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return convert(ours, memory=memory), theirs
