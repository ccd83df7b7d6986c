"""Every op compiled where nobody asks for a gradient: there autograd's Functions are left out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.seeds import seed_all, seeded
from torch import Tensor, nn

from fastcnn import functional
from fastcnn.models import resnet20
from fastcnn.nn import (
    BatchNormAct2d,
    GroupNormAct,
    InstanceNormAct2d,
    LayerNorm2d,
    Upsample,
    conv_bn_act,
)


def chain() -> Callable[[Tensor], Tensor]:
    conv, bn = nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
    return lambda x: conv_bn_act(x, [(conv, bn)], x)


CASES: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "batch norm": lambda: BatchNormAct2d(8),
    "batch norm, evaluation": lambda: BatchNormAct2d(8).eval(),
    "group norm": lambda: GroupNormAct(2, 8),
    "layer norm": lambda: LayerNorm2d(8),
    "instance norm": lambda: InstanceNormAct2d(8, track_running_stats=True),
    "upsample": lambda: Upsample(scale_factor=2, mode="bilinear"),
    "dropout": lambda: functional.dropout,
    "chain": chain,
}


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@pytest.mark.parametrize("case", CASES)
def test_one_graph_without_gradients(case: str, mode: Callable[[], Any]) -> None:
    x = torch.randn(2, 8, 6, 6, generator=seeded(0))
    seed_all(0)
    run = CASES[case]()
    with mode():
        seed_all(1)
        expected = run(x)
        seed_all(1)
        actual = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["instance norm", "upsample", "dropout"])
def test_one_graph_of_what_has_no_parameters(case: str) -> None:
    # In grad mode, with an input that is a leaf without a gradient: the first layer of a network.
    run = CASES[case]()
    x = torch.randn(2, 8, 6, 6)
    seed_all(1)
    expected = run(x)
    seed_all(1)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_network_in_training_mode() -> None:
    # Recalibration of running statistics: training mode, and no gradient.
    seed_all(0)
    model, x = resnet20(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
