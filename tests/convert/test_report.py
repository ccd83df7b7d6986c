"""fastcnn.report(model): what people read about a conversion."""

import warnings

import pytest
import torch
from support.conversion_cases import Branch, cbr, conv, net
from support.oracles import torchvision_resnet
from torch import nn

import fastcnn
from fastcnn import convert, report
from fastcnn.convert.report import rows
from fastcnn.convert.rows import ConversionRow, left, table

CONV, CPP = "oneDNN through PyTorch + C++", "C++"

RESNET = """
module                          pattern                     fused  runs by
conv1 .. maxpool                conv-bn-relu-pool           yes    oneDNN through PyTorch + C++
layer1.0: conv1 .. relu         conv-bn-relu > conv-bn +    yes    oneDNN through PyTorch + C++
                                  identity - relu
layer2.0: downsample.0 .. relu  conv-bn-relu > conv-bn +    yes    oneDNN through PyTorch + C++
                                  projection - relu
layer3.0: downsample.0 .. relu  conv-bn-relu > conv-bn +    yes    oneDNN through PyTorch + C++
                                  projection - relu
layer4.0: downsample.0 .. relu  conv-bn-relu > conv-bn +    yes    oneDNN through PyTorch + C++
                                  projection - relu
5 of 5 fused
"""


def of(model: nn.Module) -> list[ConversionRow]:
    return rows(convert(model))


def test_a_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    model = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1])
    found = report(convert(model))
    assert capsys.readouterr().out.strip() == RESNET.strip()
    assert found[1] == ConversionRow(
        "layer1.0: conv1 .. relu", "conv-bn-relu > conv-bn + identity - relu", True, CONV, ""
    )
    assert left(found) == []


def test_an_unconverted_model_stays_so() -> None:
    model = nn.Sequential(cbr(nn.ReLU()), nn.Dropout())
    classes = [type(m) for m in model.modules()]
    assert rows(model) == [
        ConversionRow("0: 0 .. 2", "conv-bn-relu", False, "PyTorch", "not converted"),
        ConversionRow("1", "dropout", False, "PyTorch", "not converted"),
    ]
    assert [type(m) for m in model.modules()] == classes
    assert left(rows(model)) == rows(model)


def test_nothing_convertible_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(nn.Linear(2, 2)) == []
    assert capsys.readouterr().out == "nothing in this model is convertible\n"


def test_layers_without_a_kernel() -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic"), nn.GroupNorm(2, 4))
    assert of(model) == [
        ConversionRow("0", "upsample", False, "PyTorch", "there is no kernel for mode='bicubic'"),
        ConversionRow("1", "group_norm", True, CPP, ""),
    ]


def test_what_is_left_of_a_graph_has_its_reason() -> None:
    same = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU())
    why = "0.0 has padding='same'; give it numbers"
    assert of(nn.Sequential(same)) == [
        ConversionRow("0: 1 .. 2", "batch_norm-relu", True, CPP, ""),
        ConversionRow("0.0", "conv", False, "PyTorch", why),
    ]


def test_what_does_not_trace_has_a_row_and_its_children_theirs() -> None:
    model = nn.Sequential(Branch(conv=conv(), norm=nn.BatchNorm2d(4)), Branch(body=cbr()))
    first, norm, second, body = of(model)
    assert first[:4] == ("0", "conv, batch_norm", False, "PyTorch")
    assert first.reason.startswith("its forward does not trace: TraceError: symbolically traced")
    assert norm == ConversionRow("0.norm", "batch_norm", True, CPP, "")
    assert second[:4] == ("1", "", False, "PyTorch")  # nothing of its own is known
    assert body == ConversionRow("1.body: 0 .. 1", "conv-bn", True, CONV, "")
    assert left([first, norm, second, body]) == [first]


def test_functions_are_named_within_their_module() -> None:
    resize = net(lambda m, x: nn.functional.interpolate(x, scale_factor=2))
    assert [row.module for row in of(nn.Sequential(resize))] == ["0.interpolate"]


def test_calls_that_ran_unfused_are_shown() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), Branch(norm=nn.BatchNorm2d(4))))
    x = torch.randn(2, 4, 6, 12)[..., ::2]
    model[0](x)
    model[1].norm(x)
    chain, branch, norm = rows(model)
    why = "its last call that was not fused: its input is not dense: strides (288, 72, 12, 2)"
    assert chain.fused
    assert chain.reason.startswith(why)
    assert not branch.fused
    assert norm.fused
    assert norm.reason.startswith(why)


def test_a_later_change_is_shown_and_still_warned_of() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.Dropout()))
    model[0][0].kernel_size = [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rows(model)
    whys = [(row.module, row.pattern, row.reason) for row in found]
    changed = "changed since it was converted: Conv2d.kernel_size was (3, 3) and is [3, 3] now"
    assert whys == [
        ("Sequential", "dropout", changed),
        ("0: 0 .. 2", "conv-bn-relu", ""),  # traced when it is called, as it is by then
        ("1", "dropout", ""),
    ]
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        model(torch.randn(2, 4, 6, 6))


def test_a_device_without_kernels() -> None:
    class Elsewhere(nn.Sequential):
        pass

    with torch.device("meta"):
        model = Elsewhere(cbr(nn.ReLU()))
    (row,) = of(model)
    assert row == ConversionRow(
        "0: 0 .. 2", "conv-bn-relu", False, "PyTorch", "this build has no kernels for meta"
    )


def test_long_names_break_at_their_dots() -> None:
    name = "encoder.stages.3.blocks.12.attention.output.projection.norm"
    text = table([ConversionRow(name, "batch_norm", False, "PyTorch", "because " * 30)])
    assert max(map(len, text.splitlines())) <= 100
    assert "encoder.stages.3.blocks.12." in text.splitlines()[1].split()


def test_without_a_model_it_is_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    fastcnn.plan._planner.cache_clear()
    assert report() == []
    assert "nothing was planned" in capsys.readouterr().out


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"report: model: expected a torch\.nn\.Module, got int"):
        report(3)  # type: ignore[arg-type]
