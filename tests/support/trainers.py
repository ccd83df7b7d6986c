"""The same training twice, of an unconverted model and of its converted copy, in float64.

Roundings grow from step to step, so how far is asked too: `moved` computes a training in which each
layer's result is off by LARGER_ROUNDING. What that moves by less than `assert_same` allows, an
order of summation does not move further.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support.oracles import torchvision
from support.seeds import seeded
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastcnn import convert
from fastcnn.convert.report import rows

STEPS, BATCH, SIZE, CLASSES = 20, 4, 32, 3

# A sum of 1,000 products in float64 is off by at most 8 sqrt(1000) 1.1e-16 = 2.8e-14 of its terms'
# magnitudes (support/tolerance.py), and the networks here have no longer ones.
LARGER_ROUNDING = 1e-13

# What a training computes: losses, averages, what was read from files; and it trains the model.
Training = Callable[[Any, Path], dict[str, Any]]


class Small(nn.Module):
    """Strided and residual blocks with a projection, dropout of nothing, a resizing and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer1 = torchvision.models.resnet.BasicBlock(8, 8)
        self.layer2 = torchvision.models.resnet.BasicBlock(8, 16, 2, projection)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.layer1(self.stem(x))
        y = F.interpolate(self.layer2(skip), scale_factor=2.0)
        return self.fc(self.drop(torch.cat([y, skip], 1).mean((2, 3))))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().double()


def loader(segments: bool = False) -> DataLoader[Any]:
    """Return STEPS batches of images, and their classes: one an image, or one a pixel."""
    generator = seeded(3)
    x = torch.randn(STEPS * BATCH, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    labels = (len(x), SIZE, SIZE) if segments else (len(x),)
    y = torch.randint(CLASSES, labels, generator=generator)
    x += 0.5 * (y[:, None] if segments else y[:, None, None, None])  # so that there is something
    return DataLoader(TensorDataset(x, y), BATCH)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Return an optimizer that amplifies no gradient of 0, whose rounding errors others follow."""
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def assert_trains_as_before(
    train: Training,
    folder: Path,
    make: Callable[[], nn.Module] = small,
    image: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Train a model and its converted copy; compare all results, and what is fused afterwards."""
    model = make()
    converted = convert(copy.deepcopy(model))
    before = rows(converted)
    assert any(row.fused for row in before)
    found = []
    for name, one in (("unconverted", model), ("converted", converted)):
        (folder / name).mkdir()
        found.append(train(one, folder / name))
        found[-1] |= dict(one.state_dict())
        with torch.no_grad():
            found[-1]["evaluated"] = one.eval()(image(next(iter(loader()))[0]))
    want, got = found
    assert len(want["losses"]) == STEPS
    assert want["losses"].unique().numel() > STEPS / 2, "nothing was trained"
    assert_same(got, want)
    assert rows(converted) == before


def plain(model: nn.Module, segments: bool = False) -> dict[str, Any]:
    """Train without a trainer: what the steps compute."""
    optimizer, losses = sgd(model), []
    for x, y in loader(segments):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **model.state_dict()}


@contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """Move what each layer returns by random errors, and so the gradients that pass it."""
    generator = seeded(4)

    def move(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        error = 2 * torch.rand(y.shape, dtype=y.dtype, generator=generator) - 1
        return y * (1 + LARGER_ROUNDING * error)

    hooks = [m.register_forward_hook(move) for m in model.modules() if not [*m.children()]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
