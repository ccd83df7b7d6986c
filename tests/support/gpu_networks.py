"""A small network with all that convert fuses, and its training step, for tests on a GPU.

Activations are smooth: where relu's derivative jumps a rounding decides between two gradients, and
no limit on errors is right there. Nothing in it calls cuBLAS, which PyTorch's deterministic mode
wants set up before the process starts.
"""

import copy

import torch
import torch.nn.functional as F
from support.chains import randomize
from support.device import DEVICE
from support.roundings import Expected
from support.seeds import seed_all, seeded
from torch import Tensor, nn

from fastcnn import convert

Results = dict[str, Tensor]


class Network(nn.Module):
    """x [n, 3, h, w] -> logits [n, 10]: a stem, a residual block, a skip next to what is upsampled,
    group norm; channels wide enough for Triton's kernels."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.act, self.dropout = nn.SiLU(), nn.Dropout(dropout)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv4, self.bn4 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv5, self.norm = nn.Conv2d(48, 16, 1), nn.GroupNorm(4, 16)
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(skip)))
        z = self.act(self.bn3(self.conv3(y)))
        y = self.dropout(self.act(self.bn4(self.conv4(z)) + y))
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        y = self.act(self.norm(self.conv5(torch.cat([skip, y], 1))))
        return self.head(y).mean((2, 3))


def networks(dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The network converted, and as it was."""
    seed_all(0)
    plain = Network(dropout)
    randomize(plain)
    plain = plain.to(DEVICE, memory_format=torch.channels_last)
    return convert(copy.deepcopy(plain)), plain


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(n, 3, 12, 16, generator=generator).to(memory_format=torch.channels_last)
    return x.to(DEVICE), torch.randint(10, (n,), generator=generator).to(DEVICE)


def results(model: nn.Module, x: Tensor, target: Tensor, scale: float = 1.0) -> Results:
    """Logits, the gradients of `scale` times the loss, and the buffers."""
    model.zero_grad()
    logits = model(x)
    (F.cross_entropy(logits, target) * scale).backward()
    found = {"logits": logits.detach()}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def assert_bitwise(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert torch.equal(found[name], e), name


def expected_results(
    plain: nn.Module, x: Tensor, target: Tensor, autocast: torch.dtype | None = None
) -> Expected:
    """Return what `results` of the network may be in float32, or by autocast (roundings.py)."""
    exact, x, target = copy.deepcopy(plain).cpu().double(), x.cpu().double(), target.cpu()
    return Expected(
        lambda: results(copy.deepcopy(exact), x, target),
        autocast or torch.float32,
        torch.float32,
        autocast is not None,
    )


def expected_logits(plain: nn.Module, x: Tensor) -> Expected:
    """Return what it may compute in float32, as "logits"; weights may be folded."""
    exact, x = copy.deepcopy(plain).cpu().double(), x.cpu().double()
    return Expected(
        lambda: {"logits": copy.deepcopy(exact)(x).detach()}, torch.float32, autocast=True
    )
