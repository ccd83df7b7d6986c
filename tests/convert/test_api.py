"""convert: which idioms become one call, and that they compute what they did."""

import math
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import CASES, Decoder, bn, cbr, conv, net
from support.conversions import assert_converts, images, patterns, prepared
from support.seeds import seed_all
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, verify
from fastcnn.convert import fused_forward
from fastcnn.convert.codegen import fit
from fastcnn.convert.graph import layers


@pytest.mark.parametrize("name", CASES)
def test_idioms(name: str) -> None:
    make, expected = CASES[name]
    assert assert_converts(make(), images(3, 4, 6, 8)) == expected


@pytest.mark.parametrize("up", [None, nn.Upsample(scale_factor=2)])
@pytest.mark.parametrize("last", [False, True, None])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_chain_on_an_upsampled_image(up: Any, last: bool | None, layout: Any) -> None:
    x = images(2, 32, 5, 4).to(memory_format=layout)
    skip = images(2, 4, 10, 8, seed=3).to(memory_format=layout)
    first = "interpolate" if last is None else "interpolate-cat"
    found = assert_converts(Decoder(up, last), x, skip)
    assert found == [f"{first} > conv-bn-relu > conv-bn-relu"]


def test_a_skip_of_another_type_is_concatenated_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "_said", set())  # what is said once, other tests may have heard
    # torch.cat promotes; the kernel for the small image takes one type.
    x = images(2, 32, 5, 4).to(memory_format=torch.channels_last)
    skip = images(2, 4, 10, 8).float().to(memory_format=torch.channels_last)
    model = prepared(Decoder(None, False)).eval()
    want = model(x, skip)
    with pytest.warns(UserWarning, match=r"its second input is torch\.float32 beside"):
        y = convert(model)(x, skip)
    assert_same(y, want)


def test_channels_last_keeps_the_layout() -> None:
    x = images(2, 4, 6, 8).to(memory_format=torch.channels_last)
    model = nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU())).to(memory_format=torch.channels_last)
    assert_converts(model, x)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_outputs_keep_their_types() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.relu(m.bn(m.conv(x)))
        return OrderedDict(out=y, aux=(m.bn2(m.conv2(y)), [y.mean(), None, 3]))

    model = net(run)
    assert_converts(model, images(2, 4, 5, 5))
    out = model(images(2, 4, 5, 5))
    assert type(out) is OrderedDict
    assert list(out) == ["out", "aux"]
    assert type(out["aux"]) is tuple
    assert out["aux"][1][1:] == [None, 3]


def test_two_inputs_and_a_default() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x: Tensor, skip: Tensor, scale: float = 2.0) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + skip) * scale

    model = Two()
    x, skip = images(2, 4, 5, 5), images(2, 4, 5, 5, seed=9)
    assert assert_converts(model, x, skip) == ["conv-bn + residual - relu"]
    y = model(x, skip)
    assert torch.equal(model(x, skip=skip), y)
    assert torch.equal(model(skip=skip, x=x), y)
    # Another value than the one that was traced runs the forward as it is written.
    assert_same(model(x, skip, scale=6.0), 3 * y)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model(x)


def test_dropout_of_every_kind_is_ours() -> None:
    model = net(
        lambda m, x: F.dropout2d(F.dropout(m.drop(x), 0.5, m.training), 0.3, m.training),
        drop=nn.Dropout(0.2),
    )
    prepared(model)
    convert(model)
    x = torch.ones(64, 16, 32, 32, dtype=torch.float64)
    assert patterns(model) == ["dropout", "dropout", "dropout"]
    seed_all(3)
    y = model(x)
    # Channels that are all 0 were dropped whole; of 1024 elements none is left by 0.6^1024.
    channels = y.flatten(2)[(y != 0).any(3).any(2)]
    values = channels[channels != 0]
    # Within 6 deviations of the binomial distributions: outside by chance once in 5e8 draws.
    for count, n, p in ((len(channels), 64 * 16, 0.7), (len(values), channels.numel(), 0.8 * 0.5)):
        assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p))
    assert_same(values, torch.full_like(values, 1 / (0.8 * 0.5 * 0.7)))
    model.eval()
    assert torch.equal(model(x), x)


def test_each_module_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # For what it is; and its forward is traced once for the training flags as they are, also where
    # strict=True reads what was decided.
    asked, traced = Counter(), Counter()
    classify, trace = layers._classify, fused_forward.trace

    def counted(module: nn.Module) -> layers.Layer:
        asked[module] += 1
        return classify(module)

    def noted(module: nn.Module, *more: Any) -> Any:
        traced[module] += 1
        return trace(module, *more)

    monkeypatch.setattr(layers, "_classify", counted)
    monkeypatch.setattr(fused_forward, "trace", noted)
    model = nn.Sequential(cbr(nn.ReLU()), net(lambda m, x: m.relu(m.bn(m.conv(x)) + x)))
    model.append(net(lambda m, x: F.dropout(m.relu(m.bn(m.conv(x))), 0.5, m.training)))
    convert(model, strict=True)
    assert set(asked) == set(model.modules())
    assert set(asked.values()) == {1}
    assert traced == {model: 1}
    verify(model, images(2, 4, 8, 8).float())
    assert sum(traced[m] for m in model.modules()) == 1
