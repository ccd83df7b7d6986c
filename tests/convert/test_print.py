"""What print(model) says of a conversion, and that revert takes it away again."""

import copy
import re
from typing import Any

import pytest
import torch
from support.conversion_cases import Branch, bn, cbr, net
from torch import Tensor, nn

from fastcnn import convert, revert

SAID = re.compile(r"(\n? *|, )fused: .*?(?=\)?$)", re.MULTILINE)


class Own(nn.Sequential):
    def extra_repr(self) -> str:
        return "one line\nand another"


def test_what_is_converted_says_so_where_it_is() -> None:
    model = nn.Sequential(
        Branch(body=cbr(nn.ReLU())), net(lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))))
    )
    before = repr(model)
    convert(model)
    lines = repr(model).splitlines()
    at = {line.split(":")[0].strip(): i for i, line in enumerate(lines)}
    assert lines[:2] == ["Sequential(", "  fused: conv-bn + projection - relu"]
    assert lines[2:4] == ["  (0): Branch(", "    (body): Sequential("]  # it does not trace
    assert lines[at["(body)"] + 1] == "      fused: conv-bn-relu"
    assert (
        lines[at["(1)"] + 1] == "    fused: traced when called by itself"
    )  # by the whole until then
    assert lines[at["(bn2)"]].endswith(", track_running_stats=True)")  # a layer keeps its class
    assert lines[at["(conv2)"]].endswith("padding=(1, 1))")
    assert {type(m).__name__ for m in model.modules()} >= {"Sequential", "Branch", "BatchNorm2d"}
    assert repr(copy.deepcopy(model)).splitlines()[1] == "  fused: traced when called by itself"
    assert repr(revert(model)) == before


def test_several_calls_are_counted_and_changes_seen() -> None:
    model = convert(net(lambda m, x: m.relu(m.bn(m.conv(x))).tanh() + m.bn2(m.conv2(x))))
    assert repr(model).splitlines()[1] == "  fused: 2 calls"
    model.bn = nn.Identity()
    assert repr(model).splitlines()[1] == "  fused: not now, see fastcnn.report"


def _drops(m: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(m.relu(m.bn(m.conv(x))), 0.5, m.training)


def test_a_print_traces_nothing() -> None:
    model = convert(net(lambda m, x: m.inner(_drops(m, x)), inner=net(_drops)))
    assert repr(model).splitlines()[1] == "  fused: 4 calls"
    model.inner.train(False)
    made = len(model._fastcnn_conversion.forwards)
    assert repr(model).splitlines()[1] == "  fused: traced at its next call"
    assert len(model._fastcnn_conversion.forwards) == made
    model(torch.randn(2, 4, 5, 5))
    assert repr(model).splitlines()[1] == "  fused: 4 calls"


@pytest.mark.parametrize("make", [lambda: Own(*cbr(nn.ReLU())), bn, lambda: nn.GroupNorm(2, 4)])
def test_what_a_class_says_itself_stays(make: object) -> None:
    assert callable(make)
    model = make()
    before = repr(model)
    after = repr(convert(model))
    assert after != before
    # Without what was added it is what it was, but for the line breaks between.
    assert SAID.sub("", after).split() == before.split()
