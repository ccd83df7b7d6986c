"""convert on models that fastcnn did not write, each beside itself unconverted, in float64."""

import copy
from typing import Any

import pytest
import torch
from support.conversion_models import HEADER, NAMES, images, line, make
from support.conversions import results
from support.paths import ROOT
from support.seeds import seeded
from support.tolerance import assert_same
from support.zoo import slow_but
from torch import nn

from fastcnn import convert
from fastcnn.convert.verify.determinism import Comparable, without_dropout


def told_apart(model: nn.Module) -> nn.Module:
    """Change what fresh norms have at 0 and 1, so that nothing can be left out unseen."""
    generator = seeded(1)
    for layer in model.modules():
        own = {**layer._parameters, **layer._buffers}
        if not {"weight", "bias"} <= own.keys() or own["weight"] is None:
            continue
        if own["weight"].dim() != 1 or own["bias"] is None:
            continue
        for name, value in own.items():
            if value is None or not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                value += (noise - 0.5 if name != "running_var" else noise).to(value) * 0.2
    return model


# Of each package a small one: inverted residuals, aggregated layers, a decoder with skips.
QUICK = {"torchvision/mobilenet_v2", "timm/dla46_c", "smp/Unet"}


@pytest.mark.filterwarnings("ignore:fastcnn.convert. nothing in")
@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_a_family(name: str) -> None:
    model = told_apart(make(name, small=True)).double()
    before, x = copy.deepcopy(model), images(name).double()
    convert(model)
    for training in (True, False):
        found: list[Any] = []
        for one in (model, before):
            one.train(training)
            with Comparable(), without_dropout():
                found.append(results(one, x))
        assert_same(*found)


@pytest.mark.parametrize(
    "name", ["torchvision/mobilenet_v2", "torchvision/resnet18", "timm/dla46_c", "smp/FPN"]
)
def test_the_table_in_the_docs_is_what_convert_does(name: str) -> None:
    text = (ROOT / "docs/conversion.md").read_text()
    assert line(name) in text.splitlines()


def test_the_table_in_the_docs_has_all_models() -> None:
    text = (ROOT / "docs/conversion.md").read_text()
    table = text[text.index(HEADER) + len(HEADER) :].split("<!--")[0]
    assert [row.split(" | ")[0].strip("| ") for row in table.strip().splitlines()] == list(NAMES)
